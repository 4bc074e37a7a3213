"""Images decoded once: the bytes that an image processor makes of them, kept on disk and mapped into memory."""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from kdcli.errors import InputError
from kdcli.files import atomic_folder, cache_dir, fingerprint, quick_hash_of_file, write_json
from kdcli.locks import BusyError, lock_file
from kdcli.machine import usable_processors
from kdcli.models.hashing import hash_of_dataset
from kdcli.terminal import stderr, tell, warn
from kdcli.words import counted

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

PLACE = "pixels_at"
"""Of a feature where its pixels are among those that are kept."""

TABLE, RECORD = "pixels.bin", "record.json"

AT_ONCE = 64
"""Images that one thread decodes at a time."""

_whole: set[tuple[str, int, int]] = set()
"""Files that this process has read and found to be as they were written: path, bytes and time."""


class _Unreadable(Exception):
    """An image cannot be decoded: none of the cache's faults."""

    def __init__(self, told: InputError) -> None:
        super().__init__(told)
        self.told = told


class Shaper(Protocol):
    """What makes uint8 pixels of features, all of one size."""

    def decoded(self, rows: Sequence[Any]) -> list[Any]:
        """Return the images of features."""

    def shaped(self, images: Sequence[Any]) -> "Tensor":
        """Return them as uint8 pixels (n, channels, height, width)."""


@dataclass
class KeptPixels:
    """Pixels on disk. shape: (n, channels, height, width)."""

    path: Path
    shape: tuple[int, ...]

    @cached_property
    def images(self) -> np.memmap:
        """All of them, mapped into memory: what is not read stays on the disk."""
        return np.memmap(self.path, np.uint8, "r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the file itself.
        return {key: value for key, value in self.__dict__.items() if key != "images"}

    def read(self, places: np.ndarray) -> "Tensor":
        """Return a copy of some, (n, channels, height, width)."""
        import torch

        return torch.from_numpy(np.asarray(self.images[places]))


def keep_pixels(sets: "Sequence[Dataset]", reader: Shaper) -> "tuple[KeptPixels | None, list[Dataset]]":
    """Return the pixels of encoded images, and the sets with places in them in place of the images.

    They are in the cache, under a name made of the images and of what reads them; made now, or found. A file that is
    damaged is made again. Where they cannot be kept (a full disk, a cache that cannot be written), the user is told,
    and the sets are what they were.
    """
    name = fingerprint([hash_of_dataset(rows) for rows in sets])
    folder, console = cache_dir() / "pixels" / name, stderr()
    count = sum(map(len, sets))
    try:
        shape = _found(folder, name, count) or _made(folder, name, sets, reader)
    except _Unreadable as error:
        raise error.told from error
    except (OSError, InputError) as error:
        said = error.message if isinstance(error, InputError) else error.strerror or str(error)
        warn(console, f"pixels cannot be kept in {folder.parent}: {said}; images are decoded in every epoch")
        return None, list(sets)
    starts = np.cumsum([0, *map(len, sets)])
    placed = [
        rows.remove_columns("image").add_column(PLACE, np.arange(start, start + len(rows)))  # type: ignore[call-arg]
        for start, rows in zip(starts, sets, strict=False)
    ]
    return KeptPixels(folder / TABLE, shape), placed


def _made(folder: Path, name: str, sets: "Sequence[Dataset]", reader: Shaper) -> tuple[int, ...]:
    """Write pixels, or wait for another process that does, and return their shape."""
    count, console = sum(map(len, sets)), stderr()
    while True:
        try:
            with lock_file(folder.with_suffix(".lock")):
                if (shape := _found(folder, name, count)) is not None:
                    return shape
                shape = (count, *_pixels(next(_parts(sets, 1)), reader).shape[1:])
                size = int(np.prod(shape))
                if size > (free := shutil.disk_usage(folder.parent).free):
                    raise OSError(f"they take {size / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free")
                with atomic_folder(folder, ours=True) as new:
                    digest = _write(new / TABLE, sets, reader, shape)
                    record = {"of": name, "shape": list(shape), "xxh3": digest}
                    write_json(new / RECORD, {**record, "fingerprint": fingerprint(record)})
                tell(console, f"pixels: {counted(count, 'image')} decoded once and kept in {folder}")
                return shape
        except BusyError:
            time.sleep(0.2)


def _write(path: Path, sets: "Sequence[Dataset]", reader: Shaper, shape: tuple[int, ...]) -> str:
    """Write the pixels of all sets one after the other, and return their hash."""
    digest = xxhash.xxh3_128()
    cores = usable_processors()
    with path.open("wb") as file, ThreadPoolExecutor(cores) as pool:
        parts = _parts(sets, AT_ONCE)
        # As many at a time as there are threads twice: what waits to be written is held in memory.
        while batch := list(itertools.islice(parts, 2 * cores)):
            for found in pool.map(partial(_pixels, reader=reader), batch):
                assert found.shape[1:] == shape[1:]
                content = found.contiguous().numpy().data
                digest.update(content)
                file.write(content)
    return digest.hexdigest()


def _pixels(rows: list[dict[str, Any]], reader: Shaper) -> "Tensor":
    try:
        return reader.shaped(reader.decoded(rows))
    except InputError as error:
        raise _Unreadable(error) from error


def _parts(sets: "Sequence[Dataset]", size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the index and image of features, `size` rows at a time."""
    for rows in sets:
        for batch in rows.select_columns(["index", "image"]).iter(size):
            yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _found(folder: Path, name: str, count: int) -> tuple[int, ...] | None:
    """Return the shape of the pixels in a folder; None when there are none, or they are not as they were written."""
    if not folder.exists():
        return None
    problem = "it is damaged"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        seal, shape = record.pop("fingerprint"), tuple(record["shape"])
        about = (folder / TABLE).stat()
        known = (str(folder), about.st_size, about.st_mtime_ns)
        if seal != fingerprint(record) or record["of"] != name or shape[0] != count:
            problem = f"{RECORD} was changed after it was written"
        elif about.st_size != np.prod(shape):
            problem = f"{TABLE} has {about.st_size:,} bytes, not {np.prod(shape):,}"
        elif known not in _whole and quick_hash_of_file(folder / TABLE) != record["xxh3"]:
            problem = f"{TABLE} was changed after it was written (its hash differs)"
        else:
            _whole.add(known)
            return shape
    tell(stderr(), f"cache: {folder} is made again: {problem}")
    return None
