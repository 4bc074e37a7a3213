"""Variants of a comparison's recipes: the same recipe with some fields changed."""

import re
from collections.abc import Sequence

from kdcli.errors import InputError, cut

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|' r"'[^']*'|.", re.DOTALL)
_NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|\x00-\x1f]')

Variant = tuple[str, ...]
"""The changes of one --variant, each FIELD=VALUE; without any, the plain recipe."""


def parse_variants(options: Sequence[str]) -> list[Variant]:
    """Return the changes of each `--variant FIELD=VALUE[,FIELD=VALUE...]`.

    A comma inside quotes, brackets or braces belongs to the value.
    Raises InputError for a part that is no FIELD=VALUE.
    """
    return [_changes_of(option) for option in options]


def _changes_of(option: str) -> Variant:
    parts = [""]
    depth = 0
    for token in _TOKEN.findall(option):
        depth += (token in "[{") - (token in "]}")
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    for part in parts:
        if not part.partition("=")[0].strip() or "=" not in part:
            raise InputError(
                f"takes FIELD=VALUE[,FIELD=VALUE...], such as overparam.length=1, not {cut(part)!r}",
                where=f"--variant {cut(option)}",
                hint="a value with a comma in it stands in quotes or brackets",
            )
    return tuple(part.strip() for part in parts)


def name_of(variant: Variant) -> str:
    """Return what follows a recipe's name in the name of its variant: `+overparam.length=1`; "" for the plain recipe.

    Characters that no folder's name may have become dashes.
    """
    return _NOT_IN_NAMES.sub("-", "+" + ",".join(variant).replace('"', "")) if variant else ""
