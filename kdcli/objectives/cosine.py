"""The cosine objective: in which direction hidden states point (DistilBERT)."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from kdcli.objectives.base import Objective, token_mean
from kdcli.signals import Request, Signals


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return 1 - cos of hidden states, mean over real tokens and examples; between 0 and 2.

    student, teacher: (batch, seq, width); mask: (batch, seq); weights: (batch,), of examples. Source:
    DistilBERT (Sanh et al. 2019), section 3.
    """
    distances = 1.0 - functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    return token_mean(distances, mask, weights)


class CosineObjective(Objective):
    """Mean over pairs (student layer, teacher layer), from 0, of 1 - cos of hidden states of the same width."""

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)

    def student_request(self) -> Request:
        return Request(hidden=frozenset(s for s, _ in self.pairs))

    def teacher_request(self) -> Request:
        return Request(hidden=frozenset(t for _, t in self.pairs))

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        terms = [
            cosine_distance(student.hidden[s], teacher.hidden[t], student.mask, student.weights) for s, t in self.pairs
        ]
        return sum(terms[1:], terms[0]) / len(terms)
