"""Numbers among labels, also as people write them."""

import math
import re
from collections.abc import Iterable
from typing import Any

from kdcli.data.columns import is_missing
from kdcli.errors import InputError, cut

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
WRITTEN_NUMBER = re.compile(
    r"\s*[+-]?(\d+([.,]\d+)?|\d{1,3}(\.\d{3})+(,\d+)?|\d{1,3}(,\d{3})+(\.\d+)?)\s*%?\s*", re.ASCII
)
"""Numbers as people write them: decimal commas, grouped thousands, per cent."""

MOST = 0.8
"""The share of labels that look like numbers from which the others are remarked on."""


def different(labels: Iterable[Any]) -> list[Any]:
    """Return the values that occur among labels, without those that are missing."""
    return [value for value in set(map(_hashable, labels)) if not is_missing(value)]


def _hashable(value: Any) -> Any:
    # Lists and tables are refused later, with their row.
    return str(value) if isinstance(value, list | dict) else value


def are_numbers(values: Iterable[Any]) -> bool:
    """True when all values are numbers, or texts that the computer reads as one."""
    return all(isinstance(value, int | float) or NUMBER.fullmatch(str(value)) for value in values)


def _is_written(value: Any) -> bool:
    """True for a number, and for a text that is one to a reader: 3.5, "3,5", "1.234,5", "3,5 %"."""
    text = str(value)
    return not isinstance(value, bool) and bool(NUMBER.fullmatch(text) or WRITTEN_NUMBER.fullmatch(text))


def check_commas(labels: Iterable[Any], source: str) -> None:
    """Raise InputError for numbers with commas, each of which would be a class."""
    given = different(labels)
    commas = [str(value) for value in given if "," in str(value)]
    if commas and all(_is_written(value) for value in given):
        raise InputError(
            f"{source}: the labels look like numbers with decimal commas, such as {min(commas)!r}",
            where="task.label",
            hint='write scores with decimal points (3.5), or give type = "classification" if they name classes',
        )


def note_of_numbers(labels: Iterable[Any]) -> str | None:
    """Return the note about classes that look like scores: most labels are numbers, and not whole ones alone."""
    found: dict[Any, bool] = {}
    numbers, total, odd, whole = 0, 0, None, True
    for row, value in enumerate(labels, 1):
        if is_missing(value):
            continue
        key = (type(value), _hashable(value))
        if key not in found:
            found[key] = _is_written(value)
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


def number_of(value: Any, what: str, where: str = "task.label") -> float:
    """Return a value as a finite number. what, where: it, and the field that names its column, for InputError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{what} is {cut(repr(value))}, not a number",
            where=where,
            hint="write numbers with decimal points (3.5)" if "," in str(value) else None,
        )
    return number
