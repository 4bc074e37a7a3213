"""The gold objective: the student's predictions against the gold answers."""

from collections.abc import Mapping

from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.distribution import Distribution
from kdcli.signals import Prediction, Request, Signals


def gold_loss(predictions: list[Prediction], distribution: Distribution) -> Tensor:
    """Return the negative log-likelihood of the gold answers, mean over the tables of predictions."""
    terms = []
    for table in predictions:
        assert table.target is not None
        logits = table.logits if table.answered is None else table.logits[table.answered]
        weights = table.weights if table.answered is None else table.target_weights
        terms.append(distribution.nll(logits, table.target, weights))
    return sum(terms[1:], terms[0]) / len(terms)


class GoldObjective(Objective):
    """Negative log-likelihood of the gold answers: cross-entropy, squared error, ... as the distribution has it."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution

    def student_request(self) -> Request:
        return Request(logits=True)

    def teacher_request(self) -> Request:
        return Request()

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        return gold_loss(student.predictions, self.distribution)
