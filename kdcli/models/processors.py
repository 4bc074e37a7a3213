"""What a model reads by: the tokenizer of one that reads texts, the image processor of one that reads images."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdcli.errors import InputError, cut
from kdcli.files import fingerprint
from kdcli.models import families
from kdcli.models.checkpoint import check_beside, check_config, local_folder, read_config
from kdcli.models.hashing import hash_of_tokenizer
from kdcli.models.image_size import reads_size
from kdcli.models.load import check_same_tokens, check_tokenizer, load_tokenizer
from kdcli.models.quiet import quiet_transformers
from kdcli.models.shape import both_sides, shape_of
from kdcli.words import counted

SETTINGS, WITH_TEXTS = "preprocessor_config.json", "processor_config.json"
"""The file that an image processor is kept in."""


def load_processor(name: str | Path, revision: str | None = None) -> Any:
    """Return the tokenizer, or the image processor, of a folder or a hub name, at a revision of it.

    The model's family says which; a folder without a model holds either. Raises InputError when there is none.
    """
    return load_image_processor(name, revision) if _reads_images(name, revision) else load_tokenizer(name, revision)


def _reads_images(name: str | Path, revision: str | None) -> bool:
    folder = local_folder(name)
    if folder is not None and not (folder / "config.json").is_file():
        return (folder / SETTINGS).is_file()
    try:
        return check_config(read_config(name, revision), name).reads == "images"
    except InputError:
        # What reads by a tokenizer may be a folder of a tokenizer alone, or of any family.
        return False


def needs_torchvision() -> None:
    """Raise InputError where torchvision or Pillow, which image processors work with, are not installed."""
    if not all(map(find_spec, ("torchvision", "PIL"))):
        raise InputError("images need torchvision and Pillow", hint='pip install "kdcli[images]"')


def load_image_processor(name: str | Path, revision: str | None = None) -> Any:
    """Return the image processor of a folder or a hub name. Raises InputError when there is none."""
    needs_torchvision()
    folder = local_folder(name)
    if (known := _of_timm(name, revision, folder)) is not None:
        return known
    if folder is not None and not any((folder / file).is_file() for file in (SETTINGS, WITH_TEXTS)):
        raise InputError(
            f"{folder} has no {SETTINGS}",
            hint="save the image processor beside the model, or set teacher.tokenizer",
        )
    if folder is not None:
        check_beside(folder)
    with quiet_transformers():
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(
                folder or name, revision=revision or "main", trust_remote_code=False
            )
        except Exception as error:
            # What broken settings make the library raise has no common type.
            raise InputError(
                f"the image processor of {name} cannot be loaded: {_unknown_type(folder) or cut(str(error))}",
                hint=f"{SETTINGS} is the file that was saved with the model; its image_processor_type names a class of "
                "transformers, such as ViTImageProcessor",
            ) from error


def _unknown_type(folder: Path | None) -> str | None:
    """Return what to say of settings in a folder that name no class of the library; None for other faults."""
    if folder is None:
        return None
    try:
        named = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["image_processor_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    import transformers

    known = isinstance(named, str) and hasattr(transformers, named)
    return None if known else f"image_processor_type is {cut(repr(named))}, which transformers does not have"


def new_image_processor(height: int, width: int) -> Any:
    """Return a processor that brings images to a size in pixels, and their values from 0 to 255 to -1 to 1."""
    needs_torchvision()
    from transformers import ViTImageProcessor

    half = [0.5, 0.5, 0.5]
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def _of_timm(name: str | Path, revision: str | None, folder: Path | None) -> Any | None:
    """Return the image processor of a model of timm, which has its settings in config.json; None of all others."""
    if folder is not None and ((folder / SETTINGS).is_file() or not (folder / "config.json").is_file()):
        return None
    config = read_config(name, revision)
    if not families.is_known(config["model_type"]) or check_config(config, name).wraps is None:
        return None
    from kdcli.models.timm_models import processor_of

    return processor_of(config, name)


def is_image_processor(processor: Any) -> bool:
    """True for an image processor, False for a tokenizer."""
    from transformers.image_processing_utils import BaseImageProcessor

    return isinstance(processor, BaseImageProcessor)


def check_processor(
    model: Any, processor: Any, max_length: int | None = None, *, where: str = "teacher.tokenizer"
) -> None:
    """Raise InputError when the model cannot read what the processor gives: of texts, of up to `max_length` tokens.

    model: anything with a `config`. where: what names the processor, or the model that it belongs to.
    """
    family = families.family_of(model.config)
    if is_image_processor(processor) != (family.reads == "images"):
        found, needed = (
            ("an image processor", "a tokenizer") if family.reads == "text" else ("a tokenizer", "an image processor")
        )
        raise InputError(
            f"this is {found}, and a model of the family {family.title} reads by {needed}",
            where=where,
            hint="use the one that the model was trained with",
        )
    if family.reads == "text":
        check_tokenizer(model, processor, max_length, where=where)
    else:
        _check_pixels(model, processor, where)


def _check_pixels(model: Any, processor: Any, where: str) -> None:
    """Raise InputError when images of any size do not become pixels that the model reads."""
    shape, channels = shape_of(model.config), channels_of(processor)
    if shape.channels not in (None, channels):
        raise InputError(
            f"the image processor gives {counted(channels, 'channel')}, as many as it has means, and the model reads "
            f"{counted(shape.channels, 'channel')}",
            where=where,
            hint=f"give as many numbers in image_mean and image_std of {SETTINGS}",
        )
    _, *size = pixels_of(processor, where)
    other = shape.image is not None and (sides := both_sides(shape.image)) != tuple(size)
    if other and not shape.any_size and not reads_size(model, *size):
        given, read = (f"{height} x {width} pixels" for height, width in (size, sides))
        raise InputError(
            f"the image processor makes images of {given}, and the model reads {read}",
            where=where,
            hint=f"set size, or crop_size, in {SETTINGS}",
        )


def pixels_of(processor: Any, where: str = "teacher.tokenizer") -> tuple[int, int, int]:
    """Return channels, height and width of what an image processor makes of every image.

    Raises InputError where images of two shapes become no such pixels. where: what names the processor.
    """
    from PIL import Image

    mode = "L" if channels_of(processor) == 1 else "RGB"
    images = [Image.new(mode, size) for size in ((90, 70), (50, 120))]
    try:
        pixels = [processor(image, return_tensors="pt").pixel_values for image in images]
    except Exception as error:
        # What settings that do not go together make the library raise has no common type.
        raise InputError(f"the image processor cannot be used: {cut(str(error))}", where=where) from error
    if not all(each.isfinite().all() for each in pixels):
        raise InputError(
            "the image processor makes pixels that are no finite numbers",
            where=where,
            hint="is there a 0 in image_std?",
        )
    found = [tuple(each.shape[1:]) for each in pixels]
    if found[0] != found[1] or len(found[0]) != 3:
        raise InputError(
            f"the image processor makes images of several sizes, which no batch can hold: {found[0]} and {found[1]} of "
            "two",
            where=where,
            hint=f"set size to a height and a width, or do_center_crop = true, in {SETTINGS}",
        )
    channels, height, width = found[0]
    return channels, height, width


def channels_of(processor: Any) -> int:
    """Return how many channels an image processor gives a pixel: as many as it has means, or 3."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, list | tuple) else 3


def check_same_reading(processor: Any, name: str | Path, where: str) -> list[str]:
    """Return what a user should know where the model `name` was trained to read other pixels than `processor` gives.

    where: what names the model. One that comes without a processor of its own is not checked.
    Raises InputError when it was trained to read other tokens.
    """
    if not is_image_processor(processor):
        check_same_tokens(processor, name, where)
        return []
    try:
        own = settings_of(load_image_processor(name))
    except InputError:
        return []
    ours = settings_of(processor)
    other = [key for key in sorted({*own, *ours} - {"image_processor_type"}) if own.get(key) != ours.get(key)]
    if not other:
        return []
    first = f"{other[0]} is {own.get(other[0])}, not {ours.get(other[0])}"
    more = f", and {counted(len(other) - 1, 'more setting')} differ" if len(other) > 1 else ""
    return [f"{name} was made for another image processor ({first}{more}): it is trained with the teacher's"]


def hash_of_processor(processor: Any) -> str:
    """Return 16 hex digits over how text becomes tokens, or an image pixels."""
    if not is_image_processor(processor):
        return hash_of_tokenizer(processor)
    return fingerprint(settings_of(processor))


def settings_of(processor: Any) -> dict[str, Any]:
    """Return what an image processor does, as JSON-able data; nothing of where it came from."""
    settings: dict[str, Any] = json.loads(processor.to_json_string())
    return {key: value for key, value in settings.items() if key not in ("_name_or_path", "name_or_path")}
