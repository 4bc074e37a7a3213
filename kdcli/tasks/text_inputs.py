"""What kinds of tasks share whose examples are one text, or a pair of texts, each with one prediction."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from kdcli.data.columns import Column, Columns, chunked, need_column, shape_of_value
from kdcli.errors import InputError
from kdcli.models.heads import Head
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.kind import Fields
from kdcli.tasks.labelled import LabelledKind
from kdcli.tasks.labels import readable
from kdcli.words import counted

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.tasks.base import Task

SEQUENCE_CLASSIFICATION = Head(
    "sequence-classification",
    "a classifier of texts",
    "classifying texts",
    "AutoModelForSequenceClassification",
    ("ForSequenceClassification",),
    "text-classification",
)


TEXTS = ("text", "text_pair")
"""The columns of rows for one text, or the two of a pair."""


IMAGES = 'images have type = "image-classification"'

SCRIPT = """\
tokenizer.enable_padding(pad_id={pad})
tokenizer.enable_truncation({length})
encodings = tokenizer.encode_batch({texts})
feed = {{node.name: np.array([getattr(e, NAMES[node.name]) for e in encodings]) for node in session.get_inputs()}}
[logits] = session.run(["logits"], feed)
"""


class TextFields(Fields):
    """The columns of own data: one or two of text, and the labels."""

    text: str | list[str] | None = Field(
        default=None,
        description="The text column of own data, or a list of two for pairs. Left out only with a task's name.",
    )
    label: str | None = Field(default=None, description="The label column. Left out, the column named label.")

    @field_validator("text")
    @classmethod
    def _one_or_two(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) not in (1, 2):
            raise ValueError("text takes one or two columns")
        return value

    @property
    def columns(self) -> list[str]:
        """The columns of text."""
        return [self.text] if isinstance(self.text, str) else list(self.text or [])

    def check(self, task: TaskSection) -> None:
        if task.is_own and self.text is None:
            other = "; or type = ..., if it is of another type: `kdcli tasks` lists all" if task.type is None else ""
            raise ValueError(f'own data needs text = "COLUMN" (or two columns){other}')
        given = [name for name in ("text", "label", "labels") if getattr(self, name, None) is not None]
        if given and not task.is_own:
            raise ValueError(f"{given[0]} = ... needs data, train or hub")


class TextKind(LabelledKind):
    """A text, or a pair of texts, with one answer. What is left to a kind are its labels, its head and its scores."""

    head = SEQUENCE_CLASSIFICATION
    text_columns = TEXTS

    def read_examples(self, columns: Columns, fields: Any, source: str) -> dict[str, Any]:
        return read_texts(columns, fields.columns, source)

    def inputs(self, fields: Any) -> dict[str, str]:
        return dict(zip(TEXTS, fields.columns or TEXTS[:1], strict=False))

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        import pyarrow as pa

        return pa.table(read_texts(columns, list(self.inputs(fields).values()), source))

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.tasks.encode import check_room

        check_room(processor, max_length, pair="text_pair" in task.train.column_names)

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        from kdcli.tasks.encode import check_room, encode

        check_room(processor, max_length, pair="text_pair" in rows.column_names)
        return encode(rows, processor, max_length)

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        from kdcli.tasks.encode import Collator

        return Collator(processor)

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str:
        pair = len(self.inputs(fields)) > 1
        texts = "list(zip(sys.argv[1::2], sys.argv[2::2]))" if pair else "sys.argv[1:]"
        return SCRIPT.format(pad=processor.pad_token_id, length=max_length, texts=texts) + self.script_of_logits(config)

    def script_of_logits(self, config: Any) -> str:
        """Return the lines of `script` that print a reply for each row of `logits`, an array (n, classes)."""
        raise NotImplementedError


def read_texts(columns: Columns, names: Sequence[str], source: str) -> "dict[str, pa.ChunkedArray]":
    """Return the columns `names` as text and text_pair. Raises InputError for a row without a text."""
    texts = text_columns(columns, names, source)
    each = zip(*(Column(column.chunks) for column in texts.values()), strict=True)
    empty = [row for row, parts in enumerate(each, 1) if not any(part.strip() for part in parts)]
    if empty:
        raise InputError(
            f"{source}: {counted(len(empty), 'row')} without text, the first is row {empty[0]}",
            where="task.text",
            hint="remove them",
        )
    return texts


def text_columns(columns: Columns, names: Sequence[str], source: str) -> "dict[str, pa.ChunkedArray]":
    """Return the columns `names` as text and text_pair. Raises InputError for a row without one of them."""
    return {target: text_column(columns, name, "text", source) for target, name in zip(TEXTS, names, strict=False)}


def text_column(columns: Columns, name: str, field: str, source: str) -> "pa.ChunkedArray":
    """Return a column as text. field: of `[task]`, which names it. Raises InputError for a row without a text."""
    import pyarrow as pa

    text = pa.large_string()
    values = need_column(columns, name, field, source)
    parts: list[pa.Array] = []
    first = 1
    for part in values.parts:
        if isinstance(part, pa.Array) and part.type in (text, pa.string()) and not part.null_count:
            parts.append(part.cast(text))
        else:
            found = _texts(Column([part]), first, name, f"task.{field}", source)
            parts += (pa.array(chunk, text) for chunk in chunked(found))
        first += len(part)
    return pa.chunked_array(parts, text)


def _texts(values: Column, first: int, name: str, where: str, source: str) -> Iterator[str]:
    """Yield the values as text. first: the number of the first row. Raises InputError for what is none."""
    for row, value in enumerate(values, first):
        if value is None or value != value:
            raise InputError(f"{source}: row {row} has no {name!r}", where=where)
        if isinstance(value, list | dict | bytes):
            raise InputError(
                f"{source}: {name!r} of row {row} is {shape_of_value(value)}, not a text",
                where=where,
                hint=IMAGES if isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value) else None,
            )
        yield readable(str(value), row, source, where)
