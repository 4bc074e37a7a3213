"""Gates: limits that a user set for a result, and whether it keeps them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.errors import ExitCode

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Gate:
    """One limit: `value` must be at least `limit`, or at most. What is no finite number passes no gate.

    label: what the value is called in a message, where that is another word than the name.
    """

    name: str
    value: float | None
    limit: float
    at_most: bool = False
    label: str = ""

    @property
    def passed(self) -> bool:
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def message(self) -> str:
        """Why the gate is not met."""
        what = self.label or self.name
        if self.value is None:
            return f"there is no {what} to compare with {self.limit:g}"
        return f"{what} {self.value:.6g} is {'above' if self.at_most else 'under'} {self.limit:g}"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "passed": self.passed}


def exit_code_of(gates: Iterable[Gate]) -> ExitCode:
    """Return GATE when one of the gates is not met."""
    return ExitCode.OK if all(gate.passed for gate in gates) else ExitCode.GATE


def parity_gates(difference: float, tolerance: float | None) -> list[Gate]:
    """Return the gate that an exported graph has passed: its outputs against PyTorch's.

    tolerance: None where weights of fewer bits give other numbers, and there is no gate.
    """
    return [] if tolerance is None else [Gate("parity", difference, tolerance, at_most=True)]


@dataclass(frozen=True)
class Limits:
    """What a user asks of a student: its score, and its share of the teacher's; None where nothing is asked."""

    score: float | None = None
    retention: float | None = None

    def gates(self, metric: str, score: float, retention: float | None, *, error: bool = False) -> list[Gate]:
        """Return the gates on a score of this metric, and on the share of the teacher's score that is kept.

        error: whether less is better, so that the limit of the score is the most that it may be.
        """
        found = [Gate("score", score, self.score, at_most=error, label=metric)] if self.score is not None else []
        if self.retention is not None:
            found.append(Gate("retention", retention, self.retention))
        return found
