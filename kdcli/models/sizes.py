"""Whether the sizes in a model's config.json are sizes, and of a model that its file can hold.

Both are checked before a model is built: one of 2^31 blocks takes all memory before its weights are compared.
"""

from collections.abc import Mapping
from typing import Any

from kdcli.errors import InputError, cut
from kdcli.models.families import Anatomy
from kdcli.words import counted

MOST = 1_000_000
"""Upper limit of sizes that no tensor of the file need have: the classes of a body, the positions of DeBERTa."""

_COMMON = {name: getattr(Anatomy, name) for name in ("layers", "hidden", "heads", "intermediate")}
"""The library's own names of the sizes, which it takes for those of a family, too."""


def check_sizes(config: Mapping[str, Any], anatomy: Anatomy, path: str) -> None:
    """Raise InputError, naming the field, when a size is missing, no whole number, or fits no other.

    config: as written. path: of config.json, for messages.
    """
    for kind, common in _COMMON.items():
        names = dict.fromkeys((getattr(anatomy, kind), common))
        given = [name for name in names if name in config]
        if not given:
            raise InputError(f"{path} has no {next(iter(names))}", hint="write the model's own into it")
        for name in given:
            _check(config, name, path, least=1)
    if "vocab_size" not in config:
        raise InputError(f"{path} has no vocab_size", hint="write the rows of the model's word embeddings into it")
    for name in ("vocab_size", "max_position_embeddings", "embedding_size", "num_labels", "type_vocab_size"):
        if config.get(name) is not None or name == "vocab_size":
            _check(config, name, path, least=0 if name == "type_vocab_size" else 1)
    for name in ("num_labels", "max_position_embeddings"):
        if (config.get(name) or 0) > MOST:
            raise InputError(f"{path}: {name} is {config[name]:,}", hint=f"use at most {MOST:,}")
    hidden, heads = (_size(config, anatomy, kind) for kind in ("hidden", "heads"))
    if hidden[1] % heads[1]:
        raise InputError(
            f"{path}: {hidden[0]} {hidden[1]:,} is not divisible by {heads[0]} {heads[1]:,}",
            hint=f"correct {heads[0]}: one head is as wide as {hidden[0]} divided by it",
        )


def check_room(config: Mapping[str, Any], anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Raise InputError when config.json says more blocks, or a larger width, than the tensors of its file can hold.

    shapes: of the file's tensors, by their names. The sizes have passed `check_sizes`.
    """
    parts = [key.partition(f"{anatomy.blocks}.") for key in shapes]
    blocks = {rest.split(".")[0] for before, found, rest in parts if found and (not before or before.endswith("."))}
    name, layers = _size(config, anatomy, "layers")
    if layers > len(blocks):
        raise InputError(
            f"{path} says {counted(layers, 'block')} ({name}), the file holds {len(blocks):,}",
            hint=f"correct {name}, unless it is another model's file",
        )
    widest = max((length for shape in shapes.values() for length in shape), default=0)
    sizes = [_size(config, anatomy, "hidden"), _size(config, anatomy, "intermediate")]
    sizes += [(one, config[one]) for one in ("vocab_size", "embedding_size", "type_vocab_size") if config.get(one)]
    for name, size in sizes:
        if size > widest:
            raise InputError(
                f"{path}: {name} is {size:,}, and the largest tensor dimension in the file is {widest:,}",
                hint=f"correct {name}, unless it is another model's file",
            )


def _size(config: Mapping[str, Any], anatomy: Anatomy, kind: str) -> tuple[str, int]:
    """Return the name that a size has in a configuration, and the size: the largest, where it is there twice."""
    names = dict.fromkeys((getattr(anatomy, kind), _COMMON[kind]))
    return max(((name, config[name]) for name in names if name in config), key=lambda pair: pair[1])


def _check(config: Mapping[str, Any], name: str, path: str, *, least: int) -> None:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{path}: {name} is {cut(repr(value))}", hint=f"use a whole number of at least {least}")
