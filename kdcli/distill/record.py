"""What the run.json of a finished run says, with types: for the card, `eval`, `export` and a comparison."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from kdcli.evaluation.result import Result
from kdcli.records import Hashes, typed
from kdcli.runs import RECORD, Run
from kdcli.tasks import registry as kinds


@dataclass(frozen=True)
class MethodRecord:
    name: str
    title: str
    paper: str


@dataclass(frozen=True)
class AugmentRecord:
    """How many copies `[task.augment]` added to the training rows."""

    added: int


@dataclass(frozen=True)
class TaskRecord:
    """kind: of task, by its name. sizes: rows of each set. parts: names of those that it is made of, if any.

    left: how many of them are left, of the sets of which some are dropped as too long. remarks: what a user should know
    about rows as a model reads them.
    """

    name: str
    kind: str
    source: str
    sizes: dict[str, int]
    protocol: str
    augment: AugmentRecord | None = None
    parts: list[str] = field(default_factory=list)
    mixing_temperature: float = 1.0
    left: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def trained_on(self) -> str:
        """How many training rows there are, and how many of them are left where some are dropped."""
        count = f"{self.sizes['train']:,}"
        return f"{self.left['train']:,} of {count}" if "train" in self.left else count


@dataclass(frozen=True)
class StageRecord:
    """parameters: how many the optimizer moved."""

    parameters: int | None = None


@dataclass(frozen=True)
class ChainRecord:
    """parameters_after: of the model as chains."""

    parameters_after: int


@dataclass(frozen=True)
class VocabularyRecord:
    """Of a trimmed vocabulary, before and after: pieces, and the megabytes of all weights with a row a piece."""

    pieces: tuple[int, int]
    megabytes: tuple[float, float]


@dataclass(frozen=True)
class SecondsRecord:
    train: float
    assistant_train: Annotated[float, Field(alias="assistant train")] = 0.0


@dataclass(frozen=True)
class ParityRecord:
    max_abs_difference: float
    tolerance: float | None


@dataclass(frozen=True)
class ExportRecord:
    parity: ParityRecord


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The record of a run whose student is trained, scored and written. interrupted: as in `RunRecord`.

    teacher_settings: of the teacher's configuration, where the run has decided them.
    """

    name: str
    seed: int
    versions: dict[str, str | None]
    recipe: dict[str, Any]
    recipe_folder: str
    method: MethodRecord
    task: TaskRecord
    result: Result
    teacher_origin: str
    teacher_path: str | None
    teacher_settings: dict[str, Any] = field(default_factory=dict)
    student_form: str
    student_head: str
    training: list[StageRecord]
    seconds: SecondsRecord
    hashes: Hashes
    overparam: ChainRecord | None
    vocabulary: VocabularyRecord | None = None
    export: ExportRecord | None = None
    interrupted: bool = False

    @property
    def is_general(self) -> bool:
        """True where the student is a general one, which is used through what is fine-tuned from it."""
        return self.result.loss is not None and kinds.get(self.task.kind).general

    @property
    def is_plain(self) -> bool:
        """True when the student's files are those of a plain transformers model."""
        return self.student_form in ("depth", "width", "checkpoint")


def finished(run: Run) -> FinishedRun:
    """Return the record of a finished run. Raises InputError, naming the field, where something is missing."""
    return finished_of(run.document, run)


def finished_of(document: dict[str, Any], run: Run) -> FinishedRun:
    """Return the record that a document is: a run's own, or what is to be written."""
    return typed(FinishedRun, document, run.path / RECORD, flat="result")
