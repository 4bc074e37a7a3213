"""A term of a loss: an objective with its name and weight. Methods are listed and checked without torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kdcli.objectives.base import Objective

DivergenceName = Literal["kl", "reverse-kl", "js", "skew-kl", "skew-reverse-kl", "hard"]


@dataclass(frozen=True)
class Divergence:
    """How distributions over classes are compared; see `kdcli.objectives.divergence`.

    beta: share of the teacher in the mean of "js" (GKD), between 0 and 1. skew: share of the first distribution of the
    two in its mean with the other ("skew-kl": of the teacher; "skew-reverse-kl": of the student), between 0 and 1.
    """

    name: DivergenceName = "kl"
    beta: float = 0.5
    skew: float = 0.1


FORWARD_KL = Divergence()


@dataclass
class Term:
    """An objective with its name in logs and its weight in the sum."""

    name: str
    objective: "Objective"
    weight: float = 1.0
