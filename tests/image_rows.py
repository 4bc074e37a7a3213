"""Images for tests: of random pixels and of several sizes, as rows of a task."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from PIL import Image

from kdcli.data.tables import dataset_of
from kdcli.tasks import registry
from kdcli.tasks.base import Task

SIZES = ((20, 24), (16, 16), (33, 17))


def pictures(count: int, *, seed: int = 0, mode: str = "RGB") -> list[Image.Image]:
    """Return smooth random images of three sizes (width, height)."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    images = [Image.fromarray(each).resize(SIZES[n % 3], Image.Resampling.BICUBIC) for n, each in enumerate(drawn)]
    return [image.convert(mode) for image in images]


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    """Return the bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def rows_of(images: list[Any], labels: list[int] | None = None) -> Dataset:
    """Return rows of images (Pillow's, or bytes of files), with classes 0, 1, 2, 0, ... where none are given."""
    content = [image if isinstance(image, bytes) else encoded(image) for image in images]
    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
    column = pa.array([{"bytes": each, "path": None} for each in content], kind)
    return dataset_of(pa.table({"image": column, "label": labels or [n % 3 for n in range(len(images))]}))


def task_of(train: Dataset, selection: Dataset, **fields: Any) -> Task:
    """Return a task of three classes. fields: of `[task]`, beside the common ones."""
    listed = registry.get("image-classification")
    own = listed.fields(**fields)
    return Task("pictures", listed.with_fields(own), own, ("a", "b", "c"), ("accuracy",), train, selection, {})
