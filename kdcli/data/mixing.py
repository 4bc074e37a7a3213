"""How much each of several sets is trained on."""

from collections.abc import Sequence

import numpy as np


def shares(counts: Sequence[int], temperature: float) -> np.ndarray:
    """Return the share of each set of `counts` examples, in proportion to n^(1 / temperature); they sum to 1.

    1 gives every example the same weight; the higher it is, the more the sets weigh alike. The exponent 1 / temperature
    is alpha of XLM (0.5; Lample and Conneau 2019, arXiv 1901.07291, section 3.1) and of XLM-R (0.3; Conneau et al.
    2020, arXiv 1911.02116, section 3), and S of multilingual BERT (0.7; multilingual.md of google-research/bert).
    """
    weights = np.asarray(counts, np.float64) ** (1.0 / temperature)
    return weights / weights.sum()


def quotas(total: int, weights: Sequence[float] | np.ndarray) -> list[int]:
    """Return whole numbers in proportion to weights that sum to `total`: the largest remainders are rounded up."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    found = np.floor(exact + 1e-9).astype(np.int64)
    last = np.argsort(-(exact - found), kind="stable")[: total - int(found.sum())]
    found[last] += 1
    return found.tolist()


def apportioned(total: int | None, counts: Sequence[int]) -> list[int]:
    """Return how many of each set's examples make `total`, which keeps their shares; all of them where it is None.

    No set is left without any.
    """
    if total is None or total >= sum(counts):
        return list(counts)
    return [max(1, size) for size in quotas(total, counts)]
