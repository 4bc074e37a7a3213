"""A part of a task as the table of a task of its own: what `[task]` says for all parts, and what the part says."""

from collections.abc import Mapping
from typing import Any

from kdcli.recipe.schema import SOURCES, PartSection, TaskSection

WHOLE = frozenset({"part", "mixing_temperature", "augment"})
"""Fields of `[task]` that are about all parts together."""


def own_of_parts(fields: type[Any]) -> frozenset[str]:
    """Return the fields of a kind, of all its `fields`, that a part may have in place of those of `[task]`."""
    return frozenset((fields.columns_of_rows | fields.of_parts) & fields.model_fields.keys())


def fields_of_parts(fields: type[Any]) -> frozenset[str]:
    """Return all fields that a part may have. fields: of its kind."""
    return own_of_parts(fields) | PartSection.model_fields.keys()


def table_of_part(task: Mapping[str, Any], part: Mapping[str, Any], fields: type[Any]) -> dict[str, Any]:
    """Return the table of a part. task, part: tables as written, or dumped. fields: of its kind.

    The columns in `[task]`, and how its files are written, are about rows of one's own, not about those of a known set.
    """
    own = any(part.get(name) is not None for name in SOURCES)
    files = own and part.get("hub") is None
    apart = WHOLE | (frozenset() if own else fields.columns_of_rows)
    apart |= frozenset() if files else {"delimiter", "encoding"}
    shared = {name: value for name, value in task.items() if name not in apart}
    return {**shared, **{name: value for name, value in part.items() if value is not None}}


def section_of_part(task: TaskSection, part: PartSection, fields: type[Any]) -> TaskSection:
    """Return a part of a valid task as a task of its own. fields: of its kind."""
    whole, own = task.model_dump(exclude_unset=True), part.model_dump(exclude_unset=True)
    return TaskSection.model_validate(table_of_part(whole, own, fields))
