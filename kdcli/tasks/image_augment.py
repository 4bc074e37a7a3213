"""Training images that change in each epoch: flipped, cropped, by RandAugment, mixed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.tasks.image_fields import BINS, AugmentFields, RandAugmentFields

if TYPE_CHECKING:
    from torch import Tensor

TRIES = 10
"""How often an area and a shape are drawn that may not fit an image; after that the whole image is taken."""

FLIP, CROP, RESIZED_CROP, OPERATIONS = range(4)
"""Streams of random numbers: what one transform draws does not depend on which others there are."""


def uniforms(parts: list[int], index: np.ndarray, count: int) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for each index, (n, count), which follow from `parts` and it alone.

    A counter-based generator: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 16) over one part after
    the other.
    """
    state = np.zeros(1, np.uint64)
    for part in [*parts, index]:
        state = _mixed(state ^ np.asarray(part).astype(np.uint64))
    drawn = _mixed(state[:, None] ^ np.arange(1, count + 1, dtype=np.uint64))
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Augment:
    """The changes that fields ask for. classes: of the task, whose labels mixup makes shares of."""

    fields: AugmentFields
    seed: int
    classes: int

    def __call__(self, images: "Tensor", index: np.ndarray, epoch: int) -> "Tensor":
        """Return uint8 images (n, channels, height, width) changed, each by its own draws. index: (n,)."""
        fields, draw = self.fields, partial(self._draw, index, epoch)
        if fields.crop is not None:
            images = _cropped(images, fields.crop, draw(CROP, 2))
        if fields.random_resized_crop is not None:
            least, most = fields.random_resized_crop
            images = _resized_crops(images, least, most, draw(RESIZED_CROP, 4 * TRIES))
        if fields.flip:
            images = _flipped(images, draw(FLIP, 1)[:, 0] < 0.5)
        if fields.rand_augment:
            how = fields.rand_augment if isinstance(fields.rand_augment, RandAugmentFields) else RandAugmentFields()
            images = _rand_augmented(images, how.magnitude, draw(OPERATIONS, 2 * how.operations))
        return images

    def _draw(self, index: np.ndarray, epoch: int, stream: int, count: int) -> np.ndarray:
        return uniforms([self.seed, epoch, stream], index, count)

    def mixed(self, pixels: "Tensor", labels: "Tensor", index: np.ndarray, epoch: int) -> "tuple[Tensor, Tensor]":
        """Return the pixels of each example mixed with those of the next one of the batch, and shares of the classes.

        labels: (n,). shares: (n, classes). The batch has one share, which follows from seed, epoch and its indices.
        Source: Zhang et al. 2018 (arXiv 1710.09412), section 2.
        """
        import torch
        from torch.nn import functional

        assert self.fields.mixup is not None
        generator = np.random.default_rng([self.seed, epoch, *index.tolist()])
        share = float(generator.beta(self.fields.mixup, self.fields.mixup))
        shares = functional.one_hot(labels, self.classes).float()
        return (
            torch.lerp(pixels.roll(-1, 0), pixels, share),
            torch.lerp(shares.roll(-1, 0), shares, share),
        )


def _flipped(images: "Tensor", chosen: np.ndarray) -> "Tensor":
    import torch
    from torchvision.transforms.v2 import functional as transforms

    return torch.where(torch.from_numpy(chosen)[:, None, None, None], transforms.horizontal_flip(images), images)


def _cropped(images: "Tensor", padding: int, draws: np.ndarray) -> "Tensor":
    """Return as much of each padded image as it was large. draws: (n, 2), of its top and left."""
    import torch
    from torchvision.transforms.v2 import functional as transforms

    height, width = images.shape[-2:]
    padded = transforms.pad(images, [padding])
    places = (draws * (2 * padding + 1)).astype(np.int64).tolist()
    return torch.stack([padded[i, :, t : t + height, x : x + width] for i, (t, x) in enumerate(places)])


def _resized_crops(images: "Tensor", least: float, most: float, draws: np.ndarray) -> "Tensor":
    """Return a part of each image, of a share of its area and an aspect ratio of 3/4 to 4/3, at the image's size.

    draws: (n, 4 x tries), of area, ratio, top and left; the first that fits is taken.
    Source: Szegedy et al. 2015 (arXiv 1409.4842), section 6; torchvision's RandomResizedCrop.
    """
    import torch
    from torchvision.transforms.v2 import functional as transforms

    height, width = images.shape[-2:]
    area, ratio, top, left = draws.reshape(len(draws), 4, TRIES).transpose(1, 0, 2)
    area = height * width * (least + (most - least) * area)
    ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * ratio)
    high, wide = np.rint(np.sqrt(area / ratio)).astype(int), np.rint(np.sqrt(area * ratio)).astype(int)
    fits = (high > 0) & (high <= height) & (wide > 0) & (wide <= width)
    found, first = fits.any(1), fits.argmax(1)
    rows = np.arange(len(images))
    high, wide = np.where(found, high[rows, first], height), np.where(found, wide[rows, first], width)
    top = (top[rows, first] * (height - high + 1)).astype(int)
    left = (left[rows, first] * (width - wide + 1)).astype(int)
    parts = zip(images, top.tolist(), left.tolist(), high.tolist(), wide.tolist(), strict=True)
    return torch.stack([transforms.resized_crop(image, *place, [height, width]) for image, *place in parts])


def _rand_augmented(images: "Tensor", magnitude: int, draws: np.ndarray) -> "Tensor":
    """Return each image after some of the operations. draws: (n, 2 x operations), of the operation and its sign.

    Images with the same one are changed together.
    Source: Cubuk et al. 2019 (arXiv 1909.13719), section 3; the operations and their ranges are torchvision's.
    """
    import torch

    table = operations(magnitude, *images.shape[-2:])
    for operation, sign in zip(draws[:, ::2].T, draws[:, 1::2].T, strict=True):
        chosen = (operation * len(table)).astype(int)
        images = images.clone()
        for number, signs in enumerate(table):
            for change, rows in zip(signs, (sign < 0.5, sign >= 0.5) if len(signs) > 1 else (sign >= 0,), strict=True):
                if (places := torch.from_numpy(np.flatnonzero(rows & (chosen == number)))).numel():
                    images[places] = change(images[places])
    return images


def operations(magnitude: int, height: int, width: int) -> "list[tuple[Callable[[Tensor], Tensor], ...]]":
    """Return RandAugment's 14 operations on uint8 images (n, channels, height, width).

    Each is one function, or two where its strength has a sign.
    """
    import torch
    from torchvision.transforms.v2 import functional as transforms

    def level(first: float, last: float) -> float:
        # Rounded as torchvision's, so that pixels are equal.
        return float(torch.linspace(first, last, BINS)[magnitude])

    moved: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    sheared: dict[str, Any] = {**moved, "center": [0, 0]}

    def signed(change: "Callable[[float], Callable[[Tensor], Tensor]]") -> "tuple[Callable[[Tensor], Tensor], ...]":
        return change(1.0), change(-1.0)

    def affine(**given: Any) -> "Callable[[Tensor], Tensor]":
        return partial(transforms.affine, **given)

    shear, turn, strength = math.degrees(math.atan(level(0.0, 0.3))), level(0.0, 30.0), level(0.0, 0.9)
    across, down = int(level(0.0, 150.0 / 331.0 * width)), int(level(0.0, 150.0 / 331.0 * height))
    return [
        (lambda images: images,),
        signed(lambda s: affine(**{**sheared, "shear": [s * shear, 0.0]})),
        signed(lambda s: affine(**{**sheared, "shear": [0.0, s * shear]})),
        signed(lambda s: affine(**{**moved, "translate": [int(s) * across, 0]})),
        signed(lambda s: affine(**{**moved, "translate": [0, int(s) * down]})),
        signed(lambda s: partial(transforms.rotate, angle=s * turn)),
        signed(lambda s: partial(transforms.adjust_brightness, brightness_factor=1.0 + s * strength)),
        signed(lambda s: partial(transforms.adjust_saturation, saturation_factor=1.0 + s * strength)),
        signed(lambda s: partial(transforms.adjust_contrast, contrast_factor=1.0 + s * strength)),
        signed(lambda s: partial(transforms.adjust_sharpness, sharpness_factor=1.0 + s * strength)),
        (partial(transforms.posterize, bits=round(8 - magnitude / ((BINS - 1) / 4))),),
        (partial(transforms.solarize, threshold=255.0 * level(1.0, 0.0)),),
        (transforms.autocontrast,),
        (transforms.equalize,),
    ]
