"""The metrics of GLUE and of own data, as fractions (0..1) except correlations (-1..1)."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from kdcli.data.rows import array_of
from kdcli.errors import InputError

if TYPE_CHECKING:
    from kdcli.tasks.base import Task

Array = np.ndarray


def _f1(predictions: Array, labels: Array, classes: int) -> float:
    """F1 of class 1 for two classes, otherwise the unweighted mean over the classes that occur."""
    from sklearn.metrics import f1_score

    average = "binary" if classes == 2 else "macro"
    return float(f1_score(labels, predictions, average=average, zero_division=0))


def _correlation(measure: str) -> Callable[[Array, Array], float]:
    def compute(predictions: Array, labels: Array) -> float:
        from scipy import stats

        with warnings.catch_warnings():
            # A constant prediction has no correlation, nor has a single one; they are worth 0, not a warning.
            warnings.simplefilter("ignore")
            value = float(getattr(stats, measure)(predictions, labels)[0]) if len(labels) > 1 else 0.0
        return 0.0 if np.isnan(value) else value

    return compute


def _mcc(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        # Labels of one class alone are worth 0, not a warning.
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(labels, predictions))


def _balanced_accuracy(predictions: Array, labels: Array) -> float:
    """Mean over the classes that the labels have of the share that is found."""
    return float(np.mean([(predictions[labels == label] == label).mean() for label in np.unique(labels)]))


CLASSIFICATION: dict[str, Callable[[Array, Array, int], float]] = {
    "accuracy": lambda p, y, _: float(np.mean(p == y)),
    "f1": _f1,
    "mcc": lambda p, y, _: _mcc(p, y),
    "balanced_accuracy": lambda p, y, _: _balanced_accuracy(p, y),
}
"""Functions of predictions, labels and the number of classes."""

REGRESSION: dict[str, Callable[[Array, Array], float]] = {
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "mse": lambda p, y: float(np.mean((p - y) ** 2)),
    "mae": lambda p, y: float(np.mean(np.abs(p - y))),
}
ERRORS = {"mse", "mae"}
"""Metrics where less is better; none of them can be a task's first metric."""


def shown(metric: str, value: float) -> str:
    """Return a score as people read it: of 100, errors in the labels' own unit."""
    return f"{value:.3f}" if metric in ERRORS else f"{100 * value:.2f}"


def known(kind: str) -> Mapping[str, Callable[..., float]]:
    """Return the metrics that fit "classification" or "regression"."""
    return CLASSIFICATION if kind == "classification" else REGRESSION


def compute_metrics(names: Iterable[str], logits: Array, labels: Array) -> dict[str, float]:
    """Return the named metrics of predictions.

    logits: (n, classes), or (n, 1) / (n,) for regression. labels: (n,), ints or floats.
    """
    result = {}
    for name in names:
        if name in CLASSIFICATION:
            result[name] = CLASSIFICATION[name](logits.argmax(-1), labels.astype(np.int64), logits.shape[-1])
        elif name in REGRESSION:
            result[name] = REGRESSION[name](logits.reshape(-1).astype(np.float64), labels.astype(np.float64))
        else:
            raise InputError(
                f"unknown metric {name!r}; known are {', '.join([*CLASSIFICATION, *REGRESSION])}",
                where="task.metrics",
            )
    return result


def chance_level(task: "Task") -> float:
    """Return what a model without any knowledge scores on the task's first metric, mean over the report sets.

    That is 0 for a regression, else the best that one answer for everything reaches.
    """
    if task.kind.distribution.is_point:
        return 0.0
    classes = len(task.label_names)
    sets = [array_of(rows, "label").astype(np.int64) for rows in task.report.values()]
    # Class 1 is what F1 asks for; elsewhere the best constant is a set's largest class.
    answers = {1, *(int(np.bincount(labels).argmax()) for labels in sets)}
    measure = CLASSIFICATION[task.primary]
    return max(
        float(np.mean([measure(np.full_like(labels, answer), labels, classes) for labels in sets]))
        for answer in answers
    )
