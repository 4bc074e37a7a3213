"""What pydantic found wrong, said in the words of TOML: the field, what was found, what is allowed."""

import difflib
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kdcli.errors import cut
from kdcli.recipe.fields import (
    annotation_of,
    bare,
    branches,
    choices,
    describe,
    is_place,
    nearest,
    paths_of,
    show,
    unknown_part,
)

MOST_ERRORS = 1000
"""Of a failed validation, the entries that are looked at: each takes its time, and a message tells few."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the path of the field, the message, and a hint.

    `index` is the place in a list, from 0, of a wrong value; a table in a list has its place, such as "[0]", in
    the path. `missing` is True when the field is not there at all.
    """

    path: tuple[str, ...]
    message: str
    hint: str | None = None
    index: int | None = None
    missing: bool = False

    @property
    def name(self) -> str:
        """The field as a user writes it, such as `student.layers[1]` or `finetune[0].epochs`."""
        return cut(".".join(self.path)).replace(".[", "[") + ("" if self.index is None else f"[{self.index}]")

    @property
    def text(self) -> str:
        """Message and hint in one line."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


def problems_of(schema: type[BaseModel], error: ValidationError, prefix: tuple[str, ...] = ()) -> list[Problem]:
    """Return every problem of a failed validation in the order of the schema, one a field."""
    entries = islice(error.errors(include_url=False), MOST_ERRORS)
    spots = [(_Spot.of(schema, entry["loc"]), entry) for entry in entries]
    # A field that may have several types fails once for each: what fails inside a table or a list says more
    # than that it is no number either.
    inner: dict[tuple[str, ...], int] = {}
    for spot, _ in spots:
        inner[spot.at] = max(spot.depth, inner.get(spot.at, 0))
    found: dict[tuple[tuple[str, ...], int | None], Problem] = {}
    for spot, entry in spots:
        if spot.depth < inner[spot.at]:
            continue
        problem = _problem(schema, spot, entry, prefix)
        found.setdefault((problem.path, problem.index), problem)
    return list(found.values())


@dataclass
class _Spot:
    """A place in the schema: the field's path and what the schema allows there.

    `at` names the outermost field around it that may have several types, and `depth` how far inside it this is.
    """

    path: tuple[str, ...]
    index: int | None
    allowed: Any
    at: tuple[str, ...]
    depth: int

    @classmethod
    def of(cls, schema: type[BaseModel], location: tuple[int | str, ...]) -> "_Spot":
        path: tuple[str, ...] = ()
        index = None
        allowed: Any = schema
        at: tuple[str, ...] | None = None
        begun = 0
        for number, part in enumerate(location):
            kinds = branches(allowed)
            if len(kinds) > 1:
                # pydantic puts the branch of a union between the field and what is inside it.
                if at is None:
                    at, begun = path, number
                allowed = _branch(kinds, str(part))
                continue
            kind = bare(kinds[0]) if kinds else None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                path = (*path, str(part))
                allowed = annotation_of(kind.model_fields.get(str(part)))
            elif isinstance(part, int):
                # A table in a list goes on; a plain value ends here.
                path, index = (path, part) if number + 1 == len(location) else ((*path, f"[{part}]"), None)
                allowed = get_args(kind)[0] if get_origin(kind) is list else None
            elif part != "[key]":
                path = (*path, str(part))
                allowed = get_args(kind)[1] if get_origin(kind) is dict else None
        if at is None:
            return cls(path, index, allowed, path, 0)
        return cls(
            path, index, allowed if path != at or index is not None else _at(schema, at), at, len(location) - begun
        )


def _at(schema: type[BaseModel], path: tuple[str, ...]) -> Any:
    """Return what the schema allows for a field, with all its types."""
    allowed: Any = schema
    for part in path:
        if is_place(part):
            allowed = get_args(bare(branches(allowed)[0]))[0]
            continue
        kind = next(
            kind for kind in map(bare, branches(allowed)) if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
        allowed = annotation_of(kind.model_fields.get(part))
    return allowed


def _branch(kinds: list[Any], label: str) -> Any:
    for branch in kinds:
        origin = get_origin(bare(branch)) or bare(branch)
        if label == getattr(origin, "__name__", "") or label.startswith(f"{getattr(origin, '__name__', '')}["):
            return branch
        if label.startswith("constrained-") and label.endswith(getattr(origin, "__name__", "?")):
            return branch
    return None


def _problem(schema: type[BaseModel], spot: _Spot, entry: Any, prefix: tuple[str, ...]) -> Problem:
    path, kind, found = (*prefix, *spot.path), entry["type"], entry["input"]
    if kind == "extra_forbidden":
        return Problem(path, "unknown field", nearest(paths_of(schema), spot.path, prefix))
    if kind == "missing":
        return Problem(path, "is missing", missing=True)
    if kind == "value_error":
        return Problem(path, str(entry["ctx"]["error"]), index=spot.index)
    hint = None
    if isinstance(found, str):
        near = difflib.get_close_matches(found, choices(spot.allowed), n=1)
        hint = f"did you mean {near[0]!r}?" if near else None
    allowed = describe(spot.allowed) or entry["msg"][0].lower() + entry["msg"][1:]
    return Problem(path, f"must be {allowed}, not {show(found)}", hint, index=spot.index)


def unknown_field(schema: type[BaseModel], path: tuple[str, ...], prefix: tuple[str, ...] = ()) -> Problem | None:
    """Return the problem of a path that names no field of a schema; None when it names one."""
    known = paths_of(schema)
    part = unknown_part(known, path)
    return None if part is None else Problem((*prefix, *part), "unknown field", nearest(known, part, prefix))
