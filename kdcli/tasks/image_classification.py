"""Image classification: one class out of several for an image."""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdcli.data.columns import Column, Columns
from kdcli.models.heads import IMAGE_CLASSIFICATION
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.classes import TOP, ClassesKind, ClassFields
from kdcli.tasks.image_fields import AugmentFields, told
from kdcli.tasks.kind import Encoded

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor

    from kdcli.tasks.base import Task


class ImageFields(AugmentFields, ClassFields):
    """The columns of own data, the classes, and what is done with images before a model reads them."""

    columns_of_rows = frozenset({"image", "label"})
    of_training = frozenset({*AugmentFields.model_fields, "cache_pixels"})

    image: str | None = Field(
        default=None,
        description="The column of images of own data: encoded bytes, or paths that start at the table's folder. Left "
        "out, the column named image, or the only one that holds encoded images; a folder of folders of classes needs "
        "none.",
    )
    label: str | None = Field(default=None, description="The label column. Left out, the column named label.")
    cache_pixels: bool = Field(
        default=False,
        description="Decode the training and validation images once, and keep what the image processor makes of them, "
        "as bytes, in the cache: a byte a pixel and channel. It saves nine tenths of the work of preparing a batch, "
        "which is worth it where a GPU waits for images, more than train.workers prepare.",
    )

    def check(self, task: TaskSection) -> None:
        super().check(task)
        given = [name for name in ("image", "label", "labels") if getattr(self, name) is not None]
        if given and not task.is_own:
            raise ValueError(f"{given[0]} = ... needs data, train or hub")
        if task.max_length != TaskSection.model_fields["max_length"].default:
            raise ValueError("max_length counts tokens of text: the image processor says how large an image is")


class ImageClassification(ClassesKind):
    """One class out of several for an image."""

    name = "image-classification"
    title = "one class out of several for an image"
    head = IMAGE_CLASSIFICATION
    fields = ImageFields
    provides = frozenset({"labels", "classes", "one-per-example", "images"})
    usual_metrics = ("accuracy", TOP, "f1")
    typed_as_files = True

    def with_fields(self, fields: Any) -> "ImageClassification":
        own = copy(self)
        own.inputs_change = bool(fields.augmented_by)  # type: ignore[misc]
        return own

    def splits(self, section: TaskSection, fields: Any, base: Path, notes: list[str]) -> tuple[dict[str, Columns], str]:
        from kdcli.data.image_sets import read_image_splits

        return read_image_splits(section, fields.image, base, notes)

    def columns_of_file(self, section: TaskSection, fields: Any, notes: list[str]) -> Columns:
        from kdcli.data.image_sets import read_images_of

        assert section.data is not None
        return read_images_of(section.data, Path(), section, fields.image, "--data", notes)

    def read_examples(self, columns: Columns, fields: Any, source: str) -> dict[str, Any]:
        from kdcli.data.images import image_column, read_images

        return {"image": read_images(columns, image_column(columns, fields.image, source), source)}

    def inputs(self, fields: Any) -> dict[str, str]:
        return {"image": fields.image or "image"}

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        import pyarrow as pa

        return pa.table(self.read_examples(columns, fields, source))

    def typed(self, texts: Sequence[str], where: str, notes: list[str], folder: Path | None = None) -> Column:
        from kdcli.data.image_sets import read_image_files

        return read_image_files(texts, where, notes, folder=folder)

    def columns_of_inputs(self, path: Path, section: TaskSection, fields: Any, notes: list[str]) -> Columns:
        from kdcli.data.image_sets import read_image_files, read_images_of
        from kdcli.data.images import suffixes

        if path.is_dir() or path.suffix.lower() in suffixes():
            return {fields.image or "image": read_image_files([str(path)], "--input", notes)}
        return read_images_of(str(path), Path(), section, fields.image, "--input", notes)

    def shown_inputs(self, rows: "pa.Table", fields: Any) -> list[dict[str, Any]]:
        from kdcli.data.images import name_of

        return [{"image": name_of(image)} for image in rows.column("image").to_pylist()]

    def script(self, fields: Any, config: Any, processor: Any, max_length: int) -> str:
        from kdcli.models.processors import channels_of
        from kdcli.tasks.image_script import lines_for

        collator = self.collator(processor)

        def make(files: list[bytes]) -> "np.ndarray":
            rows = [{"index": 0, "image": {"bytes": file, "path": None}} for file in files]
            return collator(rows)["pixel_values"].numpy()

        return lines_for(processor, channels_of(processor), make) + self.script_of_logits(config)

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.tasks.image_inputs import ImageCollator, check_steps, reader_of

        reader = reader_of(processor)
        check_steps(reader, task.fields)
        ImageCollator(reader)(list(self.encode(task.train.select(range(1)), processor, max_length)))

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        from kdcli.tasks.image_inputs import encode

        return encode(rows, processor)

    def collator(self, processor: Any) -> "Callable[[list[dict[str, Any]]], dict[str, Tensor]]":
        from kdcli.tasks.image_inputs import ImageCollator, reader_of

        return ImageCollator(reader_of(processor))

    def prepare(self, task: "Task", processor: Any, max_length: int, *, seed: int = 0) -> Encoded:
        """Return features: the images of training are changed when they are collated, others never."""
        from kdcli.tasks.image_inputs import prepare

        train, selection = (self.feed(rows, processor, max_length) for rows in (task.train, task.selection))
        return Encoded(*prepare(train, selection, processor, task.fields, seed=seed, classes=len(task.label_names)))

    def prepare_sample(self, task: "Task", processor: Any, max_length: int, *, seed: int = 0) -> Encoded:
        """Return features as they are scored: what is looked at once is neither changed nor kept."""
        return super().prepare(task, processor, max_length, seed=seed)

    def drawn(self, fields: Any) -> dict[str, Any]:
        return fields.model_dump(include=set(fields.augmented_by))  # type: ignore[no-any-return]

    def remarks(self, task: "Task", processor: Any, max_length: int) -> list[str]:
        notes = super().remarks(task, processor, max_length)
        if self.inputs_change:
            notes.append(
                f"{told(task.fields)} training images in every epoch: what the teacher says of them is not cached"
            )
        return notes


KIND = ImageClassification()
