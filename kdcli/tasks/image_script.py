"""Lines of a script that make pixels as an image processor does, with Pillow and NumPy alone; checked against it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

LEVELS = 2.5
"""How far a pixel may be from the processor's, in its 256 levels: two round at several places."""

SIZES = ((37, 53), (300, 400), (400, 300), (225, 640), (640, 225))
"""Height and width of the images that both are compared on."""

OPEN = """\
def pixels(image):
    image = image.convert("RGBA") if (image := ImageOps.exif_transpose(image)).mode == "P" else image
    image = (Image.fromarray(np.uint8(np.asarray(image) >> 8)) if image.mode[0] == "I" else image).convert("{mode}")
"""

"""A palette may have shades of transparency, which Pillow warns of; the script has 20 lines at most."""

SHORTEST = "    width, height = (int({side} * side / min(image.size)) for side in image.size)\n"

RESIZE = "    image = image.resize(({width}, image.height), {resample}).resize(({width}, {height}), {resample})\n"
"""Width first, as torchvision does; Pillow alone would begin with the side that shrinks more."""

CROP = """\
    left, top = int((image.width - {width}) / 2), int((image.height - {height}) / 2)
    image = image.crop((left, top, left + {width}, top + {height}))
"""

SCALE = """\
    mean, std = np.float32([[{mean}], [{std}]])
    return ((np.atleast_3d(np.float32(image)) - mean) / std).transpose(2, 0, 1)[None]
"""

ASK = """\


logits = (session.run(["logits"], {"pixel_values": pixels(Image.open(name))})[0][0] for name in sys.argv[1:])
"""


@dataclass(frozen=True)
class Steps:
    """What becomes of an image.

    side: of its shorter edge, or size: its width and height; neither where it keeps its own. resample: Pillow's number.
    crop: width and height. mean, std: of the levels 0 to 255, by channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int | None = None
    size: tuple[int, int] | None = None
    resample: int = 2
    crop: tuple[int, int] | None = None

    def lines(self) -> str:
        """Return a function `pixels` from an image of Pillow to an array (1, channels, height, width)."""
        found = OPEN.format(mode="L" if len(self.mean) == 1 else "RGB")
        width, height = self.size or ("width", "height")
        if self.side is not None:
            found += SHORTEST.format(side=self.side)
        if self.side is not None or self.size is not None:
            found += RESIZE.format(width=width, height=height, resample=self.resample)
        if self.crop is not None:
            found += CROP.format(width=self.crop[0], height=self.crop[1])
        mean, std = (", ".join(f"{value:.9g}" for value in values) for values in (self.mean, self.std))
        return found + SCALE.format(mean=mean, std=std)


def lines_for(processor: Any, channels: int, make: "Callable[[list[bytes]], np.ndarray]") -> str:
    """Return lines that define `pixels` and `logits`, an iterator over arrays (classes,), one for each file.

    make: from encoded images to pixels (n, channels, height, width), as models get them.
    Raises InputError, with the reason, where the lines would give other pixels.
    """
    steps = _steps(processor, channels)
    lines = steps.lines()
    _check(lines, steps, make)
    return lines + ASK


def _steps(processor: Any, channels: int) -> Steps:
    """Return the steps of a processor that has the library's usual settings."""

    def given(name: str, needed_by: str) -> Any:
        return getattr(processor, name, None) if getattr(processor, needed_by, None) else None

    scale = 1 / (given("rescale_factor", "do_rescale") or 1)
    mean, std = (
        tuple(scale * value for value in _of_channels(given(name, "do_normalize"), default, channels))
        for name, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    if getattr(processor, "do_pad", None):
        raise InputError("it pads images")
    size, crop = given("size", "do_resize"), given("crop_size", "do_center_crop")
    sizes: dict[str, Any] = {}
    if size is not None and not (size.get("height") and size.get("width")):
        sizes["side"] = size.get("shortest_edge")
        if sizes["side"] is None or size.get("longest_edge"):
            raise InputError(f"it resizes by {' and '.join(name for name, value in dict(size).items() if value)}")
    elif size is not None:
        sizes["size"] = (size["width"], size["height"])
    if crop is not None:
        sizes["crop"] = (crop["width"], crop["height"])
    resample = getattr(processor, "resample", None)
    return Steps(mean, std, resample=2 if resample is None else int(resample), **sizes)


def _of_channels(values: Any, default: float, channels: int) -> tuple[float, ...]:
    values = default if values is None else values
    found = tuple(values) if isinstance(values, list | tuple) else (values,)
    return found * channels if len(found) == 1 else found


def _check(lines: str, steps: Steps, make: "Callable[[list[bytes]], np.ndarray]") -> None:
    """Raise InputError where lines give other pixels than what models get, on images of noise."""
    import io

    import numpy as np
    from PIL import Image, ImageOps

    code: CodeType = compile(lines, "pixels", "exec")
    known: dict[str, Any] = {"np": np, "Image": Image, "ImageOps": ImageOps}
    exec(code, known)
    drawn = np.random.default_rng(0)
    std = np.asarray(steps.std)[:, None, None]
    for height, width in SIZES:
        image = Image.fromarray(drawn.integers(0, 256, (height, width, 3), dtype=np.uint8))
        file = io.BytesIO()
        image.save(file, "PNG")
        own, theirs = known["pixels"](_opened(file)), make([file.getvalue()])
        if own.shape != theirs.shape:
            raise InputError(f"it makes {' x '.join(map(str, theirs.shape[2:]))} pixels of {height} x {width}")
        if not (worst := float(np.abs((own - theirs) * std).max())) <= LEVELS:
            raise InputError(f"its pixels are up to {worst:.0f} of 255 levels from Pillow's")


def _opened(file: Any) -> "Image.Image":
    from PIL import Image

    file.seek(0)
    return Image.open(file)
