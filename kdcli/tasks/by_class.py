"""Scores of each class by itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ClassScores:
    """One class on one set of rows. support: how many rows have it. The others are fractions, 0 where of nothing."""

    support: int
    precision: float
    recall: float
    f1: float


ByClass = dict[str, dict[str, ClassScores]]
"""{report set: {class: its scores}}"""


def class_scores(
    labels: Sequence[str], support: "np.ndarray", given: "np.ndarray", hits: "np.ndarray"
) -> dict[str, ClassScores]:
    """Return the scores of each class that some row has or some answer names, in the order of the labels.

    support, given, hits: rows that have a class, rows that are answered with it, and both, (classes,).
    """
    counts = (column.tolist() for column in (support, given, hits))
    return {
        label: ClassScores(has, right / max(named, 1), right / max(has, 1), 2 * right / (has + named))
        for label, has, named, right in zip(labels, *counts, strict=True)
        if has or named
    }


def plain_by_class(scores: ByClass) -> dict[str, Any]:
    """Return the scores of the classes of all report sets as dictionaries."""
    return {name: {label: asdict(one) for label, one in classes.items()} for name, classes in scores.items()}
