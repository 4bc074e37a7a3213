"""Statistics over several seeds: mean, spread, and the paired difference between two recipes."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values of one recipe over seeds. std: with n - 1; None for a single value."""

    count: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Recipe minus baseline, seed by seed. low, high: a 95 % interval of the mean; None for a single pair."""

    count: int
    mean: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, Any]:
        return {"seeds": self.count, "mean": self.mean, "low": self.low, "high": self.high}


def summarise(values: Mapping[int, float]) -> Summary | None:
    """Return mean and standard deviation of {seed: value}; None when there is no value."""
    if not values:
        return None
    numbers = list(values.values())
    return Summary(len(numbers), statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return the difference over the seeds that both have, with Student's t interval; None when they share none.

    The same seed gives both the same order of data, so that what the seed does to both leaves the difference.
    """
    pairs = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    summary = summarise(dict(enumerate(pairs)))
    if summary is None:
        return None
    if summary.std is None:
        return Difference(1, summary.mean, None, None)
    reach = float(t.ppf((1 + CONFIDENCE) / 2, summary.count - 1)) * summary.std / math.sqrt(summary.count)
    return Difference(summary.count, summary.mean, summary.mean - reach, summary.mean + reach)
