"""The gold objective: the student's predictions against the gold answers."""

from collections.abc import Mapping

from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.distribution import Categorical, Distribution
from kdcli.objectives.rows import RowLoss, formed_in_parts
from kdcli.signals import Prediction, Request, Signals


def gold_loss(predictions: list[Prediction], distribution: Distribution) -> Tensor:
    """Return the negative log-likelihood of the gold answers, mean over the tables of predictions."""
    terms = []
    for table in predictions:
        logits = table.for_gold if table.answered is None else table.for_gold[table.answered]
        weights = table.weights if table.answered is None else table.target_weights
        terms.append(distribution.nll(logits, gold_of(table), weights))
    return sum(terms[1:], terms[0]) / len(terms)


def gold_of(table: Prediction) -> Tensor:
    """Return the gold answers of a table, which has some."""
    assert table.target is not None
    return table.target


def _on_all_rows(table: Prediction) -> tuple[Tensor, Tensor | None]:
    """Return a target and a weight of each row, so that all rows can be formed once: rows without an answer weigh 0."""
    target, weights = gold_of(table), table.weights
    if table.answered is None:
        return target, weights
    assert table.target_weights is not None
    n = len(table.logits)
    return (
        target.new_zeros(n).index_put((table.answered,), target),
        table.target_weights.new_zeros(n).index_put((table.answered,), table.target_weights),
    )


class GoldObjective(Objective):
    """Negative log-likelihood of the gold answers: cross-entropy, squared error, ... as the distribution has it."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.distribution = distribution

    def student_request(self) -> Request:
        return Request(logits=True)

    def teacher_request(self) -> Request:
        return Request()

    def row_losses(self, student: Signals, teacher: Signals) -> list[tuple[float, RowLoss]] | None:
        tables = student.predictions
        if not isinstance(self.distribution, Categorical) or not formed_in_parts(tables):
            return None
        rows = [(table.logits, *_on_all_rows(table)) for table in tables]
        return [(1.0 / len(tables), self.distribution.nll_rows(*found)) for found in rows]

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        return gold_loss(student.predictions, self.distribution)
