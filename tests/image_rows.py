"""Images for tests: of random pixels and of several sizes, as rows of a task."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from families import tiny
from PIL import Image
from transformers import ViTImageProcessor

from kdcli.data.tables import dataset_of
from kdcli.models.save import save_model
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


def put_images(folder: Path, **processor: Any) -> dict[str, Any]:
    """Write a tiny ViT as `teacher` and rows as Parquet into a folder, and return a recipe of them for `changed`.

    processor: settings of its image processor, other than 16 x 16 pixels.
    """
    for name, count in (("train", 24), ("validation", 9)):
        content = [{"bytes": encoded(each), "path": None} for each in pictures(count, seed=count)]
        table = pa.table({"image": content, "label": ["abc"[n % 3] for n in range(count)]})
        pq.write_table(table, folder / f"{name}.parquet")
    put_model(folder / "teacher", **processor)
    return {
        "method": {"name": "kd"},
        "task": {
            "name": "pictures",
            "type": "image-classification",
            "train": "train.parquet",
            "validation": "validation.parquet",
        },
        "teacher": {"model": "teacher"},
        "student": {"form": "depth", "layers": 1},
        "train": {"max_steps": 1, "batch_size": 8, "precision": "fp32", "device": "cpu", "log_every": 1},
    }


def put_model(folder: Path, *, model: dict[str, Any] | None = None, **processor: Any) -> None:
    """Write a tiny ViT for three classes, with its image processor. model: its settings, and another
    family. processor: its settings."""
    names = dict(enumerate("abc"))
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}, "labels": 3}
    folder.mkdir()
    reads = ViTImageProcessor(**{"size": {"height": 16, "width": 16}, **processor})
    save_model(tiny(**{"family": "vit", **labels, **(model or {})}), folder, reads)
