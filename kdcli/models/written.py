"""Configurations that kdcli reads as others: of models of timm, and of models with one part for images of several."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcli.errors import InputError
from kdcli.models import families
from kdcli.models.timm_models import SIZE

OUTER = ("architectures", "id2label", "label2id", "num_labels", "problem_type", "dtype", "torch_dtype")
"""What a configuration of a whole says, not that of its part."""


def as_read(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a configuration as one of a family of the table, where it is written as another's.

    A model with images and texts is read as the part that reads images; one of timm with the classes' names where all
    other models have them. path: of config.json, for messages. Raises InputError where a part is missing.
    """
    own = config.get("kdcli")
    name = own.get("base_model_type") if isinstance(own, dict) else config.get("model_type")
    for family in families.FAMILIES.values():
        if family.wraps is not None and (name == family.name or (name is None and "pretrained_cfg" in config)):
            return _of_timm(config, family, path)
        if family.part_of is not None and name == family.part_of.name:
            return _part(config, family, path)
        if family.part_of is not None and name == family.name:
            return {**config, **family.part_of.settings}
    return dict(config)


def _of_timm(config: Mapping[str, Any], family: families.Family, path: str) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(config.get("architecture"), str):
        raise InputError(f"{path} names no architecture of timm", hint='such as "architecture": "tiny_vit_5m_224"')
    found = {"model_type": family.name, **config}
    if not any(found.get(key) is not None for key in ("id2label", "num_labels")):
        # What the library's own class makes of the numbers and names that timm writes.
        classes = CONFIG_MAPPING[family.name].from_dict({**found, "model_type": family.name}).id2label or {}
        found["id2label"] = {str(number): str(text) for number, text in classes.items()}
    if found.get(SIZE) is None and (size := _size_beside(Path(path).parent)) is not None:
        found[SIZE] = size
    # Left beside id2label, these would be written again when a model has got other classes.
    return {key: value for key, value in found.items() if key not in ("num_classes", "label_names")}


def _size_beside(folder: Path) -> list[int] | None:
    """Return the height and width that the image processor in a folder makes; None where none says so."""
    try:
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        sides = settings["crop_size" if settings.get("do_center_crop") else "size"]
        return [int(sides["height"]), int(sides["width"])]
    except (OSError, ValueError, KeyError, TypeError):
        # It is read as a whole, and refused, where it is used.
        return None


def _part(config: Mapping[str, Any], family: families.Family, path: str) -> dict[str, Any]:
    from transformers import AutoConfig

    assert family.part_of is not None
    own = config.get(family.part_of.config)
    if not isinstance(own, dict):
        raise InputError(
            f"{path} has no {family.part_of.config}",
            hint=f"give a whole {family.title} model, or its part that reads images",
        )
    usual = AutoConfig.for_model(family.name).to_dict()
    inner = {key: value for key, value in {**usual, **own}.items() if key not in OUTER}
    inner |= family.part_of.settings
    return {**inner, **{key: config[key] for key in OUTER if key in config}, "model_type": family.name}
