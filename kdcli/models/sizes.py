"""Whether the sizes in a model's config.json are sizes, and of a model that its file can hold.

Both are checked before a model is built: one of 2^31 blocks takes all memory before its weights are compared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kdcli.errors import InputError, cut
from kdcli.models.families import Family, SizeNames
from kdcli.words import counted

MOST = 1_000_000
"""Upper limit of sizes that no tensor of the file need have: the classes of a body, the positions of DeBERTa."""

MOST_BLOCKS = 1_000
"""Upper limit of the blocks of a model that runs the same weights again and again: no file is larger for more."""

MOST_PATCHES = 65_536
"""Upper limit of the patches of an image, where no tensor of the file is as long."""

_COMMON = {name: getattr(SizeNames, name) for name in ("layers", "hidden", "heads", "intermediate")}
"""The library's own names of the sizes, which it takes for those of a family, too."""


def check_sizes(config: Mapping[str, Any], family: Family, path: str) -> None:
    """Raise InputError, naming the field, when a size is missing, no whole number, or fits no other.

    config: as written. path: of config.json, for messages.
    """
    if family.outputs_only is not None:
        _check_stages(config, family, path)
        return
    for kind in _COMMON:
        names = _names(family, kind)
        given = [name for name in names if name in config]
        if kind == "intermediate" and family.sizes.times is not None and not _is_given(config, family, kind):
            continue
        if not given:
            raise InputError(f"{path} has no {names[0]}", hint="write the model's own into it")
        for name in given:
            _check(config, name, path, least=1)
    own = family.sizes
    if family.reads == "images":
        _check_images(config, own, path)
    if own.vocabulary is not None and own.vocabulary not in config:
        raise InputError(
            f"{path} has no {own.vocabulary}", hint="write the rows of the model's word embeddings into it"
        )
    others = (own.positions, own.embedding, "num_labels", own.types, own.kv_heads, own.head, own.registers)
    for size in (own.vocabulary, *others):
        if size is not None and (config.get(size) is not None or size == own.vocabulary):
            _check(config, size, path, least=0 if size in (own.types, own.registers) else 1)
    for size in ("num_labels", own.positions):
        if size is not None and (config.get(size) or 0) > MOST:
            raise InputError(f"{path}: {size} is {config[size]:,}", hint=f"use at most {MOST:,}")
    for name in family.one_of:
        if config.get(name, 1) != 1:
            raise InputError(
                f"{path}: {name} is {cut(repr(config[name]))}; of {family.title} kdcli supports models with one block "
                "that is repeated"
            )
    hidden, heads = (_size(config, family, kind) for kind in ("hidden", "heads"))
    groups = config.get(own.kv_heads) if own.kv_heads is not None else None
    if groups is not None and heads[1] % groups:
        raise InputError(
            f"{path}: {heads[0]} {heads[1]:,} is not divisible by {own.kv_heads} {groups:,}",
            hint=f"correct {own.kv_heads}: each head of keys and values is shared by as many heads of queries",
        )
    width = config.get(own.head) if own.head is not None else None
    if width is not None:
        check_heads(family, width * heads[1], heads[1], f"{path}: {own.head}")
        return
    if hidden[1] % heads[1]:
        raise InputError(
            f"{path}: {hidden[0]} {hidden[1]:,} is not divisible by {heads[0]} {heads[1]:,}",
            hint=f"correct {heads[0]}: one head is as wide as {hidden[0]} divided by it",
        )
    check_heads(family, hidden[1], heads[1], f"{path}: {heads[0]}")


def _check_stages(config: Mapping[str, Any], family: Family, path: str) -> None:
    """Raise InputError where a number in the configuration of a model of several stages is larger than any can be."""
    own = family.sizes
    for name in (own.image, own.patch, own.channels, "num_labels"):
        if name is not None and config.get(name) is not None:
            for side in config[name] if isinstance(config[name], list) else [config[name]]:
                _check({name: side}, name, path, least=1)
    numbers = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
    for name, value in _numbers_in(numbers):
        most = MOST_BLOCKS if "depth" in name or "layers" in name else MOST
        if value > most:
            raise InputError(f"{path}: {name} is {value:,}", hint=f"use at most {most:,}")


def _numbers_in(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield every whole number of a configuration with the name of its field."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield name, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers_in(one, str(key))
    elif isinstance(value, list):
        for one in value:
            yield from _numbers_in(one, name)


def _check_images(config: Mapping[str, Any], names: SizeNames, path: str) -> None:
    """Raise InputError where images are no whole number of patches, or a size of theirs is none or is missing."""
    sides = []
    for name in (names.image, names.patch):
        if name is None:
            continue
        if name not in config:
            raise InputError(f"{path} has no {name}", hint="write the model's own into it")
        value = config[name]
        both = _sides(value)
        for side in both:
            if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= MOST:
                raise InputError(
                    f"{path}: {name} is {cut(repr(value))}",
                    hint=f"use a whole number of pixels from 1 to {MOST:,}, or a list of two: height and width",
                )
        sides.append((name, value, both))
    if names.channels is not None and config.get(names.channels) is not None:
        _check(config, names.channels, path, least=1)
    (image, size, whole), (patch, side, part) = sides
    if any(length % share for length, share in zip(whole, part, strict=True)):
        raise InputError(
            f"{path}: {image} {size} is not divisible by {patch} {side}",
            hint=f"correct {image} or {patch}: an image is cut into whole patches",
        )


def _sides(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (value, value)


def check_heads(family: Family, hidden: int, heads: int, where: str) -> None:
    """Raise InputError when a head is not as wide as its family needs; `heads` divides `hidden`."""
    if family.rotary and hidden // heads % 2:
        raise InputError(
            f"{counted(heads, 'head')} of {hidden // heads} features: {family.title} rotates pairs of features",
            where=where,
            hint="choose sizes that give heads an even width",
        )


def check_room(
    config: Mapping[str, Any],
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    path: str,
    renamed: Callable[[Family, Iterable[str]], list[str]] = lambda family, names: list(names),
) -> None:
    """Raise InputError when config.json says more blocks, or a larger width, than the tensors of its file can hold.

    shapes: of the file's tensors, by their names. renamed: gives names of today for those that the library has changed.
    The sizes have passed `check_sizes`.
    """
    if family.outputs_only is not None:
        return
    blocks = _numbers(family, shapes)
    name, layers = _size(config, family, "layers")
    if family.repeated and layers > MOST_BLOCKS:
        raise InputError(f"{path}: {name} is {layers:,}", hint=f"use at most {MOST_BLOCKS:,}")
    if layers > len(blocks) and not family.repeated:
        blocks = _numbers(family, renamed(family, shapes))
    if layers > len(blocks) and not family.repeated:
        raise InputError(
            f"{path} says {counted(layers, 'block')} ({name}), the file holds {len(blocks):,}",
            hint=f"correct {name}, unless it is another model's file",
        )
    widest = max((length for shape in shapes.values() for length in shape), default=0)
    sizes = [_size(config, family, "hidden")]
    names = family.sizes
    if names.ratio is not None:
        sizes.append((f"two thirds of {sizes[0][0]} times {names.ratio}", sizes[0][1] * config[names.ratio] * 2 // 3))
    elif _is_given(config, family, "intermediate"):
        sizes.append(_size(config, family, "intermediate"))
    own = (names.vocabulary, names.embedding, names.types, names.channels, names.registers)
    sizes += [(one, config[one]) for one in own if one is not None and config.get(one)]
    if names.image is not None and names.patch is not None:
        (height, width), (down, across) = (_sides(config[name]) for name in (names.image, names.patch))
        sizes.append((names.patch, max(down, across)))
        if (patches := height // down * (width // across)) > MOST_PATCHES:
            sizes.append((f"the number of patches by {names.image} and {names.patch}", patches))
    if (head := family.sizes.head) is not None and config.get(head):
        heads = _size(config, family, "heads")
        sizes.append((f"{heads[0]} times {head}", heads[1] * config[head]))
    for name, size in sizes:
        if size > widest:
            raise InputError(
                f"{path}: {name} is {size:,}, and the largest tensor dimension in the file is {widest:,}",
                hint=f"correct {name}, unless it is another model's file",
            )


def _numbers(family: Family, names: Iterable[str]) -> set[str]:
    """Return the numbers of the blocks that tensors of these names are of."""
    parts = [key.partition(f"{family.blocks}.") for key in names]
    return {rest.split(".")[0] for before, found, rest in parts if found and (not before or before.endswith("."))}


def _is_given(config: Mapping[str, Any], family: Family, kind: str) -> bool:
    return any(config.get(name) is not None for name in _names(family, kind))


def _names(family: Family, kind: str) -> list[str]:
    """Return the names that a size can have in a configuration, the family's own first."""
    if kind == "intermediate" and family.sizes.ratio is not None:
        return [family.sizes.ratio]
    return list(dict.fromkeys((getattr(family.sizes, kind), _COMMON[kind])))


def _size(config: Mapping[str, Any], family: Family, kind: str) -> tuple[str, int]:
    """Return the name that a size has in a configuration, and the size: the largest, where it is there twice."""
    given = [(name, config[name]) for name in _names(family, kind) if config.get(name) is not None]
    return max(given, key=lambda pair: pair[1])


def _check(config: Mapping[str, Any], name: str, path: str, *, least: int) -> None:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{path}: {name} is {cut(repr(value))}", hint=f"use a whole number of at least {least}")
