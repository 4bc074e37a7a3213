"""The built-in `shapes` task: images of 32 x 32 pixels with one shape each, made on the spot from a seed.

A shape of one of ten classes is drawn anywhere, at any size from 16 to 26 pixels and a little turned, lighter than its
background; then every pixel gets noise. The class is in the outline alone. Images are encoded as PNG,
without compression, so that the same seed gives the same bytes anywhere.
"""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from kdcli.data.columns import Column, Columns
from kdcli.data.sets import NamedSet

if TYPE_CHECKING:
    import numpy as np

SIZE = 32
SIZES = {"train": 4000, "validation": 500}
NOISE = 24
"""Most that noise adds to a channel, or takes from it, of 255."""
DARK, LIGHT = 96, 144
"""What the channels of backgrounds are below, and those of shapes not below."""
FINE = 2
"""Points along each side of a pixel at which a shape is drawn, so that its edges are smooth."""

Outline = Callable[["np.ndarray", "np.ndarray"], "np.ndarray"]
"""From coordinates, -1 to 1 across the shape, x to the right and y down, to what is inside."""

OUTLINES: dict[str, Outline] = {
    "bar": lambda x, y: (abs(x) <= 1) & (abs(y) <= 0.3),
    "cross": lambda x, y: (abs(x) <= 0.3) & (abs(y) <= 1) | (abs(y) <= 0.3) & (abs(x) <= 1),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "disc": lambda x, y: x * x + y * y <= 1,
    "frame": lambda x, y: (abs(x) <= 0.9) & (abs(y) <= 0.9) & ((abs(x) >= 0.5) | (abs(y) >= 0.5)),
    "moon": lambda x, y: (x * x + y * y <= 1) & ((x - 0.6) ** 2 + y * y >= 0.7),
    "pillar": lambda x, y: (abs(y) <= 1) & (abs(x) <= 0.3),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.3),
    "square": lambda x, y: (abs(x) <= 0.85) & (abs(y) <= 0.85),
    "triangle": lambda x, y: (y <= 0.8) & (y >= 2 * abs(x) - 1),
}

LABELS = tuple(OUTLINES)


def shapes(seed: int = 0) -> "dict[str, tuple[np.ndarray, np.ndarray]]":
    """Return {"train": ..., "validation": ...}: pixels (n, 32, 32, 3), uint8, and labels (n,)."""
    import numpy as np

    return {
        split: _drawn(np.random.default_rng([seed, number]), size) for number, (split, size) in enumerate(SIZES.items())
    }


def _drawn(generator: "np.random.Generator", size: int) -> "tuple[np.ndarray, np.ndarray]":
    import numpy as np

    labels = generator.permutation(np.arange(size) % len(LABELS))
    radius = generator.uniform(8, 13, size)
    middle = generator.uniform(radius[:, None] + 1, SIZE - 1 - radius[:, None], (size, 2))
    angle = generator.uniform(-0.25, 0.25, size)
    colours = _colours(generator, size)
    noise = generator.integers(-NOISE, NOISE + 1, (size, SIZE, SIZE, 3))
    points = (np.arange(SIZE * FINE) + 0.5) / FINE
    pixels = np.empty((size, SIZE, SIZE, 3), np.uint8)
    for i, label in enumerate(labels):
        x, y = (points[None, :] - middle[i, 0]) / radius[i], (points[:, None] - middle[i, 1]) / radius[i]
        turned = x * np.cos(angle[i]) + y * np.sin(angle[i]), y * np.cos(angle[i]) - x * np.sin(angle[i])
        inside = OUTLINES[LABELS[label]](*turned).reshape(SIZE, FINE, SIZE, FINE).sum((1, 3))[..., None]
        back, front = colours[i]
        mixed = (inside * front + (FINE * FINE - inside) * back) // (FINE * FINE)
        pixels[i] = (mixed + noise[i]).clip(0, 255)
    return pixels, labels


def _colours(generator: "np.random.Generator", size: int) -> "np.ndarray":
    """Return the colours of background and shape, (n, 2, 3)."""
    import numpy as np

    return np.stack([generator.integers(0, DARK, (size, 3)), generator.integers(LIGHT, 256, (size, 3))], 1)


def _encoded(pixels: "np.ndarray") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def _columns(seed: int) -> dict[str, Columns]:
    import pyarrow as pa

    from kdcli.data.images import check_pillow, read_images

    check_pillow()
    found: dict[str, Columns] = {}
    for split, (pixels, labels) in shapes(seed).items():
        columns = {"image": Column([pa.array(map(_encoded, pixels), pa.large_binary())])}
        images = read_images(columns, "image", f"shapes {split}", [])
        found[split] = {"image": Column(images.chunks), "label": Column([labels.tolist()])}
    return found


SHAPES = NamedSet(
    "shapes",
    "image-classification",
    {"image": "image", "labels": list(LABELS)},
    ("accuracy", "top5_accuracy", "f1"),
    "built-in generator",
    _columns,
)
