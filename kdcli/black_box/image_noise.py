"""Noised copies of images: Gaussian noise on pixels."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.data.images import decoded
from kdcli.tasks.image_inputs import reader_of

if TYPE_CHECKING:
    from PIL import Image

RANGE = 255.0
"""The range of pixel values."""


@dataclass(frozen=True)
class ImageNoise:
    """How images are changed a little: Gaussian noise of one strength on each value of each pixel, rounded and cut.

    ratio: the standard deviation, as a share of the range of pixel values. size: what a model reads, (height, width); a
    larger image is shrunk first, as far as it still covers that, so that noise is as strong on images of any size.
    mode: "RGB", or "L" for one channel. A copy depends on the seed, the example and the copy's number alone.
    Noise of one strength is what a decision is modelled under (Zhou et al. 2023, decision-based estimation): the share
    of decisions then tells how far away, in standard deviations, the boundary to another class lies, as in randomized
    smoothing (Cohen et al. 2019, arXiv 1902.02918, theorem 1).
    """

    ratio: float
    seed: int
    size: tuple[int, int]
    mode: str = "RGB"

    @classmethod
    def for_processor(cls, processor: Any, ratio: float, seed: int) -> "ImageNoise":
        """Return the noise for a model that reads by this image processor."""
        from PIL import Image

        reader = reader_of(processor)
        height, width = reader.whole([Image.new(reader.mode, (64, 64))]).shape[-2:]
        return cls(ratio, seed, (height, width), reader.mode)

    @property
    def identity(self) -> list[Any]:
        """What copies depend on, beside `ratio` and `seed`."""
        return [list(self.size), self.mode]

    def copies(
        self, image: Mapping[str, Any], example: int, numbers: Sequence[int], field: str
    ) -> list[dict[str, Any]]:
        """Return numbered copies of a row's image as PNG files in memory; copy 0 has no noise.

        Raises InputError for an image that cannot be decoded.
        """
        pixels = np.asarray(self._shrunk(decoded(image, row=example, mode=self.mode)))
        return [_png(self._noised(pixels, example, number)) for number in numbers]

    def _shrunk(self, image: "Image.Image") -> "Image.Image":
        from PIL import Image

        share = max(self.size[0] / image.height, self.size[1] / image.width)
        if share >= 1.0:
            return image
        return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BICUBIC)

    def _noised(self, pixels: np.ndarray, example: int, number: int) -> np.ndarray:
        if number == 0:
            return pixels
        noise = np.random.default_rng([self.seed, example, number]).standard_normal(pixels.shape, np.float32)
        return np.clip(np.rint(pixels + noise * (self.ratio * RANGE)), 0.0, RANGE).astype(np.uint8)


def _png(pixels: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    # Noise cannot be compressed: the least effort is enough.
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}
