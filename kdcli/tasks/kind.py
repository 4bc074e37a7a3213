"""What a kind of task is: everything that is particular to it, in one object. One file of this folder a kind.

Adding a kind is writing one file with a subclass of `TaskKind` in it, its instance called `KIND`; or offering that
instance from another package as an entry point `kdcli.tasks`. No other module asks which kind a task is of.

Each kind says its name, title, head, fields, what it provides, and its metrics; and writes `distribution`, `read` (rows
from columns), `configure` (a new head), `check`, `encode` and `collator` (features and batches), `predictions` (tables
of distributions, for every objective), `decode` (answers) and `score`. For `kdcli predict` it writes `inputs` (what an
example is made of), `read_inputs` (rows without gold answers), `replies` (what a model answers, as plain values) and
`show` (a line for a terminal); for `kdcli export`, `script` (the same from an ONNX folder alone). The rest has a
default that fits most. Kinds whose examples are texts with one answer each begin with
`kdcli.tasks.text_inputs.TextKind`, as `classification.py` does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kdcli.errors import InputError
from kdcli.models.classes import class_names_of
from kdcli.models.heads import Head
from kdcli.recipe.schema import Section, TaskSection

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from rich.console import Console
    from torch import Tensor

    from kdcli.data.columns import Column, Columns
    from kdcli.data.sets import NamedSet
    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction
    from kdcli.tasks.base import Owner, Task
    from kdcli.tasks.by_class import ClassScores

CAPABILITIES = {
    "labels": "gold labels",
    "classes": "one class out of several",
    "embedding": "embeddings of texts",
    "prompts": "prompts that a model answers",
    "one-per-example": "one prediction an example",
    "images": "images",
    "text": "texts that keep their answers where words change",
    "vocabulary": "predictions over a vocabulary",
}
"""What a kind may provide and a method may need, in words that follow "needs"."""


class Fields(Section):
    """Base of a kind's own fields, which stand beside the common ones in `[task]`."""

    columns_of_rows: ClassVar[frozenset[str]] = frozenset({"text", "label"})
    """Those that name columns of a task's own rows. A `[[task.part]]` may have them in place of those of `[task]`."""
    of_parts: ClassVar[frozenset[str]] = frozenset()
    """Others that a `[[task.part]]` may have."""
    of_training: ClassVar[frozenset[str]] = frozenset()
    """Those that have no effect on a model that answers or is scored."""

    def check(self, task: TaskSection) -> None:
        """Raise ValueError where these fields do not go together with the common ones."""


@dataclass(frozen=True)
class Encoded:
    """A task as a model reads it. collator: from rows of either set to a batch."""

    train: "Dataset"
    selection: "Dataset"
    collator: Any


class TaskKind(ABC):
    """One kind of task: its data, its head, what a model predicts on it, and how that is scored.

    Rows are what was read: the columns `index`, what is shown to a model (texts in `text_columns`), and what it shall
    answer (`label`). Features are rows as a model reads them: `index`, its inputs, `labels` and `length`.
    Where a row gives several features, each has an `index` of its own, and a further column says which row it is of.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    head: ClassVar[Head]
    fields: ClassVar[type[Fields]]
    provides: ClassVar[frozenset[str]]
    """Some of `CAPABILITIES`."""
    metrics: ClassVar[tuple[str, ...]]
    """Names of all metrics that fit."""
    usual_metrics: ClassVar[tuple[str, ...]]
    """Those that are reported where a recipe names none; the first one chooses checkpoints."""
    errors: ClassVar[frozenset[str]] = frozenset()
    """Metrics where less is better; none of them can be the first where the first chooses checkpoints."""
    scored_by_loss: ClassVar[bool] = False
    """True where there is no metric: a student's only score is its distillation loss on held-out rows."""
    scored_by_outputs: ClassVar[bool] = True
    """False where `answers` needs more than the outputs of one forward pass (a model that generates, say), or held-out
    rows have no gold answers: checkpoints are then chosen by the distillation loss on held-out rows, and the metrics
    are those of what is chosen."""
    unscored: ClassVar[str | None] = None
    """What a user can do where rows have no gold answers, though there are metrics: a hint of messages."""
    general: ClassVar[bool] = False
    """True where students are general: they are not scored or exported themselves (so `scored_by_loss` is true, too),
    but fine-tuned by `[[finetune]]`, and handed over without a head that nothing trained."""
    inputs_change: ClassVar[bool] = False
    """True where inputs are drawn again in every epoch (dynamic masking): no output of the teacher may be cached."""
    outputs_are_kept: ClassVar[bool] = True
    """False where outputs are too large to be cached whole: a distribution over the vocabulary at each token."""
    tokens_weigh_equally: ClassVar[bool] = False
    """True where a step's loss is the mean over all its tokens, of all micro-batches and processes, however many an
    example has. Batches then have weights of sum 1, which the trainer scales: `prediction_weights`, a row's of the
    table of predictions, and `example_weights` (batch,), by which means over an example's tokens are averaged."""
    text_columns: ClassVar[tuple[str, ...]] = ()
    """The columns of rows that hold text, or lists of words, in their order; rows may lack some of them (the second
    text of a pair)."""
    features: ClassVar[str | None] = None
    """What features are called in a plan, where they are no rows."""
    answer: ClassVar[str] = "label"
    """The key of replies that holds the answer itself: two models agree where it is the same."""
    vector: ClassVar[str | None] = None
    """The key of replies that holds an array of as many numbers each, for a .npy file; None where there is none."""

    generates: ClassVar[bool] = False
    """True where answers are texts that a model writes token by token (`kdcli.tasks.generated`)."""
    typed_as_files: ClassVar[bool] = False
    """True where a text that is typed is the path of an input, or of a folder of inputs: replies then name each."""
    ranks: ClassVar[bool] = False
    """True where `replies` lists the best answers under "top"."""

    def with_fields(self, fields: Any) -> "TaskKind":
        """Return this kind as it works with a task's own fields, for a kind whose features or answers depend on them.

        `Task.kind` is what this returns; `self` is the kind as it is listed.
        """
        return self

    @property
    def chosen_by_loss(self) -> bool:
        """Whether checkpoints are chosen by the distillation loss on held-out rows."""
        return self.scored_by_loss or not self.scored_by_outputs

    @property
    def has_gold(self) -> bool:
        """Whether rows have gold answers: labels, or the masked tokens of plain text."""
        return not self.provides.isdisjoint({"labels", "vocabulary"})

    @property
    @abstractmethod
    def distribution(self) -> "Distribution":
        """What one row of logits parametrises."""

    # Rows and labels

    def recognises(self, columns: "Columns", fields: Any, source: str, notes: list[str]) -> bool:
        """True when data are of this kind, where a recipe does not say. notes: takes what is doubtful about that."""
        return False

    def splits(
        self, section: TaskSection, fields: Any, base: Path, notes: list[str]
    ) -> "tuple[dict[str, Columns], str]":
        """Return a user's own data: "train" and, if there are any, "validation" and "test"; and where they come from.

        base: the folder that relative paths start from. notes: takes what a user should know.
        """
        from kdcli.data.own import read_splits

        return read_splits(section, base, notes)

    def columns_of_file(self, section: TaskSection, fields: Any, notes: list[str]) -> "Columns":
        """Return the columns of the file `section.data`, whose rows a model is scored on. notes: as in `splits`."""
        from kdcli.data.files import read_file

        assert section.data is not None
        form: dict[str, Any] = {"delimiter": section.delimiter, "encoding": section.encoding}
        return read_file(Path(section.data), "--data", notes=notes, **form)

    @abstractmethod
    def read(
        self, columns: "Columns", fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        """Return the rows of one split without their index, and the names of the labels, in order.

        labels: those of the training rows, for another split; None for the training rows themselves. source: names
        the data in messages. Raises InputError, with the row, for what cannot be used.
        """

    def read_for(
        self,
        config: Any,
        columns: "Columns",
        fields: Any,
        source: str,
        notes: list[str],
        names: Sequence[str] | None,
        form: Mapping[str, Any],
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        """Return rows whose labels are a model's own, by its configuration.

        names: what a user calls the labels. form: the `delimiter` and `encoding` of further files that fields name.
        """
        return self.read(columns, fields, source, notes, tuple(names or class_names_of(config)))

    def has_answers(self, columns: "Columns", fields: Any) -> bool:
        """False for a split without gold answers, such as some test sets on the hub."""
        return True

    def reads(self, named: "NamedSet") -> bool:
        """Return whether a set that recipes name has rows of this kind."""
        return named.kind == self.name

    def is_scored(self, rows: "pa.Table") -> bool:
        """Return whether models can be scored on held-out rows: these have gold answers."""
        return True

    def draw(self, rows: "pa.Table", size: int | None, seed: int) -> "pa.Table":
        """Return a fixed random subset of rows that are scored; None takes all."""
        from kdcli.data.tables import subset

        return subset(rows, size, seed)

    def hold_out(self, rows: "pa.Table", fraction: float, seed: int) -> "tuple[pa.Table, pa.Table]":
        """Return a seeded split of the training rows, for data without a validation set."""
        from kdcli.data.tables import split

        return split(rows, fraction, seed, self.strata(rows))

    def calibration(self, train: "pa.Table") -> float:
        """Return the share of the training rows that no model is trained on: those that `calibrate` is given."""
        return 0.0

    def metrics_for(self, labels: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return which metrics fit a task with these labels, and the usual ones among them."""
        return self.metrics, self.usual_metrics

    def strata(self, rows: "pa.Table") -> "np.ndarray | None":
        """Return whole numbers (n,) whose shares a split shall keep; None for none."""
        return None

    def join(self, labels: "Sequence[tuple[str, ...]]") -> tuple[str, ...]:
        """Return the labels of all parts of a task together, in order. labels: of the training rows of each."""
        from kdcli.tasks.labels import in_order

        first, *others = labels
        return first if all(other == first for other in others) else in_order(set().union(*labels))

    def count(self, rows: Any, labels: Sequence[str]) -> "np.ndarray | None":
        """Return how many rows have each of the labels; None where rows have no such labels."""
        return None

    # A model for these labels

    @abstractmethod
    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the settings of a new head's configuration: id2label, label2id, problem_type."""

    def fits(self, config: Any) -> bool:
        """True when a model with this kind's head, by its configuration, was trained on such a task."""
        return True

    def claims(self, processor: Any) -> bool:
        """False where a model beside this processor is more likely one for another kind with the same head.

        Only asked where neither a user nor a run says which.
        """
        return True

    def align(self, model: Any, labels: Sequence[str], owner: "Owner", names: Sequence[str] | None = None) -> Any:
        """Return a trained model with its outputs in the order of the labels: a PyTorch model in place.

        names: what a user says its outputs are. Raises InputError where they are not these labels.
        """
        return model

    # What a model reads

    def processor(self, processor: Any) -> Any:
        """Return a processor as it is saved beside models of this kind, so that other programs read rows alike."""
        return processor

    @abstractmethod
    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        """Raise InputError where rows cannot be encoded, or nothing of them would be left; encodes a few at most."""

    def remarks(self, task: "Task", processor: Any, max_length: int) -> list[str]:
        """Return what a user should know about rows as a model reads them; encodes few of them."""
        return self.remarks_on_report(task, processor, max_length)

    def remarks_on_report(self, task: "Task", processor: Any, max_length: int) -> list[str]:
        """Return what a user should know about the rows that are scored, as a model reads them: a part of `remarks`."""
        return []

    @abstractmethod
    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return rows as features. processor: a tokenizer, or an image processor."""

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], "dict[str, Tensor]"]:
        """Return the function from features to a batch."""

    def prepare(self, task: "Task", processor: Any, max_length: int, *, seed: int = 0) -> Encoded:
        """Return a task's rows as features. seed: of what is drawn while encoding."""
        train, selection = (self.feed(rows, processor, max_length) for rows in (task.train, task.selection))
        return Encoded(train, selection, self.collator(processor))

    def prepare_sample(self, task: "Task", processor: Any, max_length: int, *, seed: int = 0) -> Encoded:
        """Return a few rows of a task as features, for what is computed of a model before it is trained."""
        return self.prepare(task, processor, max_length, seed=seed)

    def feed(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return rows as features; those of the parts of a task one part after the other, with the column `part`."""
        from kdcli.tasks.parts import encode

        return encode(partial(self.encode, processor=processor, max_length=max_length), rows)

    def texts(self, rows: "Dataset") -> "Iterator[str]":
        """Yield all text of rows, for a tokenizer that is made from it."""
        from kdcli.data.rows import values_of

        return (text for name in self.columns_of_text(rows) for text in values_of(rows, name))

    def texts_read(self, rows: "Dataset", processor: Any) -> "Iterator[str]":
        """Yield all text of rows as the tokenizer `processor` gets it, with what a task writes around it."""
        return self.texts(rows)

    def columns_of_text(self, rows: "Dataset") -> list[str]:
        """Return which of `text_columns` rows have."""
        return [name for name in self.text_columns if name in rows.column_names]

    def examples(self, rows: "Dataset", processor: Any, max_length: int) -> int:
        """Return how many features `encode` makes of rows: the examples whose batches make the steps of a run."""
        return len(rows)

    def scored(self, rows: Any) -> int:
        """Return how many examples a score on rows is of. rows: a table or a data set."""
        return len(rows)

    def fewer(self, rows: "Dataset", processor: Any, max_length: int, metrics: Sequence[str]) -> dict[str, int]:
        """Return those of the metrics that are of fewer examples than `scored` says, with how many."""
        return {}

    def drawn(self, fields: Any) -> dict[str, Any]:
        """Return the fields that change what a model reads, or what is decided about it, though rows stay the same."""
        return {}

    def token_counts(self, features: "Dataset") -> "np.ndarray":
        """Return how many tokens of each feature are predicted, and how many are real, (n, 2).

        Only asked for where `tokens_weigh_equally`.
        """
        raise NotImplementedError

    # What a model predicts

    def positions(self, batch: "Mapping[str, Tensor]", *, everywhere: bool = False) -> "Tensor | None":
        """Return the flat positions (of batch x seq) at which the head has to run; None where it runs on all.

        everywhere: at all real tokens, not only at those with a gold answer.
        """
        return None

    @abstractmethod
    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return the tables of predictions that a model's output holds; as many for every model and batch.

        output: of a forward pass, with the head's `outputs` as attributes. Where `positions` gives some, its
        logits may be those of these positions alone, (1, positions, classes).
        """

    def answers(self, model: Any, rows: "Dataset", processor: Any, *, max_length: int, ask: Any, **options: Any) -> Any:
        """Return a model's answer to each row. ask, options: `predict` or what does the same, and its options."""
        outputs, features = self.outputs(model, rows, processor, max_length=max_length, ask=ask, **options)
        return self.decode(outputs, features, rows)

    def outputs(
        self, model: Any, rows: "Dataset", processor: Any, *, max_length: int, ask: Any, **options: Any
    ) -> "tuple[dict[str, Any], Dataset]":
        """Return a model's outputs by name for all features of rows, and those. ask, options: as in `answers`."""
        features = self.encode(rows, processor, max_length)
        form = {"outputs": self.head.outputs, "per_token": self.head.per_token}
        return ask(model, features, self.collator(processor), **form, **options), features

    def decode(self, outputs: "dict[str, Any]", features: "Dataset", rows: "Dataset") -> Any:
        """Return an answer a row, in any form that `score` takes. outputs: of `predict`, by name."""
        raise NotImplementedError(f"{self.name} is scored by its loss")

    def score(self, answers: Any, rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
        """Return the named metrics of answers to rows, and others that belong to one of them (`f1/person`)."""
        raise NotImplementedError(f"{self.name} is scored by its loss")

    def by_class(self, answers: Any, rows: "Dataset", labels: Sequence[str]) -> "dict[str, ClassScores]":
        """Return the scores of each class by itself; none where rows have no classes."""
        return {}

    def evaluate(
        self,
        model: Any,
        rows: "Dataset",
        processor: Any,
        labels: Sequence[str],
        metrics: Sequence[str],
        *,
        max_length: int,
        ask: Any,
        generate: "Callable[..., list[list[int]]] | None" = None,
        console: "Console | None" = None,
        by_class: "dict[str, ClassScores] | None" = None,
        **options: Any,
    ) -> dict[str, float]:
        """Return the named metrics of a model on rows, as `score` does. ask, options: as in `answers`.

        by_class: takes the scores of each class, where the kind has classes.
        generate: does what `kdcli.models.generation.generate` does, on a `device`; for kinds whose models write texts.
        console: is told of progress, where answers take long.
        """
        answers = self.answers(model, rows, processor, max_length=max_length, ask=ask, **options)
        if by_class is not None:
            by_class |= self.by_class(answers, rows, labels)
        return self.score(answers, rows, labels, metrics)

    def calibrate(self, model: Any, rows: "Dataset", processor: Any, **options: Any) -> dict[str, Any]:
        """Return what is decided about a trained model, as settings of its configuration: plain values by name.

        rows: none that a run trains a model on or reports. options: as in `answers`.
        """
        return {}

    def chance(self, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> float | None:
        """Return the mean over sets that answers without any knowledge reach; None where that is not known."""
        return None

    def doubt(self, score: float, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> str | None:
        """Return why a model with this score on sets has nothing to teach, and what may be wrong; None where it may."""
        chance = self.chance(sets, labels, metric)
        if chance is None or score > chance + 0.02:
            return None
        named = ", and are its classes named in their order (id2label in its config.json)" if labels else ""
        return (
            f"no better than chance ({chance:.4f}). A student cannot learn the task from it. Is the model fine-tuned "
            f"on this task{named}?"
        )

    # What a model answers to examples without gold answers

    def inputs(self, fields: Any) -> dict[str, str]:
        """Return what an example is made of, in order, by its name in rows; each with the column of own data it is in.

        A text that is typed stands for one of them: several are given one after the other.
        """
        raise InputError(self._unasked)

    def optional_inputs(self, fields: Any) -> frozenset[str]:
        """Return which of `inputs` an example may lack; a text that is typed stands for none of these."""
        return frozenset()

    def typed(self, texts: Sequence[str], where: str, notes: list[str], folder: Path | None = None) -> "Column":
        """Return the inputs that texts stand for, which a user typed or wrote in lines, for `read_inputs`.

        where: what names them in messages. folder: that paths start from; None is the working folder.
        """
        from kdcli.data.columns import Column

        return Column.of(texts)

    def columns_of_inputs(self, path: Path, section: TaskSection, fields: Any, notes: list[str]) -> "Columns":
        """Return the columns of a file of examples. section: says how text files are written."""
        from kdcli.data.files import read_file

        form: dict[str, Any] = {"delimiter": section.delimiter, "encoding": section.encoding}
        return read_file(path, "--input", beside=(".txt",), notes=notes, **form)

    def shown_inputs(self, rows: "pa.Table", fields: Any) -> list[dict[str, Any]]:
        """Return what was given of each row, by the names of `inputs`. rows: of `read_inputs`."""
        return rows.select([name for name in self.inputs(fields) if name in rows.column_names]).to_pylist()

    def read_inputs(self, columns: "Columns", fields: Any, source: str, notes: list[str]) -> "pa.Table":
        """Return rows as `read` does, without gold answers, also where the data has some. The arguments are its own.

        columns: those that `inputs` names, and others. `encode` takes such rows, too.
        """
        raise InputError(self._unasked)

    def replies(
        self, model: Any, rows: "Dataset", processor: Any, *, top: int | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """Return what a model answers to each row, in the types that JSON has; all replies have the same keys.

        `answer` is one of the keys; under `vector` stands an array. top: how many of the best answers are listed under
        the key "top", each with its probability or score, the best first; None leaves the key out. The answer that is
        chosen may be another one than the first (by a threshold, say). Only asked for where `ranks` is True.
        options: as in `answers`.
        """
        raise InputError(self._unasked)

    def show(self, reply: dict[str, Any]) -> str:
        """Return a reply as one line for people, without its "top"."""
        return str(reply[self.answer])

    def show_entry(self, entry: dict[str, Any]) -> str:
        """Return an entry of a reply's "top" as one line for people."""
        return " ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in entry.values())

    def beside(self, reply: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        """Return how a reply compares with another model's to the same row: whether they agree, or by how much not."""
        return {"agree": reply[self.answer] == other[self.answer]}

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str | None:
        """Return Python lines that answer texts with an exported graph, as JSON lines; None where there are none.

        They follow `HEAD` of `kdcli.export.script`, which defines what they begin with: `tokenizer`, `session`, and
        `NAMES`, the attribute of an encoding for each input of the graph; lines that import modules go before it.
        Both together have at most 20 lines, and use no library but NumPy beside what the head imports. The texts are
        the script's arguments, one after the other as in `inputs`; the replies have the main keys of `replies`.
        Of images, the head imports Pillow's `Image` and `ImageOps`, not a tokenizer, and the arguments are files.
        Raises InputError, with the reason, where pixels cannot be made as the image processor makes them.
        """
        return None

    @property
    def _unasked(self) -> str:
        return f"models of {self.name} tasks are not asked for answers"
