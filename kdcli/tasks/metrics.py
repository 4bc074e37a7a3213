"""The metrics of GLUE and of own data, as fractions (0..1) except correlations (-1..1)."""

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from kdcli.errors import InputError

if TYPE_CHECKING:
    from kdcli.tasks.base import Task

Array = np.ndarray


def _f1(predictions: Array, labels: Array) -> float:
    """F1 of class 1 for two classes, unweighted mean over classes otherwise."""
    binary = max(int(labels.max(initial=0)), int(predictions.max(initial=0))) <= 1
    return float(sk.f1_score(labels, predictions, average="binary" if binary else "macro", zero_division=0))


def _correlation(measure: Callable[..., object]) -> Callable[[Array, Array], float]:
    def compute(predictions: Array, labels: Array) -> float:
        with warnings.catch_warnings():
            # A constant prediction has no correlation; it is worth 0, not a warning.
            warnings.simplefilter("ignore")
            value = float(measure(predictions, labels)[0])  # type: ignore[index]
        return 0.0 if np.isnan(value) else value

    return compute


CLASSIFICATION: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": lambda p, y: float(sk.accuracy_score(y, p)),
    "f1": _f1,
    "mcc": lambda p, y: float(sk.matthews_corrcoef(y, p)),
    "balanced_accuracy": lambda p, y: float(sk.balanced_accuracy_score(y, p)),
}
REGRESSION: dict[str, Callable[[Array, Array], float]] = {
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
    "mse": lambda p, y: float(sk.mean_squared_error(y, p)),
    "mae": lambda p, y: float(sk.mean_absolute_error(y, p)),
}
ERRORS = {"mse", "mae"}
"""Metrics where less is better; none of them can be a task's first metric."""


def known(kind: str) -> dict[str, Callable[[Array, Array], float]]:
    """Return the metrics that fit "classification" or "regression"."""
    return CLASSIFICATION if kind == "classification" else REGRESSION


def compute_metrics(names: Iterable[str], logits: Array, labels: Array) -> dict[str, float]:
    """Return the named metrics of predictions.

    logits: (n, classes), or (n, 1) / (n,) for regression. labels: (n,), ints or floats.
    """
    result = {}
    for name in names:
        if name in CLASSIFICATION:
            result[name] = CLASSIFICATION[name](logits.argmax(-1), labels.astype(np.int64))
        elif name in REGRESSION:
            result[name] = REGRESSION[name](logits.reshape(-1).astype(np.float64), labels.astype(np.float64))
        else:
            raise InputError(
                f"unknown metric {name!r}; known are {', '.join([*CLASSIFICATION, *REGRESSION])}",
                where="task.metrics",
            )
    return result


def chance_level(task: "Task") -> float:
    """Return what a model without any knowledge scores on the task's first metric: 0 or the largest class."""
    if task.kind == "regression" or task.primary == "mcc":
        return 0.0
    if task.primary == "balanced_accuracy":
        return 1.0 / len(task.label_names)
    labels = np.concatenate([np.asarray(rows["label"]) for rows in task.report.values()])
    counts = np.bincount(labels.astype(np.int64), minlength=len(task.label_names))
    if task.primary == "f1":
        constant = np.full_like(labels, counts.argmax())
        ones = np.ones_like(labels)
        return max(_f1(constant, labels), _f1(ones, labels) if len(task.label_names) == 2 else 0.0)
    return float(counts.max() / counts.sum())
