"""The sets of rows that a recipe names, whose columns and labels are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdcli.data.columns import Columns


@dataclass(frozen=True)
class NamedSet:
    """A set that a recipe names. read(seed) returns its splits: "train", and each that is reported by its name there.

    kind: the name of its kind of task. fields: that kind's fields, as a recipe would give them for such data.
    """

    name: str
    kind: str
    fields: Mapping[str, Any]
    metrics: tuple[str, ...]
    source: str
    read: Callable[[int], dict[str, Columns]]


def named_sets() -> dict[str, NamedSet]:
    """Return all sets by their names."""
    from kdcli.data.glue import GLUE
    from kdcli.data.reviews import REVIEWS

    return {**GLUE, REVIEWS.name: REVIEWS}
