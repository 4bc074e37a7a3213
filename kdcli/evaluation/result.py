"""The result of a run: what its models score, how large they are, how much was kept. Read by attribute everywhere."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Annotated, Any

from pydantic import BeforeValidator

from kdcli.tasks.by_class import ByClass, ClassScores
from kdcli.tasks.metrics import names_of, retention_of, shown
from kdcli.words import counted

Score = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A score; JSON has no NaN, and so null stands for it."""

SCORES_OF_CLASS = ("precision", "recall", "F1")
NO_ANSWER = ClassScores(0, 0.0, 0.0, 0.0)
"""Of a class without rows, which a model never answers with."""

Metrics = dict[str, dict[str, Score]]
"""{report set: {metric: score}}"""


@dataclass(frozen=True)
class Side:
    """One model of a result: its parameters, megabytes (10^6 bytes, as its file stores them), and its scores.

    score: the first metric, mean over the report sets; None where the model was not scored, and has no metrics.
    by_class: of a classifier.
    """

    parameters: int
    megabytes: float
    metrics: Metrics
    score: float | None
    by_class: ByClass = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, float]:
        """The mean of each metric over the report sets; none where there is one set."""
        return mean_over_sets(self.metrics)

    def to_json(self) -> dict[str, Any]:
        found = {name: value for name, value in asdict(self).items() if name != "by_class" or value}
        return {**found, **({"mean": self.mean} if self.mean else {})}


@dataclass(frozen=True)
class TaskScores:
    """Scores on one task of models that were fine-tuned in the same way, one score a seed."""

    task: str
    metric: str
    scores: dict[str, list[float]]
    metrics: dict[str, list[Metrics]] = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, float]:
        return {name: mean(values) for name, values in self.scores.items()}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean}


@dataclass(frozen=True)
class Loss:
    """The distillation loss on held-out data before and after the training; None where it was not measured.

    parts: both, of each part of a task that is made of several, whose mean the loss is.
    """

    before: float | None
    after: float | None
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        return found if self.parts else {name: value for name, value in found.items() if name != "parts"}


@dataclass(frozen=True)
class Result:
    """What a run reached.

    teacher: None for a black box, of which nothing is known. rows: how many rows of each report set a score stands
    on. fewer: of each set the metrics that stand on fewer of them, with how many. loss: of a task that has no score of
    its own; finetune: the scores of what was fine-tuned from its student.
    """

    primary: str
    teacher: Side | None
    student: Side
    rows: dict[str, int] = field(default_factory=dict)
    loss: Loss | None = None
    finetune: list[TaskScores] = field(default_factory=list)
    fewer: dict[str, dict[str, int]] = field(default_factory=dict)

    def label(self, metric: str, name: str) -> str:
        """Return a metric with the report set it is of, and the rows it stands on. name: of the set."""
        return labelled(metric, name, self.rows.get(name), self.fewer.get(name))

    @property
    def retention(self) -> float | None:
        """The share of the teacher's score that the student keeps, as in `retention_of`."""
        teacher, student = self.teacher.score if self.teacher is not None else None, self.student.score
        return retention_of(self.primary, student, teacher) if student is not None and teacher is not None else None

    @property
    def compression(self) -> float | None:
        """Teacher's parameters over the student's."""
        return self.teacher.parameters / self.student.parameters if self.teacher is not None else None

    def to_json(self) -> dict[str, Any]:
        loss = self.loss
        return {
            "primary": self.primary,
            "teacher": self.teacher.to_json() if self.teacher is not None else None,
            "student": self.student.to_json(),
            "compression": self.compression,
            **(
                {"rows": self.rows, **({"fewer": self.fewer} if self.fewer else {}), "retention": self.retention}
                if loss is None
                else {
                    "loss": loss.to_json(),
                    "finetune": [scores.to_json() for scores in self.finetune],
                }
            ),
        }


def mean_over_sets(metrics: Metrics) -> dict[str, float]:
    """Return the mean of each metric over several report sets that all have it; none where there is one set."""
    if len(metrics) < 2:
        return {}
    first, *others = metrics.values()
    shared = [name for name in names_of(first) if all(name in values for values in others)]
    return {name: mean(values[name] for values in metrics.values()) for name in shared}


def tables_by_class(sides: Mapping[str, ByClass], most: int | None = None) -> dict[str, list[list[str]]]:
    """Return for each report set a table of its classes, the heading first: their rows, and each model's scores.

    sides: of each model, by what it is called. most: of more classes than these, those where the last model has the
    lowest F1.
    """
    tables = {}
    *_, last = sides.values()
    for name, classes in last.items():
        # A class without rows is told where some model answers with it.
        labels = list(dict.fromkeys(label for side in sides.values() for label in side[name]))
        if most is not None and len(labels) > most:
            labels = sorted(sorted(classes, key=lambda label: classes[label].f1)[:most], key=labels.index)
        columns = [f"{score} {side}" if len(sides) > 1 else score for score in SCORES_OF_CLASS for side in sides]
        rows = [["class", "examples", *columns]]
        for label in labels:
            own = [side[name].get(label, NO_ANSWER) for side in sides.values()]
            cells = (shown(score, getattr(one, score.lower())) for score in SCORES_OF_CLASS for one in own)
            rows.append([label, f"{max(one.support for one in own):,}", *cells])
        tables[name] = rows
    return tables


def labelled(metric: str, name: str, rows: int | None, fewer: dict[str, int] | None = None) -> str:
    """Return a metric with the report set it is of, and its rows where they are known: `accuracy (test, 20 examples)`.

    name: of the set. fewer: metrics of it that stand on fewer rows, with how many.
    """
    count = (fewer or {}).get(metric, rows)
    return f"{metric} ({name})" if count is None else f"{metric} ({name}, {counted(count, 'example')})"
