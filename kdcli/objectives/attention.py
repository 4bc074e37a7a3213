"""The attention objective: where heads look."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from kdcli.objectives.base import Objective, common_window, masked_log_softmax, own_keys, token_mean
from kdcli.signals import Request, Signals


def attention_kl(
    student_scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor,
    segments: Tensor | None = None,
    window: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return KL(teacher || student) of attention rows, mean over heads, real queries and examples.

    student_scores, teacher_scores: (batch, heads, seq, seq), before softmax and mask; mask: (batch, seq). With
    `segments`, (batch, seq), a row is a distribution over the tokens of its own segment, although the models
    themselves attend over all; with `window`, (batch, 1, seq, seq), over those that both attend to. weights: (batch,),
    of examples.
    Source: MiniLM (Wang et al. 2020), eq. 5.
    """
    own = own_keys(mask, segments, window)
    student = masked_log_softmax(student_scores, own)
    teacher = masked_log_softmax(teacher_scores.detach(), own)
    keys = own.to(student.dtype)
    rows = (teacher.exp() * (teacher - student) * keys).sum(-1).mean(1)
    return token_mean(rows, mask, weights)


def attention_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor,
    segments: Tensor | None = None,
    window: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the squared difference of attention scores over heads, each real query's keys, and queries.

    Padded entries count as equal and are not in the mean, unlike in the released code; with `segments`, (batch, seq),
    neither are pairs of tokens of different segments; with `window`, (batch, 1, seq, seq), nor those outside it.
    weights: (batch,), of examples.
    Source: TinyBERT (Jiao et al. 2020), eq. 7.
    """
    keys = own_keys(mask, segments, window).to(student_scores.dtype)
    difference = ((student_scores - teacher_scores.detach()) * keys).square().sum(-1) / keys.sum(-1).clamp(min=1)
    return token_mean(difference.mean(1), mask, weights)


def attention_request(layers: Iterable[int]) -> Request:
    """Return the request for what the attention maps of these blocks are made of."""
    layers = frozenset(layers)
    return Request(matrices=frozenset((layer, name) for layer in layers for name in ("query", "key")), attention=layers)


class AttentionObjective(Objective):
    """Mean over pairs (student block, teacher block) of the difference of attention: `kl` or `mse` (of scores).

    Scores are formed from captured queries and keys, so that the models keep their fused attention.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], *, measure: str = "kl") -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.measure = attention_kl if measure == "kl" else attention_mse

    def student_request(self) -> Request:
        return attention_request(s for s, _ in self.pairs)

    def teacher_request(self) -> Request:
        return attention_request(t for _, t in self.pairs)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        terms = [
            self.measure(
                student.attention_scores(s),
                teacher.attention_scores(t),
                student.mask,
                student.segments,
                common_window((student, [s]), (teacher, [t])),
                student.weights,
            )
            for s, t in self.pairs
        ]
        return sum(terms[1:], terms[0]) / len(terms)
