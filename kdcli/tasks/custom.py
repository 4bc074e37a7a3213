"""A user's own data: one or two text columns and a label column of a table."""

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kdcli.data.files import Column, Columns, chunked
from kdcli.data.rows import TEXT
from kdcli.errors import InputError
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.labels import are_numbers_of, clean_name, listed, look_alikes, nearest
from kdcli.words import counted

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
WRITTEN_NUMBER = re.compile(
    r"\s*[+-]?(\d+([.,]\d+)?|\d{1,3}(\.\d{3})+(,\d+)?|\d{1,3}(,\d{3})+(\.\d+)?)\s*%?\s*", re.ASCII
)
"""Numbers as people write them: decimal commas, grouped thousands, per cent."""

MOST = 0.8
"""The share of labels that look like numbers from which the others are remarked on."""


def need_column(columns: Columns, name: str, what: str, source: str) -> Column:
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
    """Return True for what stands for no value: nothing, not-a-number, a text of white space."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def infer_kind(labels: Column, section: TaskSection, source: str, notes: list[str]) -> str:
    """Return "regression" for numbers with fractions among them, else "classification".

    `task.type` decides when given, and so does `task.labels`. notes: takes a warning about scores that become classes.
    Raises InputError when they contradict each other, and for numbers with commas, which would be a class each.
    """
    if section.labels is not None:
        if section.type == "regression":
            raise InputError("a regression has no classes to list", where="task.labels")
        return "classification"
    if section.type is not None:
        return section.type
    given = [value for value in set(map(_hashable, labels)) if not is_missing(value)]
    if all(isinstance(value, int | float) or NUMBER.fullmatch(str(value)) for value in given):
        return "classification" if all(float(value).is_integer() for value in given) else "regression"
    commas = [str(value) for value in given if "," in str(value)]
    if commas and all(_is_number(value) for value in given):
        raise InputError(
            f"{source}: the labels look like numbers with decimal commas, such as {min(commas)!r}",
            where="task.label",
            hint='write scores with decimal points (3.5), or give type = "classification" if they name classes',
        )
    if note := _note_of_numbers(labels):
        notes.append(f"{source}: {note}")
    return "classification"


def _is_number(value: Any) -> bool:
    """True for a number, and for a text that is one to a reader: 3.5, "3,5", "1.234,5", "3,5 %"."""
    text = str(value)
    return not isinstance(value, bool) and bool(NUMBER.fullmatch(text) or WRITTEN_NUMBER.fullmatch(text))


def _note_of_numbers(labels: Column) -> str | None:
    """Return the note about classes that look like scores: most labels are numbers, and not whole ones alone."""
    found: dict[Any, bool] = {}
    numbers, total, odd, whole = 0, 0, None, True
    for row, value in enumerate(labels, 1):
        if is_missing(value):
            continue
        key = (type(value), _hashable(value))
        if key not in found:
            found[key] = _is_number(value)
            whole = whole and not (found[key] and not re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", str(value), re.ASCII))
        total += 1
        numbers += found[key]
        if odd is None and not found[key]:
            odd = (value, row)
    if whole or numbers < MOST * total:
        return None
    first = f"; the first that does not is {odd[0]!r} in row {odd[1]}" if odd is not None else ""
    return (
        f"{numbers:,} of {total:,} labels look like numbers{first}. Each value is a class of its own; task.type = "
        '"regression" needs numbers with decimal points'
    )


def _hashable(value: Any) -> Any:
    # Lists and tables are refused later, with their row.
    return str(value) if isinstance(value, list | dict) else value


def clean_rows(
    columns: Columns, section: TaskSection, kind: str, source: str, notes: list[str]
) -> tuple[dict[str, pa.ChunkedArray], list[Any]]:
    """Return the columns text and [text_pair], and the label of every row: a class's name, or a number.

    notes: takes what was changed. Raises InputError for holes and wrong types.
    """
    names = [section.text] if isinstance(section.text, str) else list(section.text or [])
    texts = text_columns(columns, names, source)
    each = zip(*(Column(column.chunks) for column in texts.values()), strict=True)
    empty = [row for row, parts in enumerate(each, 1) if not any(part.strip() for part in parts)]
    if empty:
        raise InputError(
            f"{source}: {counted(len(empty), 'row')} without text, the first is row {empty[0]}",
            where="task.text",
            hint="remove them",
        )
    values = need_column(columns, section.label or "label", "label", source)
    holes = [row for row, value in enumerate(values, 1) if is_missing(value)]
    if holes:
        raise InputError(
            f"{source}: {counted(len(holes), 'row')} without a label, the first is row {holes[0]}",
            where="task.label",
            hint="remove or label them",
        )
    for row, value in enumerate(values, 1):
        if isinstance(value, list | dict | bytes):
            raise InputError(
                f"{source}: the label of row {row} is {_kind_of(value)}, not one text or number",
                where="task.label",
            )
    if kind == "regression":
        return texts, [_number(value, row, source) for row, value in enumerate(values, 1)]
    return texts, _class_names(values, known_names(section), source, notes)


def _kind_of(value: list | dict | bytes) -> str:
    return "an array" if isinstance(value, list) else "a table" if isinstance(value, dict) else "bytes"


def _readable(text: str, row: int, source: str, where: str) -> str:
    """Return `text`. Raises InputError for half of a character, such as an emoji that was cut."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: row {row} has half of a character at place {error.start + 1}, which is no Unicode text",
            where=where,
            hint="was the text cut between two bytes? Write it again, or remove the row",
        ) from error
    return text


def text_columns(columns: Columns, names: Sequence[str], source: str) -> dict[str, pa.ChunkedArray]:
    """Return the columns `names` as text and text_pair. Raises InputError for a row without one of them."""
    rows = {}
    for target, name in zip(("text", "text_pair"), names, strict=False):
        values = need_column(columns, name, "text", source)
        parts: list[pa.Array] = []
        first = 1
        for part in values.parts:
            if isinstance(part, pa.Array) and part.type in (TEXT, pa.string()) and not part.null_count:
                parts.append(part.cast(TEXT))
            else:
                parts += (pa.array(chunk, TEXT) for chunk in chunked(_texts(Column([part]), first, name, source)))
            first += len(part)
        rows[target] = pa.chunked_array(parts, TEXT)
    return rows


def _texts(values: Column, first: int, name: str, source: str) -> Iterator[str]:
    """Yield the values as text. first: the number of the first row. Raises InputError for what is none."""
    for row, value in enumerate(values, first):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise InputError(f"{source}: row {row} has no {name!r}", where="task.text")
        if isinstance(value, list | dict | bytes):
            raise InputError(f"{source}: {name!r} of row {row} is {_kind_of(value)}, not a text", where="task.text")
        yield _readable(str(value), row, source, "task.text")


def _number(value: Any, row: int, source: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{source}: row {row}: the label {value!r} is no number, but the task is a regression",
            where="task.label",
            hint="write scores with decimal points (3.5)" if "," in str(value) else None,
        )
    return number


def _class_names(values: Column, known: Sequence[str], source: str, notes: list[str]) -> list[str]:
    """Return the name of each row's class. known: the classes in order, where the recipe names them.

    What was cleaned goes into `notes`.
    """
    # By type, too: True and 1 are equal.
    names: dict[tuple[type, Any], str] = {}
    cleaned: Counter[str] = Counter()
    found = []
    for row, value in enumerate(values, 1):
        key = (type(value), value)
        if key not in names:
            names[key] = _class_name(
                _readable(value, row, source, "task.label") if type(value) is str else value, known
            )
        if type(value) is str and value != clean_name(value):
            cleaned[value] += 1
        found.append(names[key])
    if cleaned:
        name = cleaned.most_common(1)[0][0]
        spaced = name != name.strip()
        what = "white space around them" if spaced else "another Unicode form than NFC"
        notes.append(
            f"{source}: {cleaned.total():,} labels have {what}: {repr(name) if spaced else ascii(name)} is read as "
            f"{clean_name(name)!r}"
        )
    return found


def named_integers(labels: list[str], known: Sequence[str]) -> list[str] | None:
    """Return the names of classes that integers from 0 count; None for labels that are no such integers."""
    return [known[int(label)] for label in labels] if known and are_numbers_of(set(labels), known) else None


def _class_name(value: Any, known: Sequence[str]) -> str:
    """Return a class's name, the same whatever kind of file it comes from.

    Whole numbers have no decimals (1.0 is "1"), and truth values are "true" and "false", unless the recipe names them.
    """
    name = clean_name(value)
    if name in known:
        return name
    if (lower := name.lower()) in ("true", "false"):
        return next((other for other in known if other.lower() == lower), lower)
    return name.split(".")[0] if re.fullmatch(r"-?\d+\.0+", name, re.ASCII) else name


def known_names(section: TaskSection) -> tuple[str, ...]:
    """Return the classes that the recipe names, in its order; none where it leaves them to the data."""
    return tuple(map(clean_name, section.labels or ()))


def class_names(labels: Sequence[str], section: TaskSection, source: str, notes: list[str]) -> tuple[str, ...]:
    """Return the classes in order: as given in `task.labels`, else sorted (numbers as numbers).

    notes: takes a warning about names that look like one class. Raises InputError when there is only one, or when a
    label is not among those given, or one is given twice.
    """
    present = set(labels)
    known = known_names(section)
    if known:
        if len(set(known)) < len(known):
            raise InputError("a class is listed twice", where="task.labels")
        to_ids(sorted(present), known, source, where="task.labels", owner="is not in task.labels")
    if len(present) < 2:
        raise InputError(
            f"{source} has one class only ({next(iter(present))!r}): there is nothing to learn",
            where="task.label",
        )
    if known:
        return known
    for group in look_alikes(sorted(present))[:5]:
        notes.append(
            f"{source}: the classes {' and '.join(map(repr, group))} differ in case or spacing only; are they one? "
            "Make them equal, or list both in task.labels"
        )
    return in_order(present)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of classes sorted, numbers as numbers."""
    numeric = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def to_ids(
    labels: Sequence[str],
    names: Sequence[str],
    source: str,
    *,
    where: str = "task.label",
    owner: str = "the training data does not have",
    place: dict[str, int] | None = None,
) -> np.ndarray:
    """Return the number of each label's class, int64. place: of each label, where it is not that among `names`.

    Raises InputError for a label without one; owner: ends the sentence about it.
    """
    place = place if place is not None else {name: i for i, name in enumerate(names)}
    strange = sorted(set(labels) - place.keys())
    if strange:
        raise InputError(
            f"{source} has the label {strange[0]!r}, which {owner} ({listed(names, strange[0])})",
            where=where,
            hint=f"did you mean {near!r}?" if (near := nearest(strange[0], names)) is not None else None,
        )
    return np.fromiter((place[label] for label in labels), np.int64, len(labels))
