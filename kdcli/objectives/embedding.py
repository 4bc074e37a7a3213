"""Objectives of embeddings: each one beside the teacher's, and how those of a batch are alike."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcli.objectives.base import Objective
from kdcli.signals import Prediction, Request, Signals


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return |s - t|^2 / |t|^2, mean over rows; of unit vectors 2 (1 - cos). student, teacher: (n, width).

    A mean over features, as in Reimers and Gurevych 2020 (arXiv 2004.09813, equation 1), would shrink with the width:
    divided by the size of the teacher's it has one scale for every model.
    """
    student, teacher = student.float(), teacher.detach().float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)).mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cos, mean over rows. student, teacher: (n, width)."""
    return (1.0 - functional.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()


def similarity_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of how alike each row is to the others, mean over rows.

    A row's distribution is the softmax of its cosine with every other row, divided by the temperature; the row itself
    is none of them. student, teacher: (n, width), of any two widths; 0 for fewer than two rows. In fp32.
    Sources: conditional probabilities over the others of a batch, Passalis and Tefas 2018 (PKT, arXiv 1803.10837,
    equations 2-5); softmax of cosines at a temperature, Fang et al. 2021 (SEED, arXiv 2101.04731, equations 3-5).
    """
    if len(student) < 2:
        # Still a part of the graph, so that every parameter gets a gradient.
        return student.float().sum() * 0.0
    own, other = (_log_similarities(rows, temperature) for rows in (student, teacher.detach()))
    return functional.kl_div(own, other, reduction="batchmean", log_target=True)


def _log_similarities(rows: Tensor, temperature: float) -> Tensor:
    """Return the logarithms of each row's distribution over the others, (n, n - 1)."""
    count = len(rows)
    unit = functional.normalize(rows.float(), dim=-1)
    others = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    return torch.log_softmax((unit @ unit.mT)[others].view(count, count - 1) / temperature, dim=-1)


class EmbeddingObjective(Objective):
    """A distance of the student's embeddings from the teacher's, row by row.

    measure: `squared_distance` or `cosine_distance`. bridge: a learned linear map from the student's width to the
    teacher's that comes before the comparison; objectives may share one. keep: it becomes a part of the student.
    """

    def __init__(
        self, measure: Callable[[Tensor, Tensor], Tensor], *, bridge: nn.Linear | None = None, keep: bool = False
    ) -> None:
        super().__init__()
        self.measure = measure
        self.bridge = bridge
        self.keep = keep

    @property
    def kept(self) -> nn.Linear | None:
        return self.bridge if self.keep else None

    def student_request(self) -> Request:
        return Request(logits=True)

    def teacher_request(self) -> Request:
        return Request(logits=True)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        own = _embeddings(student.predictions)
        return self.measure(own if self.bridge is None else self.bridge(own.float()), _embeddings(teacher.predictions))


class SimilarityObjective(Objective):
    """`similarity_kl` of the embeddings of a batch.

    A batch is what one process works on at a time: with gradient accumulation and on several devices rows are compared
    within their part of the step, and the mean is taken over the parts. It is the only objective that other batch
    sizes on a device change.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def student_request(self) -> Request:
        return Request(logits=True)

    def teacher_request(self) -> Request:
        return Request(logits=True)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        return similarity_kl(_embeddings(student.predictions), _embeddings(teacher.predictions), self.temperature)


def _embeddings(predictions: list[Prediction]) -> Tensor:
    (table,) = predictions
    return table.table
