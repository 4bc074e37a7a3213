"""The attribution objective: which tokens a prediction rests on (AD-KD)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdcli.objectives.base import Objective, token_mean
from kdcli.objectives.distribution import Distribution
from kdcli.signals import Prediction, Request, Signals

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


def attribution_loss(student_maps: Tensor, teacher_maps: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the squared difference of normalised maps, mean over real tokens and examples.

    student_maps, teacher_maps, mask: (batch, seq); weights: (batch,), of examples. Maps are scaled to length 1 over
    each example's real tokens, so that the size of the score does not matter. A map of zeros stays one.
    """
    real = mask.to(student_maps.dtype)
    student = torch.nn.functional.normalize(student_maps * real, dim=-1)
    teacher = torch.nn.functional.normalize(teacher_maps.detach() * real, dim=-1)
    return token_mean((student - teacher).square(), mask, weights)


class AttributionObjective(Objective):
    """Squared difference of attribution maps, summed over views and tables of predictions.

    A view is a score of the predictions whose gradient gives the map. With one prediction an example these are the
    distribution's views (Wu et al. 2023, section 3.2). With several (`one_each` False; an extension of the paper) each
    table has one view, F = sum over an example's rows r of -log p(y_r): of a span the log-likelihoods of its gold start
    and of its gold end, of a row of tags that of all its gold tags. A view a class would cost a backward pass each, and
    the classes of a span are its positions. Scores are sums over examples, so no map depends on the rest of a batch.

    steps: points of integrated gradients; 1 is gradient x input. top_k: features of the teacher's that count; all of
    the student's do.
    """

    def __init__(
        self, distribution: Distribution, *, one_each: bool = True, top_k: int | None = None, steps: int = 1
    ) -> None:
        super().__init__()
        self.distribution = distribution
        self.one_each = one_each
        self.top_k = top_k
        self.steps = steps

    def student_request(self) -> Request:
        return Request(logits=True, hidden=frozenset({0}), gradients=2, path=self.steps)

    def teacher_request(self) -> Request:
        return Request(logits=True, hidden=frozenset({0}), gradients=1, path=self.steps)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        terms = []
        for number, table in enumerate(student.predictions):
            own, others = _path_of(student, number), _path_of(teacher, number)
            for score in self._views(table):
                target = saliency(path_gradient(others, score).detach(), others[-1][0].detach(), self.top_k)
                gradient = path_gradient(own, score, create_graph=True)
                terms.append(attribution_loss(saliency(gradient, own[-1][0]), target, student.mask, student.weights))
        return torch.stack(terms).sum()

    def _views(self, table: Prediction) -> list[Callable[[Tensor], Tensor]]:
        assert table.target is not None
        if self.one_each:
            return self.distribution.views(table.logits.shape[-1], table.target)
        return [self.distribution.gold_view(table.target)]


def _path_of(signals: Signals, number: int) -> Path:
    """Return the path of one table of predictions."""
    points = signals.path or [(signals.hidden[0], signals.predictions)]
    return [(embedding, tables[number].table) for embedding, tables in points]
