"""The attribution objective: which tokens a prediction rests on (AD-KD)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdcli.objectives.base import Objective, token_mean
from kdcli.objectives.distribution import Distribution
from kdcli.signals import Request, Signals

Path = Sequence[tuple[Tensor, Tensor]]
"""(scaled embedding output, logits) for alpha = 1/K, ..., 1; each pair connected by an autograd graph."""


def path_gradient(path: Path, score: Callable[[Tensor], Tensor], *, create_graph: bool = False) -> Tensor:
    """Return the gradient of `score`(logits) with respect to the embeddings, mean over the path: (batch, seq, hidden).

    score gives a scalar, the sum over examples. With one point it is the plain gradient; times the embedding output
    it is integrated gradients with a zero baseline by the right-hand rule. Graphs are kept. Source: AD-KD (Wu et
    al. 2023), eq. 2-3.
    """
    total = torch.stack([score(logits) for _, logits in path]).sum()
    gradients = torch.autograd.grad(total, [x for x, _ in path], create_graph=create_graph, retain_graph=True)
    return torch.stack(gradients).mean(0) if len(gradients) > 1 else gradients[0]


def saliency(gradient: Tensor, embedding: Tensor, top_k: int | None = None) -> Tensor:
    """Return how much each token counts, (batch, seq): the length of gradient x embedding over features.

    gradient, embedding: (batch, seq, hidden). With `top_k` only each token's largest features count.
    """
    attribution = (gradient * embedding).float()
    if top_k is not None and top_k < attribution.shape[-1]:
        attribution = attribution.abs().topk(top_k, dim=-1).values
    return torch.linalg.vector_norm(attribution, dim=-1)


def attribution_loss(student_maps: Tensor, teacher_maps: Tensor, mask: Tensor) -> Tensor:
    """Return the squared difference of normalised maps, mean over real tokens and examples.

    student_maps, teacher_maps, mask: (batch, seq). Maps are scaled to length 1 over each example's real tokens, so
    that the size of the score does not matter. A map of zeros stays one.
    """
    real = mask.to(student_maps.dtype)
    student = torch.nn.functional.normalize(student_maps * real, dim=-1)
    teacher = torch.nn.functional.normalize(teacher_maps.detach() * real, dim=-1)
    return token_mean((student - teacher).square(), mask)


class AttributionObjective(Objective):
    """Squared difference of attribution maps, summed over views.

    A view is a score of the predictions whose gradient gives the map, as the distribution has it. steps: points of
    integrated gradients; 1 is gradient x input. top_k: features of the teacher's that count; all of the student's do.
    """

    def __init__(self, distribution: Distribution, *, top_k: int | None = None, steps: int = 1) -> None:
        super().__init__()
        self.distribution = distribution
        self.top_k = top_k
        self.steps = steps

    def student_request(self) -> Request:
        return Request(logits=True, hidden=frozenset({0}), gradients=2, path=self.steps)

    def teacher_request(self) -> Request:
        return Request(logits=True, hidden=frozenset({0}), gradients=1, path=self.steps)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        own, others = _path_of(student), _path_of(teacher)
        (table,) = student.predictions
        assert table.target is not None
        terms = []
        for score in self.distribution.views(table.logits.shape[-1], table.target):
            target = saliency(path_gradient(others, score).detach(), others[-1][0].detach(), self.top_k)
            gradient = path_gradient(own, score, create_graph=True)
            terms.append(attribution_loss(saliency(gradient, own[-1][0]), target, student.mask))
        return torch.stack(terms).sum()


def _path_of(signals: Signals) -> Path:
    points = signals.path or [(signals.hidden[0], signals.predictions)]
    return [(embedding, table.logits) for embedding, (table,) in points]
