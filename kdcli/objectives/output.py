"""The output objective: the student's predictions against the teacher's (Hinton et al., 2015)."""

from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.distribution import Categorical, Distribution
from kdcli.objectives.rows import RowLoss, formed_in_parts
from kdcli.signals import Prediction, Request, Signals


def output_loss(
    student: list[Prediction],
    teacher: list[Prediction],
    distribution: Distribution,
    temperature: float = 1.0,
    *,
    scale: bool = True,
) -> Tensor:
    """Return the divergence of the student's predictions from the teacher's, mean over the tables of predictions."""
    terms = [
        distribution.divergence(own.for_teacher, other.logits, own.weights, temperature, scale=scale)
        for own, other in zip(student, teacher, strict=True)
    ]
    return sum(terms[1:], terms[0]) / len(terms)


class OutputObjective(Objective):
    """Divergence of the predicted distributions at a temperature, with the factor T^2 unless `scale` is False.

    all_positions: of a model that predicts tokens, at every real one, not only at those with a gold answer. anneal:
    let T fall to 1: epoch e of E (from 0) has the temperature T + (1 - T) e / (E - 1), one single epoch keeps T.
    Sources: Hinton et al. 2015; DistilBERT (Sanh et al. 2019), section 3; anneal: AD-KD (Wu et al. 2023), section 4.
    """

    def __init__(
        self,
        distribution: Distribution,
        temperature: float = 1.0,
        *,
        scale: bool = True,
        all_positions: bool = False,
        anneal: bool = False,
    ) -> None:
        super().__init__()
        self.distribution = distribution
        self.temperature = self.start = temperature
        self.scale = scale
        self.all_positions = all_positions
        self.anneal = anneal

    def student_request(self) -> Request:
        return Request(logits=True, all_positions=self.all_positions)

    def teacher_request(self) -> Request:
        temperatures = frozenset() if self.anneal else frozenset({self.temperature})
        return Request(logits=True, all_positions=self.all_positions, temperatures=temperatures)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if self.anneal and epochs > 1:
            self.temperature = self.start + (1.0 - self.start) * min(epoch, epochs - 1) / (epochs - 1)

    def row_losses(self, student: Signals, teacher: Signals) -> list[tuple[float, RowLoss]] | None:
        if not isinstance(self.distribution, Categorical) or not formed_in_parts(student.predictions):
            return None
        tables = list(zip(student.predictions, teacher.predictions, strict=True))
        factor = (self.temperature**2 if self.scale else 1.0) / len(tables)
        return [
            (factor, self.distribution.distance_rows(own.logits, other.logits, own.weights, self.temperature))
            for own, other in tables
        ]

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        return output_loss(
            student.predictions, teacher.predictions, self.distribution, self.temperature, scale=self.scale
        )
