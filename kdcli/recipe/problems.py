"""What pydantic found wrong, said in the words of TOML: the field, what was found, what is allowed."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kdcli.errors import cut

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
            branches = _branches(allowed)
            if len(branches) > 1:
                # pydantic puts the branch of a union between the field and what is inside it.
                if at is None:
                    at, begun = path, number
                allowed = _branch(branches, str(part))
                continue
            kind = _bare(branches[0]) if branches else None
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                path = (*path, str(part))
                allowed = _annotation(kind.model_fields.get(str(part)))
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
        if _is_place(part):
            allowed = get_args(_bare(_branches(allowed)[0]))[0]
            continue
        kind = next(
            kind for kind in map(_bare, _branches(allowed)) if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
        allowed = _annotation(kind.model_fields.get(part))
    return allowed


def _is_place(part: str) -> bool:
    return part.startswith("[")


def _annotation(field: FieldInfo | None) -> Any:
    if field is None:
        return None
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _branches(annotation: Any) -> list[Any]:
    """Return the types that a field may have, without None."""
    bare = _bare(annotation)
    if get_origin(bare) in (Union, UnionType):
        return [branch for branch in get_args(bare) if branch is not type(None)]
    return [] if annotation is None else [annotation]


def _branch(branches: list[Any], label: str) -> Any:
    for branch in branches:
        bare = _bare(branch)
        origin = get_origin(bare) or bare
        if label == getattr(origin, "__name__", "") or label.startswith(f"{getattr(origin, '__name__', '')}["):
            return branch
        if label.startswith("constrained-") and label.endswith(getattr(origin, "__name__", "?")):
            return branch
    return None


def _problem(schema: type[BaseModel], spot: _Spot, entry: Any, prefix: tuple[str, ...]) -> Problem:
    path, kind, found = (*prefix, *spot.path), entry["type"], entry["input"]
    if kind == "extra_forbidden":
        return Problem(path, "unknown field", _nearest(schema, spot.path, prefix))
    if kind == "missing":
        return Problem(path, "is missing", missing=True)
    if kind == "value_error":
        return Problem(path, str(entry["ctx"]["error"]), index=spot.index)
    hint = None
    choices = [choice for branch in _branches(spot.allowed) for choice in _choices(branch)]
    if choices and isinstance(found, str):
        near = difflib.get_close_matches(found, choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else None
    allowed = describe(spot.allowed) or entry["msg"][0].lower() + entry["msg"][1:]
    return Problem(path, f"must be {allowed}, not {show(found)}", hint, index=spot.index)


def unknown_field(schema: type[BaseModel], path: tuple[str, ...], prefix: tuple[str, ...] = ()) -> Problem | None:
    """Return the problem of a path that names no field of a schema; None when it names one."""
    known = {(), *_fields(schema)}
    plain = tuple(part for part in path if not _is_place(part))
    for length in range(1, len(plain) + 1):
        # Keys of one's own, such as those of overparam.factors, are no fields.
        if plain[:length] not in known and any(field[:-1] == plain[: length - 1] for field in known if field):
            return Problem((*prefix, *plain[:length]), "unknown field", _nearest(schema, plain[:length], prefix))
    return None


def _nearest(schema: type[BaseModel], path: tuple[str, ...], prefix: tuple[str, ...]) -> str:
    """Return the known field that an unknown one may have meant, or all that there are beside it."""
    everything = list(_fields(schema))
    # The last part is a key, even one that looks like a place.
    path = (*(part for part in path[:-1] if not _is_place(part)), path[-1])
    beside = [field[-1] for field in everything if field[:-1] == path[:-1]]
    plain = path[-1].lower().replace("-", "_")
    # The very word in another table says more than a word of some likeness in this one.
    elsewhere = [".".join((*prefix, *field)) for field in everything if field[-1] == plain]
    if near := difflib.get_close_matches(plain, beside, n=1, cutoff=0.8 if elsewhere else 0.6):
        return f"did you mean {near[0]!r}?"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(sorted(beside))}"


def _fields(schema: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in schema.model_fields.items():
        yield (*path, name)
        for branch in _branches(_annotation(field)):
            bare = _bare(branch)
            bare = _bare(get_args(bare)[0]) if get_origin(bare) is list else bare
            if isinstance(bare, type) and issubclass(bare, BaseModel):
                yield from _fields(bare, (*path, name))


def _choices(annotation: Any) -> list[str]:
    bare = _bare(annotation)
    return list(get_args(bare)) if get_origin(bare) is Literal else []


_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a string", "strings"),
}


def describe(annotation: Any, *, many: bool = False) -> str:
    """Return what a field may hold, such as `a number above 0 and at most 1`; "" when that is not known."""
    branches = _branches(annotation)
    if len(branches) != 1:
        return " or ".join(describe(branch, many=many) for branch in branches)
    kind, limits = _unwrap(branches[0])
    origin = get_origin(kind)
    if origin is Literal:
        quoted = [json.dumps(choice) for choice in get_args(kind)]
        return quoted[0] if len(quoted) == 1 else f"one of {', '.join(quoted)}"
    if origin is list:
        least, most = (dict(limits).get(name) for name in ("entries from", "entries to"))
        inside = describe(get_args(kind)[0], many=True)
        count = ""
        if least == most and least is not None:
            count = f"{least} "
        elif least is not None:
            count = f"{least} to {most} " if most is not None else f"{least} or more "
        elif most is not None:
            count = f"at most {most} "
        return f"{'arrays' if many else 'an array'} of {count}{inside}"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return "tables" if many else "a table"
    if kind not in _NOUNS:
        return ""
    noun = _NOUNS[kind][many]
    limit = " ".join(f"{word} {_figure(value)}" for word, value in limits if not word.startswith("entries"))
    return f"{noun} {limit}" if limit else noun


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _unwrap(annotation: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """Return the type inside `Annotated`, and its limits in words."""
    limits: list[tuple[str, Any]] = []
    while get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        for item in metadata:
            for constraint in item.metadata if isinstance(item, FieldInfo) else [item]:
                if isinstance(constraint, Gt):
                    limits.append(("above", constraint.gt))
                elif isinstance(constraint, Ge):
                    limits.append(("from", constraint.ge))
                elif isinstance(constraint, Lt):
                    limits.append(("and below" if limits else "below", constraint.lt))
                elif isinstance(constraint, Le):
                    limits.append(
                        ("to" if "from" in dict(limits) else "and at most" if limits else "of at most", constraint.le)
                    )
                elif isinstance(constraint, MinLen):
                    limits.append(("entries from", constraint.min_length))
                elif isinstance(constraint, MaxLen):
                    limits.append(("entries to", constraint.max_length))
    return annotation, limits


def show(value: Any) -> str:
    """Return a value as TOML writes it, cut when it is long."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        text = f"[{', '.join(map(show, value[:60]))}]"
    elif isinstance(value, bool | str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, int) and abs(value) >= 10**20:
        text = f"a number of {value.bit_length()} bits"
    else:
        text = str(value)
    return cut(text, 60)
