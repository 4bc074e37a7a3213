"""What a task is: examples with labels, and how answers to them are judged."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """A data set ready to be encoded.

    Every split has the columns index (unique in the split), text, text_pair (when `is_pair`) and label (an
    int, or a float for regression). `selection` chooses checkpoints; `report` holds the sets that are scored.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    is_pair: bool
    train: Dataset
    selection: Dataset
    report: dict[str, Dataset]
    description: dict[str, Any] = field(default_factory=dict)
