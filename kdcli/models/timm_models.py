"""What the library timm says of a model of its own: the images that it reads, how they become pixels, its classifier.

Such a model stands inside a model of transformers (`TimmWrapperForImageClassification`), and its configuration names an
architecture of timm in place of sizes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SIZE = "image_size"
"""Where a configuration keeps the height and width that a model is used with, which takes images of any size."""

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of timm's names for ways to resize."""


@dataclass(frozen=True)
class TimmImages:
    """The images of a model: channels, height, width; fixed: it takes no other height and width."""

    channels: int
    height: int
    width: int
    fixed: bool


def images_of(config: "PretrainedConfig") -> TimmImages:
    """Return the images that a model of timm reads. Raises InputError for an unknown architecture."""
    settings = _settings(config.to_dict())
    arguments = config.model_args or {}
    channels, height, width = settings.get("input_size") or (3, 224, 224)
    given = arguments.get("img_size")
    if given is not None:
        height, width = given if isinstance(given, list | tuple) else (given, given)
    fixed = given is not None or bool(settings.get("fixed_input_size"))
    if not fixed and getattr(config, SIZE, None) is not None:
        height, width = getattr(config, SIZE)
    return TimmImages(arguments.get("in_chans", channels), height, width, fixed)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm knows of a model's images: as its configuration says, or else as the architecture is known."""
    if config.get("pretrained_cfg"):
        return dict(config["pretrained_cfg"])
    import timm

    name = config["architecture"]
    if not timm.is_model(name):
        raise InputError(
            f"timm {timm.__version__} has no architecture {name!r}",
            hint="correct `architecture` in config.json, or update timm",
        )
    found = timm.get_pretrained_cfg(name)
    return found.to_dict() if found is not None else {}


def start_body(model: "PreTrainedModel") -> None:
    """Give a model of timm the random weights that timm starts it with, in place, its classifier among them."""
    import timm

    config: Any = model.config
    if next(model.parameters()).is_meta:
        return
    made = timm.create_model(config.architecture, num_classes=config.num_labels, **config.model_args or {})
    model.base_model.load_state_dict(made.state_dict())


def processor_of(config: Mapping[str, Any], name: object) -> Any:
    """Return an image processor of transformers that does what timm does to an image before a model predicts.

    What is cropped of an image with an odd number of pixels too many lies one pixel further up or left than timm's.
    One of timm's own could not stand beside a model of another family: it keeps its settings in the model's. config:
    as written in config.json. name: of the model, for messages. Raises InputError for steps that only timm has.
    """
    from timm.data import resolve_data_config
    from transformers import BitImageProcessor

    arguments = config.get("model_args") or {}
    settings = _settings(config)
    if (side := arguments.get("img_size")) is not None:
        sides = side if isinstance(side, list | tuple) else (side, side)
        settings["input_size"] = (arguments.get("in_chans", 3), *sides)
    data = resolve_data_config(pretrained_cfg=settings)
    _, height, width = data["input_size"]
    scaled = [math.floor(side / data["crop_pct"]) for side in (height, width)]
    if data["crop_mode"] == "squash":
        size = {"height": scaled[0], "width": scaled[1]}
    elif data["crop_mode"] == "center" and scaled[0] == scaled[1]:
        size = {"shortest_edge": scaled[0]}
    else:
        raise InputError(
            f"{name}: timm prepares its images by crop_mode {data['crop_mode']!r} for {height} x {width} pixels, which "
            "no image processor of transformers does",
            hint="save an image processor (preprocessor_config.json) beside the model",
        )
    return BitImageProcessor(
        size=size,
        resample=RESAMPLE[data["interpolation"]],
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_convert_rgb=True,
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
