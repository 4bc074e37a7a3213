"""The hidden-state objective: what blocks say, token by token."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from kdcli.objectives.base import Objective, Signals, Wants, example_mean, token_mean


def token_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, match_norm: bool = False) -> Tensor:
    """Return the squared difference, mean over features, real tokens and examples.

    student, teacher: (batch, seq, width); mask: (batch, seq). With `match_norm` each example's error is divided
    by the teacher's mean square over that example: a relative error that no activation's size can make heavy,
    and that still averages over examples, so that shares of a batch on several devices agree with the whole.
    """
    student, teacher = student.float(), teacher.detach().float()
    error = (student - teacher).square().mean(-1)
    if match_norm:
        size = example_mean(teacher.square().mean(-1), mask).clamp(min=1e-12)
        error = error / size[:, None]
    return token_mean(error, mask)


class HiddenObjective(Objective):
    """Mean over pairs (student layer, teacher layer) of the squared difference of hidden states.

    Layers count from 0 (the embedding output). With `bridge`, a learned linear map (student width, teacher
    width) comes before the comparison: one a student layer, or a single one when `shared` (TinyBERT).
    With `redraw` every epoch has pairs of its own, redraw(epoch); they stay within the student layers of `pairs`
    and `teacher_layers`, all of which are then captured (RAIL-KD).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: tuple[int, int] | None = None,
        bridge: bool = False,
        shared: bool = False,
        match_norm: bool = False,
        redraw: Callable[[int], Sequence[tuple[int, int]]] | None = None,
        teacher_layers: Iterable[int] = (),
    ) -> None:
        """widths: (student, teacher), needed for a bridge."""
        super().__init__()
        self.pairs = tuple(pairs)
        self.redraw = redraw
        self.layers = frozenset(s for s, _ in pairs), frozenset(t for _, t in pairs) | frozenset(teacher_layers)
        self.match_norm = match_norm
        self.shared = shared
        self.bridges: nn.ModuleDict | None = None
        if bridge:
            assert widths is not None
            names = ["shared"] if shared else sorted({str(s) for s, _ in self.pairs})
            self.bridges = nn.ModuleDict({name: nn.Linear(*widths, bias=shared) for name in names})

    def student_wants(self) -> Wants:
        return Wants(hidden=self.layers[0])

    def teacher_wants(self) -> Wants:
        return Wants(hidden=self.layers[1])

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if self.redraw is not None:
            self.pairs = tuple(self.redraw(epoch))

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        terms = []
        for s, t in self.pairs:
            state = student.hidden[s].float()
            if self.bridges is not None:
                state = self.bridges["shared" if self.shared else str(s)](state)
            terms.append(token_mse(state, teacher.hidden[t], student.mask, match_norm=self.match_norm))
        return sum(terms[1:], terms[0]) / len(terms)
