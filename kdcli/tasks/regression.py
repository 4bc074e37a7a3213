"""Regression: a number for a text, or for a pair of texts."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.data.columns import Column, Columns
from kdcli.errors import InputError
from kdcli.tasks.labelled import gold
from kdcli.tasks.labels import check_problem, label_column
from kdcli.tasks.numbers import are_numbers, different, number_of
from kdcli.tasks.text_inputs import TextFields, TextKind
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from kdcli.objectives.distribution import Distribution
    from kdcli.tasks.base import Owner


class Regression(TextKind):
    """A number."""

    name = "regression"
    title = "a number"
    fields = TextFields
    provides = frozenset({"labels", "one-per-example", "text"})
    metrics = ("pearson", "spearman", "mse", "mae")
    usual_metrics = ("pearson", "spearman")
    errors = frozenset({"mse", "mae"})
    answer = "score"

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Normal

        return Normal()

    def recognises(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> bool:
        """True for numbers with fractions among them."""
        given = different(columns.get(fields.label or "label", Column()))
        return are_numbers(given) and not all(float(value).is_integer() for value in given)

    def read_labels(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None
    ) -> tuple[list[float], tuple[str, ...]]:
        numbers = [
            number_of(value, f"{source}: row {row}: the label of a regression")
            for row, value in enumerate(label_column(columns, fields.label, source), 1)
        ]
        if labels is None and len(set(numbers)) < 2:
            raise InputError(f"{source}: all labels are equal: there is nothing to learn", where="task.label")
        return numbers, ()

    def labels_for(
        self, config: Any, columns: Columns, fields: Any, source: str, notes: list[str], names: Sequence[str] | None
    ) -> tuple[list[float], tuple[str, ...]]:
        return self.read_labels(columns, fields, source, notes, ())

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def fits(self, config: Any) -> bool:
        return config.problem_type in (None, "regression") and config.num_labels == 1

    def align(self, model: Any, labels: Sequence[str], owner: "Owner", names: Sequence[str] | None = None) -> Any:
        check_problem(model.config, "regression", owner)
        if model.config.num_labels != 1:
            raise InputError(
                f"the task is a regression, but {owner.name} has {counted(model.config.num_labels, 'output')}",
                where=owner.model,
                hint=owner.remedy,
            )
        return model

    def decode(self, outputs: dict[str, Any], features: "Dataset", rows: "Dataset") -> "np.ndarray":
        """Return the numbers, (n,), in double precision."""
        return outputs["logits"].reshape(-1).astype("float64")

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return the score of each row; there is no second best."""
        return [{"score": float(number)} for number in self.answers(model, rows, processor, **options)]

    def script_of_logits(self, config: Any) -> str:
        return 'for row in logits:\n    print(json.dumps({"score": float(row[0])}))\n'

    def show(self, reply: dict[str, Any]) -> str:
        return f"{reply['score']:.3f}"

    def beside(self, reply: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        return {"difference": reply["score"] - other["score"]}

    def score(
        self, answers: "np.ndarray", rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]
    ) -> dict[str, float]:
        truth = gold(rows).astype("float64")
        return {name: METRICS[name](answers, truth) for name in metrics}

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float:
        """Return 0: no correlation."""
        return 0.0


def _correlation(measure: str) -> "Callable[[np.ndarray, np.ndarray], float]":
    def compute(answers: "np.ndarray", truth: "np.ndarray") -> float:
        from scipy import stats

        with warnings.catch_warnings():
            # A constant prediction has no correlation, nor has a single one; they are worth 0, not a warning.
            warnings.simplefilter("ignore")
            value = float(getattr(stats, measure)(answers, truth)[0]) if len(truth) > 1 else 0.0
        return 0.0 if math.isnan(value) else value

    return compute


METRICS: "dict[str, Callable[[np.ndarray, np.ndarray], float]]" = {
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "mse": lambda p, y: float(((p - y) ** 2).mean()),
    "mae": lambda p, y: float(abs(p - y).mean()),
}

KIND = Regression()
