"""The hidden-state objective: outputs of blocks, token by token."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdcli.objectives.base import Objective, example_mean, times, token_mean
from kdcli.signals import EMBEDDINGS, MatrixKey, Request, Signals

CHUNK_ELEMENTS = 2**18
"""Features that are worked on at a time on a CPU: few enough to stay in its cache from one pass to the next."""


class _SquaredError(torch.autograd.Function):
    """The squared difference of two states, and the teacher's square, mean over features.

    It does what autograd would do, but keeps nothing except the difference, in the student's own precision.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, sized: bool) -> tuple[Tensor, Tensor]:
        width = student.shape[-1]
        own, other = student.reshape(-1, width), teacher.reshape(-1, width)
        rows = max(1, CHUNK_ELEMENTS // width) if own.device.type == "cpu" else len(own)
        difference = torch.empty_like(own)
        error, size = (torch.zeros(len(own), device=own.device) for _ in range(2))
        for start in range(0, len(own), max(1, rows)):
            part = slice(start, start + rows)
            reference = other[part].float()
            if own.dtype == torch.float32:
                gap = torch.sub(own[part], reference, out=difference[part])
            else:
                difference[part] = gap = own[part].float() - reference
            error[part] = torch.linalg.vector_norm(gap, dim=-1)
            if sized:
                size[part] = torch.linalg.vector_norm(reference, dim=-1)
        error, size = (norm.square_().div_(width).view(student.shape[:-1]) for norm in (error, size))
        ctx.save_for_backward(difference)
        ctx.mark_non_differentiable(size)
        return error, size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        width = difference.shape[-1]
        scale = (gradient.reshape(-1, 1) * (2.0 / width)).to(difference.dtype)
        return times(difference, scale).view(*gradient.shape, width), None, None


def token_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    match_norm: bool = False,
    by_token: bool = False,
) -> Tensor:
    """Return the squared difference, mean over features, real tokens and examples.

    student, teacher: (batch, seq, width); mask: (batch, seq); weights: (batch,), of examples. With `match_norm` each
    example's error is divided by the teacher's mean square over that example: a relative error that no activation's
    size can make heavy, and that still averages over examples, so that shares of a batch on several devices agree with
    the whole; with `by_token` as well, each token's by its own mean square. That is for decoders, whose first token
    has states whose square is ten thousand times that of others, and for models of images, of which a few patches do
    (Sun et al. 2024, arXiv 2402.17762; Darcet et al. 2023, arXiv 2309.16588).
    """
    return mean_token_mse([(student, teacher)], mask, weights, match_norm=match_norm, by_token=by_token)


def mean_token_mse(
    pairs: Iterable[tuple[Tensor, Tensor]],
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    match_norm: bool = False,
    by_token: bool = False,
) -> Tensor:
    """Return the mean of `token_mse` over pairs of (student, teacher), whose widths may differ from pair to pair."""
    found = [_SquaredError.apply(student, teacher.detach(), match_norm) for student, teacher in pairs]
    # Means of all pairs in one operation each: on a GPU every operation costs a launch.
    error = torch.stack([one for one, _ in found])
    if match_norm:
        size = torch.stack([size for _, size in found])
        size = size if by_token else example_mean(size, mask)[..., None]
        error = error / size.clamp(min=1e-12)
    return token_mean(error, mask, weights)


class HiddenObjective(Objective):
    """Mean over pairs (student layer, teacher layer) of the squared difference of hidden states.

    Layers count from 0 (the embedding output). With `bridge`, a learned linear map (student width, teacher
    width) comes before the comparison: one a student layer, or a single one with a bias when `shared` (TinyBERT); a
    map that is given is shared with whatever else holds it.
    With `projected` the teacher's state is compared in the student's space instead: times the projection that trained
    the student's weights there (Low-Rank Clone, arXiv 2505.12781), which gets no gradient from it.
    With `redraw` every epoch has pairs of its own, redraw(epoch); they stay within the student layers of `pairs`
    and `teacher_layers`, all of which are then captured (RAIL-KD).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: tuple[int, int] | None = None,
        bridge: bool | nn.Linear = False,
        shared: bool = False,
        projected: bool = False,
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
        self.shared = shared or isinstance(bridge, nn.Linear)
        self.projected = projected
        self.bridges: nn.ModuleDict | None = None
        if isinstance(bridge, nn.Linear):
            self.bridges = nn.ModuleDict({"shared": bridge})
        elif bridge:
            assert widths is not None
            names = ["shared"] if shared else sorted({str(s) for s, _ in self.pairs})
            self.bridges = nn.ModuleDict({name: nn.Linear(*widths, bias=shared) for name in names})

    def student_request(self) -> Request:
        written = frozenset(map(_written_by, self.layers[0])) if self.projected else frozenset()
        return Request(hidden=self.layers[0], projections=written)

    def teacher_request(self) -> Request:
        return Request(hidden=self.layers[1])

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if self.redraw is not None:
            self.pairs = tuple(self.redraw(epoch))

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        pairs = self._compared(student, teacher)
        options = {"match_norm": self.match_norm, "by_token": student.uneven}
        return mean_token_mse(pairs, student.mask, student.weights, **options)

    def _compared(self, student: Signals, teacher: Signals) -> Iterator[tuple[Tensor, Tensor]]:
        # One pair at a time: the teacher's may be read from a disk.
        for s, t in self.pairs:
            state, reference = student.hidden[s].float(), teacher.hidden[t]
            if self.projected:
                reference = reference.float() @ student.projections[_written_by(s)].detach()
            if self.bridges is not None:
                state = self.bridges["shared" if self.shared else str(s)](state)
            yield state, reference


def _written_by(layer: int) -> MatrixKey:
    """Return the map that hidden[layer] comes from."""
    return (layer, "ffn_out") if layer else (0, EMBEDDINGS)


class ProjectionObjective(Objective):
    """Relative squared error of the outputs of a student's matrices, mean over matrices and pairs of blocks.

    The teacher's outputs are compared in the student's space, times the projections that trained its weights there, so
    that nothing else is learnt; they get no gradient from it. Each error is divided by the mean square of what it is
    compared with. Source: the activation clone of Low-Rank Clone (arXiv 2505.12781, section 3), there not relative.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
        """pairs: (student block, teacher block); names: of the matrices."""
        super().__init__()
        self.pairs, self.names = tuple(pairs), tuple(names)

    def student_request(self) -> Request:
        keys = frozenset((s, name) for s, _ in self.pairs for name in self.names)
        return Request(matrices=keys, projections=keys)

    def teacher_request(self) -> Request:
        return Request(matrices=frozenset((t, name) for _, t in self.pairs for name in self.names))

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        options = {"match_norm": True, "by_token": student.uneven}
        return mean_token_mse(self._compared(student, teacher), student.mask, student.weights, **options)

    def _compared(self, student: Signals, teacher: Signals) -> Iterator[tuple[Tensor, Tensor]]:
        for s, t in self.pairs:
            for name in self.names:
                projection = student.projections[(s, name)].detach()
                yield student.matrices[(s, name)].float(), teacher.matrices[(t, name)].float() @ projection
