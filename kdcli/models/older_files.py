"""The tensors of files that earlier versions of the library wrote: other names, several in one; by its own table."""

from collections.abc import Iterable, Mapping
from typing import Any

from kdcli.models.families import Family


def _conversions(family: Family) -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = get_checkpoint_conversion_mapping(MODEL_MAPPING_NAMES.get(family.name))
    return found or get_checkpoint_conversion_mapping(family.name) or []


def names_of_today(family: Family, names: Iterable[str]) -> list[str]:
    """Return the names that tensors of a file have in the library's models today."""
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [one for one in _conversions(family) if isinstance(one, WeightRenaming)]
    return [apply_renamings(name, renamings) for name in names]


def joined(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Return the tensors of a file that are several of a model's, each with the names of its equal parts.

    shapes: of the file's tensors, by name. The parts follow each other along the first axis.
    """
    from transformers.core_model_loading import Chunk, WeightConverter

    found = {}
    for one in _conversions(family):
        if not isinstance(one, WeightConverter) or len(one.source_patterns) != 1:
            continue
        source, parts = one.source_patterns[0], one.target_patterns
        if [(type(step), step.dim) for step in one.operations if isinstance(step, Chunk)] != [(Chunk, 0)]:
            continue
        for name, shape in shapes.items():
            if source in name and shape and shape[0] % len(parts) == 0:
                found[name] = [name.replace(source, part) for part in parts]
    return found
