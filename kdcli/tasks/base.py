"""What a task is: rows with labels, of some kind."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

    from kdcli.tasks.kind import TaskKind


@dataclass(frozen=True)
class Task:
    """A data set ready to be encoded.

    Every split has the columns of its kind, among them index (unique in the split). fields: the kind's own fields.
    label_names: of the labels in order, none where they have no names. metrics: the first one chooses checkpoints.
    `selection` chooses checkpoints; `report` holds the sets that are scored. `calibration` are training rows that no
    model is trained on, for a kind that decides something on them. `notes` are what a user should know about the data.
    parts: names of the sets that it is made of, none where it is one; the rows of `train` and `selection` then have the
    column `part`, a number from 0. mixing_temperature: as in `kdcli.data.mixing.shares`.
    trains: False where models are only scored on it.
    """

    name: str
    kind: "TaskKind"
    fields: Any
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    train: "Dataset"
    selection: "Dataset"
    report: "dict[str, Dataset]"
    description: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration: "Dataset | None" = None
    parts: tuple[str, ...] = ()
    mixing_temperature: float = 1.0
    trains: bool = True

    @property
    def primary(self) -> str:
        """The first metric."""
        return self.metrics[0]

    @property
    def scored(self) -> dict[str, int]:
        """How many examples each reported score is of, by the name of its set."""
        return {name: self.kind.scored(rows) for name, rows in self.report.items()}

    def fewer(self, processor: Any, max_length: int) -> dict[str, dict[str, int]]:
        """Return the metrics that are of fewer examples than `scored` says, with how many, by the name of their set."""
        found = {name: self.kind.fewer(rows, processor, max_length, self.metrics) for name, rows in self.report.items()}
        return {name: counts for name, counts in found.items() if counts}

    @property
    def scored_by_loss(self) -> bool:
        """Whether the only score of a student is its distillation loss on held-out rows: nothing has gold answers."""
        return self.kind.scored_by_loss or not self.report


@dataclass(frozen=True)
class Owner:
    """A trained model whose outputs are matched with a task's labels, and the places that a message about it names.

    name: the model's. model: the field or option that names it. labels: the one that says what its outputs are, if
    any. remedy: what else would do, where it was trained on another task. notes: takes what a user should know.
    """

    name: str = "the model"
    model: str = "teacher.model"
    labels: str | None = "teacher.labels"
    remedy: str = "fine-tune it on this task: [teacher.finetune]"
    notes: list[str] = field(default_factory=list)

    @property
    def naming(self) -> str:
        """What says how its outputs are called: the field or option, else its configuration."""
        return self.labels or "id2label in its config.json"

    @property
    def example(self) -> str:
        """The same with a value."""
        if self.labels is None:
            return self.naming
        return f"{self.labels} A,B" if self.labels.startswith("--") else f"{self.labels} = [...]"
