"""What replies of several kinds share: probabilities, and the best of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def softmax(logits: "np.ndarray") -> "np.ndarray":
    """Return the probabilities of classes, (..., classes), in double precision."""
    import numpy as np

    shares = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def ranked(names: Sequence[str], probabilities: "np.ndarray", top: int) -> list[dict[str, Any]]:
    """Return the most probable labels, the best first. probabilities: (labels,), of names."""
    best = (-probabilities).argsort(kind="stable")[:top]
    return [{"label": names[i], "probability": float(probabilities[i])} for i in best]
