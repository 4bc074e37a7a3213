"""A user's own data: files or a hub set, one or two text columns, a label column."""

import csv
import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from kdcli.errors import InputError
from kdcli.recipe.schema import TaskSection

Columns = dict[str, list[Any]]
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
READABLE = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}


def read_file(path: Path, where: str, *, beside: tuple[str, ...] = ()) -> Columns:
    """Return the columns of a CSV, TSV, JSON(L) or Parquet file. Raises InputError when it cannot be read.

    beside: other kinds of files that the caller reads itself, for the message.
    """
    if not path.is_file():
        start = "the working folder" if where.startswith("--") else "the recipe's folder"
        raise InputError(f"no file at {path}", where=where, hint=f"relative paths start at {start}")
    kind = READABLE.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{path.name} is none of {', '.join(sorted({*READABLE, *beside}))}",
            where=where,
            hint="rename or convert it",
        )
    try:
        names, values = _read(path, kind, where)
    except (pa.ArrowException, csv.Error, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not readable as {kind}: {_first_line(error)}", where=where) from error
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{path} has two columns {twice!r}", where=where, hint="rename one of them")
    if not values or not len(values[0]):
        raise InputError(f"{path} has no rows", where=where)
    return dict(zip(names, values, strict=True))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _read(path: Path, kind: str, where: str) -> tuple[list[str], list[list[Any]]]:
    """Return the names of the columns and their values."""
    if kind == "Parquet":
        # Not read_table: it says of two columns of one name only that they match.
        table = pyarrow.parquet.ParquetFile(path).read()
        return table.column_names, [column.to_pylist() for column in table.columns]
    if kind in ("CSV", "TSV"):
        return _read_csv(path, "\t" if kind == "TSV" else ",", where)
    # A byte order mark is no part of the text. Lines end at line feeds alone: the other separators that Unicode
    # knows may stand inside a JSON string.
    text = path.read_text(encoding="utf-8-sig")
    if kind == "JSON":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise InputError(
                f"{path} must hold a JSON array of objects, or be named .jsonl with one a line", where=where
            )
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{path}:{number} is not valid JSON: {error}", where=where) from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"every row of {path} must be a JSON object", where=where)
    names = list(dict.fromkeys(key for row in rows for key in row))
    return names, [[row.get(name) for row in rows] for name in names]


def _read_csv(path: Path, delimiter: str, where: str) -> tuple[list[str], list[list[str]]]:
    """Return names and values; every value is the text as it stands there, so that "007" stays "007"."""
    # The library's limit of 131,072 characters a cell is shorter than some documents.
    csv.field_size_limit(2**31 - 1)
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        for row in reader:
            if rows and row and len(row) != len(rows[0]):
                raise InputError(
                    f"{path}:{reader.line_num} has {len(row)} columns, the header has {len(rows[0])}",
                    where=where,
                    hint="a text with the separator in it needs quotes around it",
                )
            if row:
                rows.append(row)
    names = rows[0] if rows else []
    return names, [[row[i] for row in rows[1:]] for i in range(len(names))]


def read_hub(name: str, config: str | None, where: str, *, label: str | None = None) -> dict[str, Columns]:
    """Return every split of a hub set, or of a folder that the library reads like one.

    label: the column whose numbers are replaced by the class names that the set gives them, if it does.
    Raises InputError when it cannot be fetched.
    """
    from datasets import ClassLabel, load_dataset

    try:
        loaded = load_dataset(name, config)
    except Exception as error:
        raise InputError(
            f"cannot load the data set {name!r} ({type(error).__name__}: {_first_line(error)})",
            where=where,
            hint="check the name and the network; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as everywhere",
        ) from error
    splits: dict[str, Columns] = {split: loaded[split].to_dict() for split in loaded}
    for split, columns in splits.items():
        feature = loaded[split].features.get(label)
        if isinstance(feature, ClassLabel):
            # Sets without public answers have -1 there.
            columns[label] = [None if v is None or v < 0 else feature.names[v] for v in columns[label]]  # type: ignore[index]
    return splits


def need_column(columns: Columns, name: str, what: str, source: str) -> list[Any]:
    """Return a column. Raises InputError that lists what is there when it is missing."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        raise InputError(
            f"{source} has no {what} column {name!r}; it has {', '.join(map(repr, columns))}",
            where=f"task.{what}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    return columns[name]


def is_missing(value: Any) -> bool:
    """Return True for what stands for no value: nothing, not-a-number, an empty text."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def infer_kind(labels: list[Any], section: TaskSection) -> str:
    """Return "regression" for numbers with fractions among them, else "classification".

    `task.type` decides when given, and so does `task.labels`. Raises InputError when they contradict each other.
    """
    if section.labels is not None:
        if section.type == "regression":
            raise InputError("a regression has no classes to list", where="task.labels")
        return "classification"
    if section.type is not None:
        return section.type
    given = [value for value in labels if not is_missing(value)]
    if not all(isinstance(value, int | float) or NUMBER.fullmatch(str(value)) for value in given):
        return "classification"
    return "classification" if all(float(value).is_integer() for value in given) else "regression"


def clean_rows(columns: Columns, section: TaskSection, kind: str, source: str) -> Columns:
    """Return text, [text_pair] and raw label of every row. Raises InputError for holes and wrong types."""
    names = [section.text] if isinstance(section.text, str) else list(section.text or [])
    rows = text_columns(columns, names, source)
    empty = [i for i, texts in enumerate(zip(*rows.values(), strict=True)) if not any(t.strip() for t in texts)]
    if empty:
        raise InputError(
            f"{source}: {len(empty)} rows have no text, the first is row {empty[0] + 1}",
            where="task.text",
            hint="remove them",
        )
    label = section.label or "label"
    values = need_column(columns, label, "label", source)
    holes = [i for i, value in enumerate(values) if is_missing(value)]
    if holes:
        raise InputError(
            f"{source}: {len(holes)} rows have no label, the first is row {holes[0] + 1}",
            where="task.label",
            hint="remove or label them",
        )
    for row, value in enumerate(values, 1):
        if isinstance(value, list | dict | bytes):
            raise InputError(
                f"{source}: the label of row {row} is a {type(value).__name__}, not one text or number",
                where="task.label",
            )
    if kind == "regression":
        rows["label"] = [_number(value, row, source) for row, value in enumerate(values, 1)]
    else:
        named = [_class_name(value, section.labels or ()) for value in values]
        rows["label"] = [_readable(name, row, source, "task.label") for row, name in enumerate(named, 1)]
    return rows


def _readable(text: str, row: int, source: str, where: str) -> str:
    """Return `text`. Raises InputError for half of a character, such as an emoji that was cut."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: row {row} has half of a character at place {error.start + 1}, which is no Unicode text",
            where=where,
            hint="was the text cut between two bytes? Write it anew, or remove the row",
        ) from error
    return text


def text_columns(columns: Columns, names: Sequence[str], source: str) -> Columns:
    """Return the columns `names` as text and text_pair. Raises InputError for a row without one of them."""
    rows: Columns = {}
    for target, name in zip(("text", "text_pair"), names, strict=False):
        values = need_column(columns, name, "text", source)
        for row, value in enumerate(values, 1):
            if value is None or (isinstance(value, float) and math.isnan(value)):
                raise InputError(f"{source}: row {row} has no {name!r}", where="task.text")
            if isinstance(value, list | dict | bytes):
                raise InputError(
                    f"{source}: {name!r} of row {row} is a {type(value).__name__}, not a text", where="task.text"
                )
        rows[target] = [_readable(str(value), row, source, "task.text") for row, value in enumerate(values, 1)]
    return rows


def _number(value: Any, row: int, source: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{source}: row {row}: the label {value!r} is no number, but the task is a regression",
            where="task.label",
        )
    return number


def _class_name(value: Any, known: Sequence[str]) -> str:
    """Return a class's name. Whole numbers have no decimals, whatever kind of file they come from: 1.0 is "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    name = str(value)
    return name.split(".")[0] if name not in known and re.fullmatch(r"-?\d+\.0+", name, re.ASCII) else name


def class_names(rows: Columns, section: TaskSection, source: str) -> tuple[str, ...]:
    """Return the classes in order: as given in `task.labels`, else sorted (numbers as numbers).

    Raises InputError when there is only one, or when a label is not among those given, or one is given twice.
    """
    present = set(rows["label"])
    if section.labels is not None:
        if len(set(section.labels)) < len(section.labels):
            raise InputError("a class is listed twice", where="task.labels")
        strange = sorted(present - set(section.labels))
        if strange:
            raise InputError(
                f"{source} has the label {strange[0]!r}, which is not in task.labels ({', '.join(section.labels)})",
                where="task.labels",
            )
        names = list(section.labels)
    else:
        numeric = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in present)
        names = sorted(present, key=lambda name: (int(name) if numeric else 0, name))
    if len(present) < 2:
        raise InputError(
            f"{source} has one class only ({next(iter(present))!r}): there is nothing to learn",
            where="task.label",
        )
    return tuple(names)


def to_ids(rows: Columns, names: tuple[str, ...], source: str, *, owner: str = "the training data") -> None:
    """Replace class names by numbers, in place. Raises InputError for a class that `owner` does not have."""
    place = {name: i for i, name in enumerate(names)}
    strange = sorted(set(rows["label"]) - set(place))
    if strange:
        raise InputError(
            f"{source} has the label {strange[0]!r}, which {owner} does not have ({', '.join(names)})",
            where="task.label",
        )
    rows["label"] = [place[name] for name in rows["label"]]
