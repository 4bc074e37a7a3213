"""The parts of a task, such as languages: joined rows with a column that tells them apart, encoded part by part."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kdcli.data.rows import array_of, stored
from kdcli.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

PART = "part"
"""The column with the number of a row's part, from 0."""

ROW = "row"
"""The column with the place of a feature's row, where one row may give several features."""


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of all parts one after the other, with the column `part`.

    Raises InputError where a part has other columns than the first.
    """
    for number, table in enumerate(tables):
        if set(table.column_names) != set(tables[0].column_names):
            raise InputError(
                "its rows have other columns than those of the first part: a text, or a pair of texts, in all of them",
                where=f"task.part[{number}]",
            )
    numbered = [
        table.append_column(PART, pa.array(np.full(len(table), number, np.int32)))
        for number, table in enumerate(tables)
    ]
    return pa.concat_tables(numbered, promote_options="default")


def encode(make: "Callable[[Dataset], Dataset]", rows: "Dataset") -> "Dataset":
    """Return the features that `make` gives for rows; those of parts each on their own, with the column `part`.

    No feature is of two parts. Each has an index that no other has, and a `row`, if any, that counts all rows.
    """
    if PART not in rows.column_names:
        return make(rows)
    return stored(_batches(make, rows))


def _batches(make: "Callable[[Dataset], Dataset]", rows: "Dataset") -> Iterator[pa.RecordBatch]:
    used = np.array([-1])
    for number, places in places_of(rows):
        features = make(rows.select(places))
        index = array_of(features, "index")
        # Features that have the index of their row keep it.
        shift = int(used.max()) + 1 if np.isin(index, used).any() else 0
        used = np.concatenate([used, index + shift])
        for batch in features.with_format("arrow").iter(1000):
            yield _numbered(batch, number, shift, places)


def _numbered(batch: pa.Table, number: int, shift: int, places: np.ndarray) -> pa.RecordBatch:
    columns = {name: batch.column(name).combine_chunks() for name in batch.column_names}
    columns["index"] = pa.array(columns["index"].to_numpy() + shift)
    if ROW in columns:
        columns[ROW] = pa.array(places[columns[ROW].to_numpy()])
    return pa.RecordBatch.from_pydict({**columns, PART: pa.array(np.full(len(batch), number, np.int32))})


def places_of(rows: "Dataset") -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each part that rows or features have, and their places in them, in order."""
    parts = array_of(rows, PART)
    for number in np.unique(parts):
        yield int(number), np.flatnonzero(parts == number)


def sets_of(rows: "Dataset") -> "list[Dataset]":
    """Return the rows of each part on their own; of a task without parts, all of them."""
    if PART not in rows.column_names:
        return [rows]
    return [rows.select(places) for _, places in places_of(rows)]


def pairs_of(features: "Dataset", rows: "Dataset") -> "Iterator[tuple[np.ndarray, Dataset, Dataset]]":
    """Yield of each part the places of its features, and its features and rows as if they were a task of their own."""
    if PART not in rows.column_names:
        yield np.arange(len(features)), features, rows
        return
    of_rows = dict(places_of(rows))
    for number, places in places_of(features):
        own = features.select(places)
        if ROW in own.column_names:
            row = np.searchsorted(of_rows[number], array_of(own, ROW))
            own = own.remove_columns(ROW).add_column(ROW, row.tolist())  # type: ignore[call-arg]
        yield places, own, rows.select(of_rows[number])
