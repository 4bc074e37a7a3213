"""Rows of a data set: read in chunks, and written batch by batch where they are too many to be held in memory."""

import contextlib
import mmap
import os
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcli.data.columns import CHUNK
from kdcli.errors import InputError, RunError
from kdcli.files import cache_dir

if TYPE_CHECKING:
    from datasets import Dataset

TEXT = pa.large_string()

IMAGE = pa.struct([("bytes", pa.large_binary()), ("path", TEXT), ("stamp", TEXT)])
"""An image of a row: its encoded bytes, or else its file; and a stamp that changes with it, a hash of the bytes or the
size and times of the file."""

BATCH = 1000
"""Rows that are Python objects at the same time."""

IN_MEMORY = 16 * 2**20
"""Bytes up to which rows are kept in memory."""


_maps: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


def let_go() -> None:
    """Give back the memory of all that was read from files of rows; it is read again when it is asked for again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for content in list(_maps):
            content.madvise(mmap.MADV_DONTNEED)


def batches_of(rows: "Dataset") -> Iterator[dict[str, list[Any]]]:
    """Yield the rows in batches of at most 1,000: lists by column."""
    for number, batch in enumerate(rows.iter(BATCH)):
        yield batch
        if number % 10 == 9:
            let_go()


def chunks_of(rows: "Dataset", column: str) -> Iterator[list[Any]]:
    """Yield the values of a column as lists of at most 1,000."""
    for batch in batches_of(rows.select_columns([column])):
        yield batch[column]


def identities(rows: "Dataset | pa.Table", column: str) -> Iterator[list[Any]]:
    """Yield lists of what identifies each value of a column: of an image its file and stamp, else the value itself."""
    if isinstance(rows, pa.Table):
        parts: Iterable[pa.ChunkedArray] = (rows.column(column).slice(at, CHUNK) for at in range(0, len(rows), CHUNK))
    elif isinstance(feature := rows.features[column], dict) and set(feature) == {field.name for field in IMAGE}:
        parts = (table.column(column) for table in rows.select_columns([column]).with_format("arrow").iter(BATCH))
    else:
        yield from chunks_of(rows, column)
        return
    for part in parts:
        if pa.types.is_struct(part.type) and part.type.get_field_index("stamp") >= 0:
            files, stamps = (pc.struct_field(part, name).to_pylist() for name in ("path", "stamp"))
            known = pc.struct_field(part, "bytes").is_null().to_pylist()
            # Bytes are known by their hash, whatever they are called.
            yield [
                (path if of_file else None, stamp) for path, stamp, of_file in zip(files, stamps, known, strict=True)
            ]
        else:
            yield part.to_pylist()
        let_go()


def values_of(rows: "Dataset", column: str) -> Iterator[Any]:
    """Yield the values of a column."""
    return chain.from_iterable(chunks_of(rows, column))


def array_of(rows: "Dataset", column: str) -> np.ndarray:
    """Return a column of numbers, (n,), or of lists of as many numbers each, (n, ...)."""
    chunks = [np.asarray(chunk) for chunk in chunks_of(rows, column)]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


def stored(batches: Iterable[pa.RecordBatch]) -> "Dataset":
    """Return a data set of all batches (at least one), kept as `stored_table` keeps them."""
    from datasets import Dataset

    batches = iter(batches)
    first = next(batches)
    # A name of its own: the library would make one from all the bytes.
    return Dataset(stored_table(chain([first], batches), first.schema), fingerprint=uuid.uuid4().hex)


def stored_table(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Return a table of all batches: in memory up to 16 MiB, else in a file that is mapped into it.

    The file has no name: it goes with the process, however that ends. It lies in the cache folder, or where that
    cannot be written, in the folder for temporary files.
    Raises RunError when the disk is full.
    """
    batches = iter(batches)
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.nbytes
        if size > IN_MEMORY:
            return _on_disk(chain(waiting, batches), schema)
    return pa.Table.from_batches(waiting, schema)


class _Unreadable(Exception):
    """The batches cannot be made: none of the disk's faults."""


def _made(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except OSError as error:
        raise _Unreadable from error


def _on_disk(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    folder = _folder()
    try:
        # A stream: dictionaries of a column may change from batch to batch.
        with tempfile.TemporaryFile(dir=folder) as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for number, batch in enumerate(_made(batches)):
                    writer.write_batch(batch)
                    if number % 10 == 9:
                        let_go()
            file.flush()
            # The map holds the file open; the table's buffers lie in it.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except _Unreadable as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    except OSError as error:
        raise RunError(
            f"cannot write rows to {folder}: {error.strerror or error}",
            hint="make room there, or set KDCLI_CACHE to a folder with room",
        ) from error
    _maps.add(content)
    pa.default_memory_pool().release_unused()
    return pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(content))).read_all()


def _folder() -> Path:
    with contextlib.suppress(OSError, InputError):
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir())
