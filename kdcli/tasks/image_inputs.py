"""From images to batches: decoded, shaped by the model's image processor, changed while training, scaled, stacked."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.data.images import decoded, stamp_of_file
from kdcli.data.rows import stored
from kdcli.errors import InputError
from kdcli.machine import usable_processors
from kdcli.models.hashing import CONTENT
from kdcli.models.processors import channels_of, hash_of_processor
from kdcli.tasks.pixel_cache import PLACE, KeptPixels, keep_pixels

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.tasks.image_augment import Augment

CHANGES = "changes"
"""A column of features whose images are changed in each epoch: those of training."""

LARGE = 2**20
"""Encoded bytes of a batch from which on threads take less time than they cost."""

MOST_THREADS = 8
"""Threads that decode at a time."""

ROWS = 1000
"""Features that are made at a time."""


@dataclass(frozen=True)
class Reader:
    """How images become what a model reads, by its image processor.

    in_steps: they may be shaped first, as bytes, and scaled afterwards, to the bit.
    """

    processor: Any
    mode: str
    in_steps: bool

    def decoded(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the images of features as Pillow's. Raises InputError, with its file or row, for one that cannot."""
        return [decoded(row["image"], row=row["index"], mode=self.mode) for row in rows]

    def shaped(self, images: Sequence[Any]) -> "Tensor":
        """Return images as uint8 pixels of the model's size, (n, channels, height, width)."""
        found: Tensor = self.processor(
            list(images), do_rescale=False, do_normalize=False, return_tensors="pt"
        ).pixel_values
        return found

    def scaled(self, images: "Tensor") -> "Tensor":
        """Return what a model reads of uint8 pixels, fp32."""
        own = self.processor
        if not hasattr(own, "rescale_and_normalize"):
            found: Tensor = own(images, **AS_THEY_ARE, return_tensors="pt").pixel_values
            return found
        mean, std = (
            tuple(each) if isinstance(each, list | tuple) else each for each in (own.image_mean, own.image_std)
        )
        return own.rescale_and_normalize(
            images, own.do_rescale, own.rescale_factor, own.do_normalize, mean, std
        ).float()

    def whole(self, images: Sequence[Any]) -> "Tensor":
        """Return what a model reads of images, fp32, (n, channels, height, width): what the processor gives."""
        if self.in_steps:
            return self.scaled(self.shaped(images))
        found: Tensor = self.processor(list(images), return_tensors="pt").pixel_values
        return found


AS_THEY_ARE = dict.fromkeys(("do_resize", "do_center_crop", "do_pad", "do_convert_rgb"), False)
"""Of an image processor's steps those that shape an image, left out."""


def reader_of(processor: Any) -> Reader:
    """Return how images are read by an image processor: in two steps where two images show that it has these."""
    import torch
    from PIL import Image

    mode = "L" if channels_of(processor) == 1 else "RGB"
    reader = Reader(processor, mode, True)
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(each).convert(mode) for each in noise]
    try:
        pixels = reader.shaped(images)
        in_steps = pixels.dtype == torch.uint8 and torch.equal(
            reader.scaled(pixels), processor(images, return_tensors="pt").pixel_values
        )
    except Exception:
        # What a processor makes of steps that it has not has no common type; those of a hub may be of any kind.
        in_steps = False
    return Reader(processor, mode, in_steps)


def check_steps(reader: Reader, fields: Any) -> None:
    """Raise InputError where the fields of a task need images as bytes, and the image processor gives none."""
    if not reader.in_steps and (given := [*fields.augmented_by, *["cache_pixels"] * fields.cache_pixels]):
        raise InputError(
            f"{given[0]} works on images as bytes, and {type(reader.processor).__name__} does not shape an image "
            "before it scales its pixels",
            where=f"task.{given[0]}",
            hint="leave it out",
        )


def encode(rows: "Dataset", processor: Any) -> "Dataset":
    """Return the columns index, image, content, [labels] and length, which is 1: images stay what they are."""
    name = hash_of_processor(processor)
    return stored(_features(batch, name) for batch in rows.with_format("arrow").iter(ROWS))


def _features(batch: "pa.Table", processor: str) -> "pa.RecordBatch":
    import pyarrow as pa

    names = {"index": "index", "image": "image", "label": "labels"}
    columns = {new: batch.column(old).combine_chunks() for old, new in names.items() if old in batch.column_names}
    images = columns["image"]
    parts = [images.field(number) for number in range(images.type.num_fields)]
    each = dict(zip((field.name for field in images.type), parts, strict=True))
    stamps = each["stamp"].to_pylist() if "stamp" in each else [None] * len(batch)
    content = [
        _content(data, path, stamp, processor)
        for data, path, stamp in zip(each["bytes"], each["path"].to_pylist(), stamps, strict=True)
    ]
    return pa.RecordBatch.from_pydict(
        {**columns, CONTENT: pa.array(content, pa.string()), "length": pa.array([1] * len(batch), pa.int32())}
    )


def _content(data: "pa.Scalar", path: str | None, stamp: str | None, processor: str) -> str:
    """Return 16 hex digits that name an image and what reads it. stamp: of its bytes, or of the file at `path`."""
    of = [processor]
    if data.is_valid:
        of.append(stamp or hashlib.blake2b(data.as_buffer()).hexdigest())
    else:
        assert path is not None
        of += [path, stamp or stamp_of_file(os.stat(path))]
    return hashlib.blake2b("\0".join(of).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class ImageCollator:
    """Makes batches of features: pixel_values (batch, channels, height, width), labels, index.

    Decodes what is not kept. Features with the column `changes` are changed by `augment`, others in the same way
    whatever the epoch; with mixup their labels are shares of the classes, (batch, classes). The pixels of an example
    depend on its image, on seed, epoch and index, and with mixup on the indices of the batch; not on what other
    processes do.
    """

    def __init__(self, reader: Reader, augment: "Augment | None" = None, kept: KeptPixels | None = None) -> None:
        self.reader = reader
        self.augment = augment
        self.kept = kept
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        """Change training images in other ways from now on."""
        self.epoch = epoch

    def __call__(self, rows: list[dict[str, Any]]) -> "dict[str, Tensor]":
        """Return a batch. Raises InputError, with its file or row, for an image that cannot be decoded."""
        import torch

        changes = self.augment is not None and CHANGES in rows[0]
        index = np.array([row["index"] for row in rows], np.int64)
        pixels = self._pixels(rows, index if changes else None)
        batch = {"pixel_values": pixels, "index": torch.from_numpy(index)}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if self.augment is not None and changes and self.augment.fields.mixup is not None:
            mixed = self.augment.mixed(pixels, batch["labels"], index, self.epoch)
            batch["pixel_values"], batch["labels"] = mixed
        return batch

    def _pixels(self, rows: list[dict[str, Any]], index: np.ndarray | None) -> "Tensor":
        """Return what a model reads of rows. index: of those that are changed; None where none are."""
        if self.kept is not None and PLACE in rows[0]:
            images = self.kept.read(np.array([row[PLACE] for row in rows], np.int64))
        else:
            found = self._decoded(rows)
            if index is None:
                return self.reader.whole(found)
            images = self.reader.shaped(found)
        if index is not None and self.augment is not None:
            images = self.augment(images, index, self.epoch)
        return self.reader.scaled(images)

    def _decoded(self, rows: list[dict[str, Any]]) -> list[Any]:
        """Return the images of rows: decoded by threads where they are large, and no other processes decode."""
        from torch.utils.data import get_worker_info

        # A file's size is not looked up: most are large.
        size = sum(LARGE if (content := row["image"]["bytes"]) is None else len(content) for row in rows)
        threads = min(usable_processors(), MOST_THREADS, len(rows))
        if size < LARGE or threads == 1 or get_worker_info() is not None:
            return self.reader.decoded(rows)
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(self.reader.decoded, ([row] for row in rows))
            return [image for part in parts for image in part]


def prepare(
    train: "Dataset", selection: "Dataset", processor: Any, fields: Any, *, seed: int, classes: int
) -> "tuple[Dataset, Dataset, ImageCollator]":
    """Return encoded training and validation rows with what the fields of a task ask for, and their collator.

    Raises InputError as `check_steps` does.
    """
    from kdcli.tasks.image_augment import Augment

    kept, reader = None, reader_of(processor)
    check_steps(reader, fields)
    if fields.cache_pixels:
        kept, (train, selection) = keep_pixels([train, selection], reader)
    augment = None
    if fields.augmented_by:
        augment = Augment(fields, seed, classes)
        train = train.add_column(CHANGES, np.ones(len(train), bool))  # type: ignore[call-arg]
    return train, selection, ImageCollator(reader, augment, kept)
