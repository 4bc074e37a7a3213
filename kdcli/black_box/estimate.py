"""Logits behind decisions: what a black-box teacher must have thought to decide as it did (DBKD)."""

import numpy as np
from scipy.special import ndtr

_NODES, _WEIGHTS = np.polynomial.hermite.hermgauss(80)


def decision_probabilities(logits: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Return P(argmax_k (z_k + sigma xi_k) = i) for independent standard normal xi.

    logits: (n, classes). Returns (n, classes); rows sum to 1 up to the quadrature's error.
    P_i = integral of phi(u) prod_{j != i} Phi(u + (z_i - z_j) / sigma) du, by 80-point Gauss-Hermite.
    """
    points = np.sqrt(2.0) * _NODES
    difference = (logits[:, :, None] - logits[:, None, :]) / sigma
    classes = logits.shape[1]
    below = ndtr(points[None, None, None, :] + difference[:, :, :, None])
    below[:, np.arange(classes), np.arange(classes), :] = 1.0
    return (below.prod(axis=2) * _WEIGHTS).sum(-1) / np.sqrt(np.pi)


def logits_from_decisions(
    counts: np.ndarray, *, sigma: float = 1.0, rounds: int = 20, tolerance: float = 1e-3
) -> np.ndarray:
    """Return centred logits that explain decision counts (DBKD, section on decision-based estimation).

    counts: (n, classes), how often each class was decided on noised copies of an example. The fixed point
    z <- z + (c / m - P(z)) starts at c / m and stops after `rounds` rounds or when sum |dz| <= `tolerance`.
    A class that was never decided has no finite solution: the number of rounds defines the answer.
    """
    counts = np.asarray(counts, dtype=np.float64)
    # Which class is which does not matter: ten decisions have 42 patterns, however many classes there are.
    order = np.argsort(-counts, axis=1, kind="stable")
    patterns, inverse = np.unique(np.take_along_axis(counts, order, axis=1), axis=0, return_inverse=True)
    solved = np.stack([_solve(row / row.sum(), sigma, rounds, tolerance) for row in patterns])
    logits = np.empty_like(counts)
    np.put_along_axis(logits, order, solved[inverse.reshape(-1)], axis=1)
    return logits


def _solve(target: np.ndarray, sigma: float, rounds: int, tolerance: float) -> np.ndarray:
    logits = target.copy()
    for _ in range(rounds):
        step = target - decision_probabilities(logits[None], sigma)[0]
        logits += step
        if np.abs(step).sum() <= tolerance:
            break
    return logits - logits.mean()
