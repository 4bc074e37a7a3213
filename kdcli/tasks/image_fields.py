"""The fields of `[task]` that say how training images change."""

from typing import Annotated

from pydantic import Field, field_validator

from kdcli.recipe.schema import PositiveFloat, Section, TaskSection
from kdcli.tasks.kind import Fields
from kdcli.words import joined

BINS = 31
"""Magnitudes of RandAugment: 0 to 30."""


class RandAugmentFields(Section):
    """How RandAugment changes an image."""

    operations: Annotated[int, Field(ge=1, le=14)] = Field(
        default=2, description="How many operations are applied to an image, one after the other."
    )
    magnitude: Annotated[int, Field(ge=0, le=BINS - 1)] = Field(
        default=9, description="How strong they are, from 0 to 30."
    )


class AugmentFields(Fields):
    """How training images are changed in each epoch; left out, they are not. A fine-tuned teacher sees the same."""

    flip: bool = Field(
        default=False, description="Mirror a training image left to right, or not, drawn again in every epoch."
    )
    crop: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None,
        description="Pixels of black padding around a training image, of which as much as the image's size is cut out "
        "at random. Left out, images are not cropped.",
    )
    random_resized_crop: (
        Annotated[list[Annotated[float, Field(gt=0.0, le=1.0)]], Field(min_length=2, max_length=2)] | None
    ) = Field(
        default=None,
        description="Cut a random part out of a training image and resize it to the image's size: the least and the "
        "largest share of the area, such as [0.8, 1.0]. It is cut out of what the image processor made. Left out, "
        "images are not cropped.",
    )
    rand_augment: bool | RandAugmentFields = Field(
        default=False,
        description="Change training images by RandAugment: true, or { operations = 2, magnitude = 9 }, which are the "
        "defaults.",
    )
    mixup: PositiveFloat | None = Field(
        default=None,
        description="Mix each training image of a batch with another one, pixels and labels, in a share drawn from "
        "Beta(a, a): this is a, such as 0.2. The teacher sees the mixed images. Left out, images are not mixed.",
    )

    @field_validator("random_resized_crop")
    @classmethod
    def _rising(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"the least share comes first: [{value[1]}, {value[0]}]")
        return value

    def check(self, task: TaskSection) -> None:
        super().check(task)
        if self.crop is not None and self.random_resized_crop is not None:
            raise ValueError("crop and random_resized_crop both crop an image: give one of them")

    @property
    def augmented_by(self) -> list[str]:
        """The names of the fields that change training images."""
        return [name for name in AugmentFields.model_fields if getattr(self, name)]


def told(fields: AugmentFields) -> str:
    """Return the fields that change training images, with the verb of a message: "flip and crop change"."""
    return f"{joined(fields.augmented_by)} {'change' if len(fields.augmented_by) > 1 else 'changes'}"
