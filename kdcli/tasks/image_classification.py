"""Image classification: one class out of several for an image."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdcli.data.columns import Columns, need_column
from kdcli.errors import InputError
from kdcli.models.heads import IMAGE_CLASSIFICATION
from kdcli.tasks.classes import ClassesKind, ClassFields

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.tasks.base import Task


class ImageFields(ClassFields):
    """The columns of own data, and the classes."""

    image: str | None = Field(
        default=None, description="The column of images of own data. Left out, the column named image."
    )
    label: str | None = Field(default=None, description="The label column. Left out, the column named label.")


class ImageClassification(ClassesKind):
    """One class out of several for an image."""

    name = "image-classification"
    title = "one class out of several for an image"
    head = IMAGE_CLASSIFICATION
    fields = ImageFields
    provides = frozenset({"labels", "classes", "one-per-example", "images"})

    def read_examples(self, columns: Columns, fields: Any, source: str) -> dict[str, Any]:
        import pyarrow as pa

        kind = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
        parts = need_column(columns, fields.image or "image", "image", source).parts
        return {"image": pa.chunked_array([pa.array(part).cast(kind) for part in parts], kind)}

    def inputs(self, fields: Any) -> dict[str, str]:
        return {"image": fields.image or "image"}

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        import pyarrow as pa

        return pa.table(self.read_examples(columns, fields, source))

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        self.encode(task.train.select(range(1)), processor, max_length)

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return the columns index, image, [labels] and length, which is 1: images are decoded batch by batch."""
        from kdcli.data.rows import stored

        table = rows.with_format("arrow")
        return stored(_features(batch) for batch in table.iter(1000))

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        return ImageCollator(processor)


def _features(batch: "pa.Table") -> "pa.RecordBatch":
    import pyarrow as pa

    names = {"index": "index", "image": "image", "label": "labels"}
    columns = {new: batch.column(old).combine_chunks() for old, new in names.items() if old in batch.column_names}
    return pa.RecordBatch.from_pydict({**columns, "length": pa.array([1] * len(batch), pa.int32())})


class ImageCollator:
    """Decodes the images of features and stacks their pixels, as the model's image processor gives them."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> "dict[str, Tensor]":
        """Return pixel_values (batch, channels, height, width), labels and index (batch,)."""
        import torch

        images = [_decoded(row["image"]) for row in rows]
        batch = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        batch["index"] = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return batch


def _decoded(image: dict[str, Any]) -> Any:
    """Return an image as Pillow's, in RGB."""
    import io

    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("images need Pillow, which is not installed", hint='pip install "kdcli[images]"') from error
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]).convert("RGB")


KIND = ImageClassification()
