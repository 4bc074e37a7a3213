"""The examples that `kdcli predict` answers: from its arguments, a file, or standard input."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.cli.choose import hint_with_options, option_of
from kdcli.data.columns import Column, Columns
from kdcli.errors import InputError, cut
from kdcli.files import expanded
from kdcli.recipe.load import parts_of
from kdcli.words import counted

if TYPE_CHECKING:
    import pyarrow as pa

    from kdcli.recipe.schema import TaskSection
    from kdcli.tasks.kind import TaskKind

STDIN = "-"
OPTIONS = frozenset({"text", "max_length"})
"""Fields of `[task]` that have an option of their own."""


@dataclass
class Examples:
    """Reads examples as rows of a kind of task. fixed: the inputs that are the same in all of them, by name.

    Raises InputError for an input that examples of this kind do not have.
    """

    kind: "TaskKind"
    fields: Any
    fixed: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inputs = self.kind.inputs(self.fields)
        if unknown := [name for name in self.fixed if name not in self.inputs]:
            raise InputError(
                f"an example here has no {unknown[0]!r}: it is made of {' and '.join(self.inputs)}", where="--with"
            )
        optional = self.kind.optional_inputs(self.fields)
        self.asked = [name for name in self.inputs if name not in self.fixed and name not in optional]

    def of_texts(self, texts: Sequence[str]) -> "pa.Table":
        """Return the rows that texts are, each as many of them one after the other as an example needs."""
        size = len(self.asked)
        if not size and not texts:
            return self._rows({}, "--with", 1)
        if not size or len(texts) % size:
            raise InputError(
                f"{counted(len(texts), 'text')}, and an example takes {size}: {' and '.join(self.asked) or 'none'}",
                where="TEXT",
                hint="quote each text; one that is the same for all: --with NAME=TEXT",
            )
        columns = {self.inputs[name]: self._typed(texts[place::size], "TEXT") for place, name in enumerate(self.asked)}
        return self._rows(columns, "TEXT", len(texts) // size)

    def of_file(self, path: Path, section: "TaskSection") -> "pa.Table":
        """Return the rows of a table in a file. section: says how CSV is written."""
        columns = self.kind.columns_of_inputs(path, section, self.fields, self.notes)
        return self._rows(columns, str(path), len(next(iter(columns.values()))))

    def of_lines(self, place: str, encoding: str | None, size: int, *, as_json: bool = False) -> "Iterator[pa.Table]":
        """Yield rows of at most `size` lines of a file, or of standard input ("-").

        as_json: each line is a JSON object with the inputs, or, where an example has one, that input.
        """
        if not as_json and len(self.asked) != 1:
            raise InputError(
                f"a line is one text, and an example takes {len(self.asked)}: {' and '.join(self.asked) or 'none'}",
                where="--input",
                hint="write a table with a column each (.csv, .jsonl, .parquet), or give one that is the same for all: "
                "--with NAME=TEXT; standard input takes objects with --json-input",
            )
        source = "standard input" if place == STDIN else place
        lines = enumerate(_lines(place, encoding, source), 1)
        first = 1
        # Paths in a file start at its folder, as in a table.
        folder = None if place == STDIN else Path(place).parent
        while chunk := list(islice(lines, size)):
            columns = self._objects(chunk, source) if as_json else self._plain(chunk, source, folder)
            yield self._rows(columns, f"{source} from line {first}", len(chunk))
            first += len(chunk)
        if first == 1:
            raise InputError(f"{source} has no lines", where="--input")

    def shown(self, rows: "pa.Table") -> list[dict[str, Any]]:
        """Return the inputs of each row, by their names."""
        return self.kind.shown_inputs(rows, self.fields)

    def _typed(self, texts: Sequence[str], where: str, folder: Path | None = None) -> Column:
        return self.kind.typed(texts, where, self.notes, folder)

    def _plain(self, lines: list[tuple[int, str]], source: str, folder: Path | None) -> Columns:
        for number, line in lines:
            if not line.strip():
                raise InputError(f"{source}:{number} is empty", where="--input", hint="each line is an example")
        return {self.inputs[self.asked[0]]: self._typed([line for _, line in lines], "--input", folder)}

    def _objects(self, lines: list[tuple[int, str]], source: str) -> Columns:
        rows = []
        for number, line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}:{number} is not valid JSON: {error}", where="--json-input") from error
            if not isinstance(row, dict) and len(self.asked) == 1:
                row = {self.inputs[self.asked[0]]: row}
            if not isinstance(row, dict):
                raise InputError(f"{source}:{number} is no JSON object", where="--json-input")
            rows.append(row)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: Column.of(row.get(name) for row in rows) for name in names}

    def _rows(self, columns: Columns, source: str, size: int) -> "pa.Table":
        fixed = {self.inputs[name]: Column.of(repeat(text, size)) for name, text in self.fixed.items()}
        return self.kind.read_inputs({**columns, **fixed}, self.fields, source, self.notes)


def _lines(place: str, encoding: str | None, source: str) -> Iterator[str]:
    """Yield the lines of a file or of standard input. Raises InputError for bytes that are no text."""
    from kdcli.data.files import check_exists, open_text, undecodable

    if place != STDIN:
        check_exists(path := Path(place), "--input")
        try:
            with open_text(path, encoding) as file:
                yield from (line.removesuffix("\n") for line in file)
        except UnicodeError as error:
            raise undecodable(path, "text", encoding, "--input") from error
        return
    if sys.stdin is None:
        raise InputError("standard input is closed", where="-")
    if hasattr(sys.stdin, "reconfigure"):
        # As files are, whatever the terminal's own encoding.
        sys.stdin.reconfigure(encoding=encoding or "utf-8-sig", errors="strict")
    number = 0
    try:
        for line in sys.stdin:
            number += 1
            yield line.removesuffix("\n")
    except UnicodeError as error:
        raise InputError(
            f"{source}: bytes behind line {number} are not {encoding or 'UTF-8'}",
            where="-",
            hint="use --encoding latin-1, if that is what it is",
        ) from error


def fixed_inputs(given: Sequence[str]) -> dict[str, str]:
    """Return what NAME=TEXT says, by name; @FILE is the text of a file. Raises InputError for what cannot be read."""
    fixed = {}
    for words in given:
        keys, text = parts_of(words, "--with", "context=@story.txt")
        if text.startswith("@"):
            path = expanded(text[1:], "--with")
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8"
                raise InputError(f"{path} cannot be read: {reason}", where=f"--with {cut(words)}") from error
        fixed[".".join(keys)] = text
    return fixed


@contextlib.contextmanager
def as_given(changes: Sequence[str], *, of_table: bool) -> Iterator[None]:
    """Let errors about a recipe's fields name the options of `predict`, or, without a table, the example alone.

    changes: FIELD=VALUE of `--set`.
    """
    try:
        yield
    except InputError as error:
        table, _, name = (error.where or "").partition(".")
        if table != "task":
            raise
        option = option_of(name, own=OPTIONS)
        changed = {change.partition("=")[0].strip() for change in changes}
        where = option if of_table or name == "max_length" or name in changed else None
        raise InputError(error.message, where=where, hint=hint_with_options(error.hint, own=OPTIONS)) from error
