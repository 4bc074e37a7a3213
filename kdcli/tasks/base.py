"""What a task is: examples with labels, and how answers to them are scored."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from kdcli.tasks.kind import TaskKind


@dataclass(frozen=True)
class Masking:
    """How words of a text are hidden: the share of them, and how much more often rare ones are."""

    probability: float = 0.15
    smoothing: float = 0.0


@dataclass(frozen=True)
class Task:
    """A data set ready to be encoded.

    Every split has the columns index (unique in the split), text, text_pair (when `is_pair`) and label (an
    int, or a float for regression); plain text has index and text alone, and `masking`.
    `selection` chooses checkpoints; `report` holds the sets that are scored. `notes` are what a user should know
    about the data.
    """

    name: str
    kind: "TaskKind"
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    is_pair: bool
    train: "Dataset"
    selection: "Dataset"
    report: "dict[str, Dataset]"
    masking: Masking | None = None
    description: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
