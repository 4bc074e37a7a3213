"""Columns of a table as they were read; text is held as Arrow arrays."""

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

from kdcli.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 10_000
"""Values that are Python objects at the same time."""


class Column(Sequence[Any]):
    """The values of a column, in parts: text as Arrow arrays, everything else as lists."""

    def __init__(self, parts: "Iterable[pa.Array | list[Any]]" = ()) -> None:
        self.parts = list(parts)

    @classmethod
    def of(cls, values: Iterable[Any]) -> "Column":
        """Return the values of an iterable, which is read in chunks."""
        return cls(map(packed, chunked(values)))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Any]:
        for chunk in self.chunks():
            yield from chunk

    def chunks(self) -> Iterator[list[Any]]:
        """Yield the values as lists of at most 10,000."""
        from kdcli.data.rows import let_go

        for part in self.parts:
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                yield chunk if isinstance(chunk, list) else chunk.to_pylist()
                let_go()

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        start = place if place >= 0 else place + len(self)
        for part in self.parts:
            if 0 <= start < len(part):
                return part[start] if isinstance(part, list) else part[start].as_py()
            start -= len(part)
        raise IndexError(place)


Columns = dict[str, Column]


def need_column(columns: Columns, name: str, what: str, source: str) -> Column:
    """Return a column. Raises InputError that lists what is there when it is missing. what: the field that names it."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        # A column that is called like its field is the one that is looked for where the field is left out.
        remedy = f'name it: task.{what} = "COLUMN"' if name == what else None
        raise InputError(
            f"{source} has no {what} column {name!r}; it has {', '.join(map(repr, columns))}",
            where=f"task.{what}",
            hint=f"did you mean {near[0]!r}?" if near else remedy,
        )
    return columns[name]


def is_missing(value: Any) -> bool:
    """Return True for what stands for no value: nothing, not-a-number, a text of white space."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def shape_of_value(value: list | dict | bytes) -> str:
    """Return what a value is that is neither a text nor a number, in words."""
    return "an array" if isinstance(value, list) else "a table" if isinstance(value, dict) else "bytes"


def packed(values: list[Any]) -> "pa.Array | list[Any]":
    """Return values as an Arrow array where all are text."""
    import pyarrow as pa

    if values and all(type(value) is str for value in values):
        try:
            return pa.array(values, pa.large_string())
        except UnicodeEncodeError:
            # Half of a character is refused later, with its row.
            return values
    return values


def chunked(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the values as lists of at most 10,000."""
    values = iter(values)
    return iter(lambda: list(islice(values, CHUNK)), [])
