"""Tables of rows: made, drawn from, split, halved."""

import random
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdcli.data.columns import chunked
from kdcli.data.rows import TEXT, stored, stored_table
from kdcli.errors import InputError
from kdcli.words import counted

if TYPE_CHECKING:
    from datasets import Dataset


def table_of(texts: Mapping[str, Any], labels: Any = None) -> pa.Table:
    """Return rows with columns of text and, of labelled ones, label."""
    columns = {
        name: values if isinstance(values, pa.ChunkedArray) else text_array(values) for name, values in texts.items()
    }
    if labels is not None:
        columns["label"] = pa.array(labels)
    return pa.table(columns)


def array_of_labels(values: Any) -> pa.Array:
    """Return labels as a column: numbers, or lists of as many numbers each (an array (n, labels))."""
    if getattr(values, "ndim", 1) == 1:
        return pa.array(values)
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


def text_array(values: Iterable[str]) -> pa.ChunkedArray:
    """Return texts as a column."""
    return pa.chunked_array([pa.array(chunk, TEXT) for chunk in chunked(values)], TEXT)


def dataset_of(rows: pa.Table) -> "Dataset":
    """Return rows with their numbers as `index`, kept as `stored` keeps them."""
    return stored(rows.add_column(0, "index", pa.array(np.arange(len(rows)))).to_batches())


def subset(rows: pa.Table, size: int | None, seed: int) -> pa.Table:
    """Return a fixed random subset in the data's own order; the same for every run with this split_seed."""
    if size is None or size >= len(rows):
        return rows
    return rows.take(sorted(random.Random(f"subset-{seed}").sample(range(len(rows)), size)))


def halves(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return the first and the second half. Raises InputError for a single row."""
    middle = len(rows) // 2
    if middle == 0:
        raise InputError("the validation set is too small to be halved", where="evaluate.protocol")
    return rows.slice(0, middle), rows.slice(middle)


def split(rows: pa.Table, fraction: float, seed: int, strata: np.ndarray | None = None) -> tuple[pa.Table, pa.Table]:
    """Return a seeded split: the rest, and `fraction` of the rows.

    strata: (n,), whose shares are kept where each value has two rows, and both parts have room for all values.
    Raises InputError where a part would be empty.
    """
    from sklearn.model_selection import train_test_split

    count = len(rows)
    size = round(count * fraction)
    if not 0 < size < count:
        raise InputError(
            f"{counted(count, 'row')} cannot be split with validation_fraction = {fraction}",
            where="task.validation_fraction",
        )
    counts = np.unique(strata, return_counts=True)[1] if strata is not None else np.array([], np.int64)
    enough = min(size, count - size) >= len(counts)
    stratify = strata if len(counts) and enough and counts.min() > 1 else None
    kept, held = train_test_split(np.arange(count), test_size=size, random_state=seed, stratify=stratify)
    # The held-out rows stay as they were drawn: halves of a set that is sorted by label would be no samples of it.
    chosen = np.zeros(count, bool)
    chosen[kept] = True
    marked = rows.append_column("chosen", pa.array(chosen))
    train = stored_table((batch.filter(batch.column("chosen")) for batch in marked.to_batches()), marked.schema)
    return train.drop_columns("chosen"), rows.take(held)
