"""What a schema has: its fields, what each may hold in the words of TOML, and the nearest one to a wrong name."""

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, model_validator
from pydantic.fields import FieldInfo

from kdcli.errors import cut

Path = tuple[str, ...]
"""The names of a field's tables, and its own; a table in a list may have its place, such as "[0]"."""


class Named(BaseModel):
    """Base of tables that may be written as their name alone: `task = "sst2"` for `task = {name = "sst2"}`."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Return what JSON Schema says of the table, or of its name alone."""
        schema = handler(core_schema)
        # What is said of a table's fields holds for tables only: no choice of two schemas hides which field is wrong.
        handler.resolve_ref_schema(schema)["type"] = ["string", "object"]
        return schema


@dataclass(frozen=True)
class Entry:
    """A field of a schema: `table` is the schema of what it holds where that is a table, or several in an array.

    kinds: of tasks that have the field, where not all have it.
    """

    path: Path
    field: FieldInfo
    table: type[BaseModel] | None
    many: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The field as a user writes it, such as `student.layers`."""
        return ".".join(self.path)

    @property
    def allowed(self) -> str:
        """What it may hold, such as `a number above 0 and at most 1`."""
        return describe(annotation_of(self.field))

    @property
    def description(self) -> str:
        """What it is; empty where another package's schema does not say it."""
        return self.field.description or ""

    @property
    def default(self) -> Any:
        """Its default; None where it has none."""
        return None if self.field.is_required() or self.table is not None else self.field.get_default()

    @property
    def shown_default(self) -> str:
        """Its default as TOML writes it, or "required"; "" where leaving it out has no value of its own."""
        if self.field.is_required():
            return "required"
        return "" if self.default is None else show(self.default)


def fields_of(schema: type[BaseModel], path: Path = ()) -> Iterator[Entry]:
    """Yield every field of a schema, followed by those of the tables inside it."""
    for name, field in schema.model_fields.items():
        here = (*path, name)
        inner = None
        for branch in map(bare, branches(annotation_of(field))):
            many = get_origin(branch) is list
            kind = bare(get_args(branch)[0]) if many else branch
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inner = Entry(here, field, kind, many)
        yield inner or Entry(here, field, None)
        if inner is not None and inner.table is not None:
            yield from fields_of(inner.table, here)


def fields_of_kinds(kinds: Mapping[str, type[BaseModel]], path: Path) -> list[Entry]:
    """Return the fields that kinds of tasks have of their own, once for all kinds that mean the same by it.

    kinds: name -> schema of its fields. path: of the table.
    """
    found: dict[tuple[Path, str], Entry] = {}
    for kind, schema in kinds.items():
        for entry in fields_of(schema, path):
            key = entry.path, entry.description
            found[key] = replace(entry, kinds=(*(found[key].kinds if key in found else ()), kind))
    return list(found.values())


def is_place(part: str) -> bool:
    """True for a part of a path that is a place in a list."""
    return part.startswith("[")


def unknown_part(known: Collection[Path], path: Path) -> Path | None:
    """Return the beginning of a path that names none of the known fields; None when all of it names one."""
    plain = tuple(part for part in path if not is_place(part))
    for length in range(1, len(plain) + 1):
        # Keys of one's own, such as those of overparam.factors, are no fields.
        if plain[:length] not in known and any(field[:-1] == plain[: length - 1] for field in known):
            return plain[:length]
    return None


def nearest(known: Collection[Path], path: Path, prefix: Path = ()) -> str:
    """Return the known field that an unknown one may have meant, or all that there are beside it, as a hint."""
    # The last part is a key, even one that looks like a place.
    path = (*(part for part in path[:-1] if not is_place(part)), path[-1])
    beside = [field[-1] for field in known if field[:-1] == path[:-1]]
    plain = path[-1].lower().replace("-", "_")
    # The very word in another table says more than a word of some likeness in this one.
    elsewhere = list(dict.fromkeys(".".join((*prefix, *field)) for field in known if field[-1] == plain))
    if near := difflib.get_close_matches(plain, beside, n=1, cutoff=0.8 if elsewhere else 0.6):
        return f"did you mean {near[0]!r}?"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(sorted(set(beside)))}"


def paths_of(schema: type[BaseModel]) -> list[Path]:
    """Return the paths of all fields of a schema."""
    return [entry.path for entry in fields_of(schema)]


def annotation_of(field: FieldInfo | None) -> Any:
    """Return a field's type with its limits."""
    if field is None:
        return None
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def bare(annotation: Any) -> Any:
    """Return a type without its limits."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def branches(annotation: Any) -> list[Any]:
    """Return the types that a field may have, without None."""
    plain = bare(annotation)
    if get_origin(plain) in (Union, UnionType):
        return [branch for branch in get_args(plain) if branch is not type(None)]
    return [] if annotation is None else [annotation]


def choices(annotation: Any) -> list[Any]:
    """Return the values that a field is one of; none where it is not so."""
    return [
        choice
        for branch in map(bare, branches(annotation))
        if get_origin(branch) is Literal
        for choice in get_args(branch)
    ]


_NOUNS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a string", "strings"),
}


def describe(annotation: Any, *, many: bool = False) -> str:
    """Return what a field may hold, such as `a number above 0 and at most 1`; "" when that is not known."""
    kinds = branches(annotation)
    if len(kinds) != 1:
        return " or ".join(describe(kind, many=many) for kind in kinds)
    kind, limits = _unwrap(kinds[0])
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
    if isinstance(kind, type) and issubclass(kind, Named):
        return "strings or tables" if many else "a string or a table"
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
