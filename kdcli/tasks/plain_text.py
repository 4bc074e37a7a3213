"""Plain text: documents packed into blocks, whatever a model predicts of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from kdcli.data.columns import Column, Columns
from kdcli.errors import InputError
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.kind import Fields, TaskKind

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from kdcli.objectives.distribution import Distribution
    from kdcli.tasks.base import Task


class PlainTextFields(Fields):
    """The column of text."""

    text: str | list[str] | None = Field(
        default=None, description="The text column of tables. Left out, the column named text."
    )

    @field_validator("text")
    @classmethod
    def _one(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) != 1:
            raise ValueError("plain text takes one text column")
        return value

    @property
    def column(self) -> str:
        """The column of text."""
        return self.text[0] if isinstance(self.text, list) else self.text or "text"


class PlainText(TaskKind):
    """Documents, one after the other in blocks. What is predicted is a token, out of the vocabulary."""

    text_columns = ("text",)
    closed: ClassVar[bool] = True
    """Whether blocks have the special tokens that the tokenizer puts behind a text."""
    features = "blocks"

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    def splits(self, section: TaskSection, fields: Any, base: Path, notes: list[str]) -> tuple[dict[str, Columns], str]:
        from kdcli.data import documents

        found, source = documents.read_documents(section, fields.column, base, notes)
        return {name: {"text": Column.of(texts)} for name, texts in found.items() if texts or name == "train"}, source

    def columns_of_file(self, section: TaskSection, fields: Any, notes: list[str]) -> Columns:
        from kdcli.data import documents

        assert section.data is not None
        texts = documents.read_texts(Path(section.data), section, fields.column, "--data", notes)
        return {"text": Column.of(texts)}

    def read(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        from kdcli.data.tables import table_of

        if not len(columns["text"]):
            raise InputError(f"{source} has no text", where="task")
        return table_of({"text": columns["text"]}), ()

    def hold_out(self, rows: "pa.Table", fraction: float, seed: int) -> "tuple[pa.Table, pa.Table]":
        """Return a seeded split of documents; of a few documents, of their paragraphs."""
        from kdcli.data import documents
        from kdcli.data.tables import table_of

        found = documents.hold_out(rows.column("text").to_pylist(), fraction, seed)
        return table_of({"text": found["train"]}), table_of({"text": found["validation"]})

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.data.rows import values_of
        from kdcli.tasks.packing import check_packing
        from kdcli.tasks.parts import sets_of

        for rows in (task.train, task.selection):
            for part in sets_of(rows):
                check_packing(values_of(part, "text"), processor, max_length)

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return documents packed into blocks."""
        from kdcli.data.rows import values_of
        from kdcli.tasks.packing import pack

        return pack(values_of(rows, "text"), processor, max_length, closed=self.closed)

    def examples(self, rows: "Dataset", processor: Any, max_length: int) -> int:
        return len(self.encode(rows, processor, max_length))

    def inputs(self, fields: Any) -> dict[str, str]:
        return {"text": fields.column}

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        import pyarrow as pa

        from kdcli.tasks.text_inputs import read_texts

        return pa.table(read_texts(columns, [fields.column], source))
