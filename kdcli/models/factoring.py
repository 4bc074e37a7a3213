"""What a recipe's `[overparam]` makes of a model's matrices: which of them get a chain, and with which factors."""

import math

from kdcli.errors import InputError
from kdcli.recipe.schema import OverparamSection
from kdcli.tensors.factors import MPOShape, auto_factors, length_for_scale

TARGETS = {"attention": ("query", "key", "value", "attention_output"), "ffn": ("ffn_in", "ffn_gate", "ffn_out")}
"""The matrices of a block that each of `overparam.targets` means."""


def has_factors(dimension: int, section: OverparamSection) -> bool:
    """True when a side of that length can be split as `section` says: by a list of its own, or automatically."""
    if section.factorization == "svd-plain" or str(dimension) in (section.factors or {}):
        return True
    try:
        auto_factors(dimension)
    except InputError:
        return False
    return True


def nearest_ranks(rank: int, section: OverparamSection) -> list[int]:
    """Return the nearest ranks below and above `rank` that can be split as `section` says."""
    # 1 and every square can.
    below = next(r for r in range(rank - 1, 0, -1) if has_factors(r, section)) if rank > 1 else None
    above = next(r for r in range(rank + 1, (math.isqrt(rank) + 1) ** 2 + 1) if has_factors(r, section))
    return [r for r in (below, above) if r is not None]


def is_target(layer: int, matrix: str, section: OverparamSection) -> bool:
    """True when `section` asks for a chain in place of a block's matrix. layer: counted from 1."""
    named = any(matrix in TARGETS[target] for target in section.targets)
    return named and (section.layers is None or layer - 1 in section.layers)


def check_factors(section: OverparamSection) -> None:
    """Raise InputError for settings of `[overparam]` that contradict themselves, whatever the model is."""
    if (section.select == "all") != (section.matrices is None):
        counted = section.matrices is not None
        raise InputError(
            "a number of matrices is given, but nothing selects them"
            if counted
            else f"overparam.select = {section.select!r} needs a number of matrices",
            where="overparam.matrices",
            hint='set overparam.select = "static", or leave it out'
            if counted
            else "such as 8, for all blocks together",
        )
    for name in ("select_every", "select_count"):
        if section.select != "dynamic" and getattr(section, name) != type(section).model_fields[name].default:
            raise InputError(
                f"{name} is of chains that come while the student trains, and overparam.select is {section.select!r}",
                where=f"overparam.{name}",
                hint=f'set overparam.select = "dynamic", or leave {name} out',
            )
    if section.scale is not None and section.factorization != "mpo":
        raise InputError(
            f"a scale needs middle tensors, which factorization {section.factorization!r} does not have",
            where="overparam.scale",
            hint='use factorization "mpo", or leave the scale out',
        )
    if section.factors and section.factorization != "mpo":
        raise InputError(
            f"factor lists make no sense with factorization {section.factorization!r}",
            where="overparam.factors",
            hint='use factorization "mpo", or leave the lists out',
        )
    for key, given in (section.factors or {}).items():
        where = f"overparam.factors.{key}"
        if not key.isdecimal():
            raise InputError(f"the name of a factor list is a dimension such as 768, not {key!r}", where=where)
        if math.prod(given) != int(key):
            raise InputError(f"the factors {given} multiply to {math.prod(given)}, not {key}", where=where)
        if len(given) < 2:
            raise InputError("a factor list has at least 2 entries", where=where)


def shape_for(out_features: int, in_features: int, section: OverparamSection) -> MPOShape:
    """Return the factor lists of a matrix (out, in) under a recipe's `[overparam]`.

    Where one side's list is longer, ones in front of the last entry fill the other.
    Raises InputError when a dimension has no fitting factors.
    """
    check_factors(section)
    if section.factorization == "svd-plain":
        return MPOShape((out_features, 1), (1, in_features))
    given = section.factors or {}
    length = section.length if section.factorization == "mpo" else 0
    sides = []
    for dimension in (out_features, in_features):
        if str(dimension) in given:
            sides.append(tuple(given[str(dimension)]))
            continue
        a, b = auto_factors(dimension)
        middle = length
        if section.scale is not None and not {str(out_features), str(in_features)} & set(given):
            middle = length_for_scale((out_features, in_features), section.scale)
        sides.append((a, *(1,) * middle, b))
    longest = max(map(len, sides))
    sides = [(*side[:-1], *(1,) * (longest - len(side)), side[-1]) for side in sides]
    return MPOShape(sides[0], sides[1])
