"""Tables in files and on the hub, column by column; long columns of text are held as Arrow arrays."""

import codecs
import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from kdcli.data.columns import CHUNK, Column, Columns, chunked, packed
from kdcli.data.conll import ENDINGS, read_conll
from kdcli.data.rows import IN_MEMORY, TEXT, stored_table
from kdcli.errors import InputError
from kdcli.words import counted

READABLE = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}
READABLE |= dict.fromkeys(ENDINGS, "CoNLL")
SEPARATORS = {"CSV": (",", ";", "\t", "|"), "TSV": ("\t", ";", ",", "|")}
"""What can stand between two columns, the usual one first."""


def read_file(
    path: Path,
    where: str,
    *,
    beside: tuple[str, ...] = (),
    delimiter: str | None = None,
    encoding: str | None = None,
    notes: list[str] | None = None,
) -> Columns:
    """Return the columns of a CSV, TSV, JSON(L), Parquet or CoNLL file. Raises InputError when it cannot be read.

    beside: other kinds of files that the caller reads itself, for the message. delimiter: what stands between the
    columns of CSV and TSV; None finds it out. encoding: of text; None is UTF-8. notes: takes what a user should know.
    """
    check_exists(path, where)
    kind = READABLE.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{path.name} is none of {', '.join(sorted({*READABLE, *beside}))}",
            where=where,
            hint="rename or convert it",
        )
    try:
        if kind == "Parquet":
            # Not read_table: it says of two columns of one name only that they match.
            parquet = pyarrow.parquet.ParquetFile(path)
            schema = parquet.schema_arrow
            _check_names(path, schema.names, where)
            table = stored_table(parquet.iter_batches(_rows_at_once(parquet.metadata)), schema)
            columns = {name: Column(table.column(name).chunks) for name in schema.names}
        elif kind in SEPARATORS:
            columns = _read_csv(path, kind, delimiter, encoding, where, notes)
        elif kind == "CoNLL":
            with open_text(path, encoding) as file:
                columns = read_conll(path, file, where)
        else:
            columns = _read_json(path, kind, encoding, where)
    except UnicodeError as error:
        raise undecodable(path, kind, encoding, where) from error
    except (pa.ArrowException, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable as {kind}: {first_line(error)}", where=where) from error
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path} has no rows", where=where)
    return columns


def _rows_at_once(about: pyarrow.parquet.FileMetaData) -> int:
    """Return how many rows of a Parquet file are read at a time: fewer where they are large, as images are."""
    size = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
    return max(1, min(CHUNK, IN_MEMORY * about.num_rows // max(size, 1)))


def check_exists(path: Path, where: str) -> None:
    """Raise InputError when there is no such file."""
    if not path.is_file():
        start = "the working folder" if where.startswith("--") else "the recipe's folder"
        raise InputError(f"no file at {path}", where=where, hint=f"relative paths start at {start}")


def open_text(path: Path, encoding: str | None, *, newline: str | None = None, errors: str = "strict") -> io.TextIOBase:
    """Open a file of text. A byte order mark is no part of it. Raises UnicodeError for UTF-16 that is not asked for."""
    if encoding is None and errors == "strict" and _looks_wide(path):
        raise UnicodeError("UTF-16")
    codec = codecs.lookup(encoding or "utf-8").name
    return path.open(encoding="utf-8-sig" if codec == "utf-8" else codec, newline=newline, errors=errors)


def _looks_wide(path: Path) -> str | None:
    """Return the encoding of a file that looks like UTF-16; None for one that does not."""
    with path.open("rb") as file:
        start = file.read(1000)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" not in start:
        return None
    # Without a byte order mark: the upper half of most characters is zero.
    return "utf-16-be" if start[::2].count(0) > start[1::2].count(0) else "utf-16-le"


def undecodable(path: Path, kind: str, encoding: str | None, where: str) -> InputError:
    """Return the error about bytes of a file that are no text in its encoding: the line, and what to do."""
    is_utf8 = codecs.lookup(encoding or "utf-8").name == "utf-8"
    # Valid UTF-8 has no lone surrogates, which bytes that are none are read as.
    errors, marks = ("surrogateescape", {chr(c) for c in range(0xDC80, 0xDD00)}) if is_utf8 else ("replace", {"\ufffd"})
    wide, line = _looks_wide(path) if is_utf8 else None, 1
    if not wide:
        with open_text(path, encoding, newline="", errors=errors) as file, contextlib.suppress(UnicodeError):
            line = next((number for number, text in enumerate(file, 1) if marks & set(text)), 1)
    said = "looks like UTF-16" if wide else f"its bytes are not {(encoding or 'UTF-8')}"
    right = wide or "latin-1"
    return InputError(
        f"{path}:{line} is not readable as {kind}: {said}",
        where=where,
        hint=f"{_option(where, 'encoding', right)}{'' if wide else ', if that is what it is'}; or save it as UTF-8",
    )


def _option(where: str, field: str, value: str) -> str:
    """Return how a user sets a field of `[task]`, in a recipe or as an option."""
    return f"use --{field} {value}" if where.startswith("--") else f'set task.{field} = "{value}"'


def first_line(error: BaseException) -> str:
    """Return the first line of an error of a library."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_names(path: Path, names: list[str], where: str) -> None:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{path} has two columns {twice!r}", where=where, hint="rename one of them")


def _read_json(path: Path, kind: str, encoding: str | None, where: str) -> Columns:
    columns: dict[str, list[pa.Array | list[Any]]] = {}
    count = 0
    with open_text(path, encoding) as file:
        if kind == "JSON":
            rows = json.load(file)
            if not isinstance(rows, list):
                raise InputError(
                    f"{path} must hold a JSON array of objects, or be named .jsonl with one a line", where=where
                )
        else:
            rows = _json_lines(path, file, where)
        for chunk in chunked(rows):
            if not all(isinstance(row, dict) for row in chunk):
                raise InputError(f"every row of {path} must be a JSON object", where=where)
            for name in dict.fromkeys(name for row in chunk for name in row):
                columns.setdefault(name, [[None] * count])
            for name, parts in columns.items():
                parts.append(packed([row.get(name) for row in chunk]))
            count += len(chunk)
    return {name: Column(_on_disk(part for part in parts if len(part))) for name, parts in columns.items()}


def _on_disk(parts: Iterable[pa.Array | list[Any]]) -> list[pa.Array | list[Any]]:
    """Return the parts of a column, the text among them as `stored_table` keeps it."""
    parts = list(parts)
    schema = pa.schema([("text", TEXT)])
    texts = [pa.RecordBatch.from_arrays([part], schema=schema) for part in parts if isinstance(part, pa.Array)]
    kept = iter(stored_table(texts, schema).column(0).chunks)
    return [next(kept) if isinstance(part, pa.Array) else part for part in parts]


def _json_lines(path: Path, file: Iterable[str], where: str) -> Iterator[Any]:
    # Lines end at line feeds alone: the other separators that Unicode knows may stand inside a JSON string.
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number} is not valid JSON: {error}", where=where) from error


def _read_csv(
    path: Path, kind: str, delimiter: str | None, encoding: str | None, where: str, notes: list[str] | None
) -> Columns:
    """Return the columns; every value is the text as it stands there, so that "007" stays "007"."""
    # The library's limit of 131,072 characters a cell is shorter than some documents.
    csv.field_size_limit(2**31 - 1)
    usual = SEPARATORS[kind][0]
    separator = delimiter or _separator(path, kind, encoding)
    if delimiter is None and separator != usual and notes is not None:
        notes.append(f"{path.name}: columns are separated by {separator!r}")
    with open_text(path, encoding, newline="") as file:
        rows = _csv_rows(path, file, separator, where)
        _, _, names = next(rows, (0, 0, []))
        _check_names(path, names, where)
        cells = _cells(path, rows, len(names), where, guessed=delimiter is None)
        schema = pa.schema([(name, TEXT) for name in names])
        arrays = ([pa.array(values, TEXT) for values in zip(*chunk, strict=True)] for chunk in chunked(cells))
        table = stored_table((pa.RecordBatch.from_arrays(row, schema=schema) for row in arrays), schema)
    return {name: Column(table.column(name).chunks) for name in names}


def _cells(
    path: Path, rows: Iterable[tuple[int, int, list[str]]], width: int, where: str, *, guessed: bool
) -> Iterator[list[str]]:
    """Yield the cells of each row. Raises InputError for a row of another width. guessed: the separator."""
    for first, last, row in rows:
        if len(row) != width:
            hint = "a text with the separator in it needs quotes around it"
            if last > first:
                hint = f"the row ends in line {last}: is a quote missing? Quotes inside a quoted text are doubled"
            elif guessed and width == 1:
                hint = _option(where, "delimiter", ";") + ", or whatever stands between the columns"
            raise InputError(
                f"{path}:{first} has {counted(len(row), 'column')}, the header has {width}", where=where, hint=hint
            )
        yield row


def _csv_rows(path: Path, file: Iterable[str], separator: str, where: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the first and last line of each row, and its cells. Raises InputError that names the line of its start."""
    reader = csv.reader(file, delimiter=separator, strict=True)
    first = 1
    try:
        for row in reader:
            if row:
                yield first, reader.line_num, row
            first = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}:{first} is not readable as CSV: {first_line(error)}",
            where=where,
            hint='quotes inside a quoted text are doubled: "he said ""no"""; or is a closing quote missing?',
        ) from error


def _separator(path: Path, kind: str, encoding: str | None) -> str:
    """Return what separates the columns: what the header has, and, where that is several, the first rows agree with."""
    fitting = []
    for separator in SEPARATORS[kind]:
        widths: list[int] = []
        with open_text(path, encoding, newline="") as file, contextlib.suppress(csv.Error):
            for row in islice(csv.reader(file, delimiter=separator, strict=True), 200):
                widths += [len(row)] if row else []
        if widths and widths[0] > 1:
            fitting.append((separator, len(set(widths)) == 1))
    agreed = [separator for separator, consistent in fitting if consistent]
    return next(iter([*agreed, *(separator for separator, _ in fitting)]), SEPARATORS[kind][0])


def read_hub(name: str, config: str | None, where: str) -> dict[str, Columns]:
    """Return every split of a hub set, or of a folder that the library reads like one.

    Numbers of classes that the set names are replaced by their names, also in lists.
    Raises InputError when it cannot be fetched.
    """
    from datasets import ClassLabel, load_dataset

    try:
        loaded = load_dataset(name, config)
    except Exception as error:
        raise InputError(
            f"cannot load the data set {name!r} ({type(error).__name__}: {first_line(error)})",
            where=where,
            hint="check the name and the network; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as everywhere",
        ) from error
    splits: dict[str, Columns] = {}
    for split, rows in loaded.items():
        table = rows.with_format("arrow")[:]
        splits[split] = {column: Column(table.column(column).chunks) for column in table.column_names}
        for column, feature in rows.features.items():
            inner = getattr(feature, "feature", feature)
            if isinstance(inner, ClassLabel):
                # Sets without public answers have -1 there.
                names = [*inner.names, None]
                splits[split][column] = Column.of(_named(value, names) for value in splits[split][column])
    return splits


def _named(value: Any, names: list[str | None]) -> Any:
    if isinstance(value, list):
        return [_named(part, names) for part in value]
    return names[-1 if value is None or value < 0 else value]
