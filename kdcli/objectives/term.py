"""A term of a loss: an objective with its name and weight. Methods are listed and checked without torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcli.objectives.base import Objective


@dataclass
class Term:
    """An objective with its name in logs and its weight in the sum."""

    name: str
    objective: "Objective"
    weight: float = 1.0
