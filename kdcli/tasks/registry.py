"""Kinds of tasks by name: the package's own, and those that other packages offer as `kdcli.tasks` entry points."""

import difflib
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Set
from functools import cache
from importlib.abc import InspectLoader
from typing import Any

from pydantic import ValidationError

import kdcli.tasks
from kdcli.data.columns import Columns
from kdcli.data.sets import NamedSet, named_sets
from kdcli.errors import InputError
from kdcli.offers import Offers
from kdcli.recipe.check import told
from kdcli.recipe.problems import problems_of
from kdcli.recipe.schema import TaskSection
from kdcli.tasks.kind import TaskKind

USUAL = "classification"
"""The kind of a user's own data, where neither the recipe nor the data say another."""


@cache
def _own() -> dict[str, TaskKind]:
    modules = sorted(module.name for module in pkgutil.iter_modules(kdcli.tasks.__path__, "kdcli.tasks."))
    kinds = [importlib.import_module(name).KIND for name in modules if _holds_kind(name)]
    return {kind.name: kind for kind in kinds}


def _holds_kind(module: str) -> bool:
    """True when a module assigns KIND; by its source, as the others import what `kdcli tasks` need not wait for."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and isinstance(spec.loader, InspectLoader)
    return re.search("^KIND *[:=]", spec.loader.get_source(module) or "", re.MULTILINE) is not None


@cache
def offers() -> Offers[TaskKind]:
    """Return what other packages offer."""
    return Offers("kdcli.tasks", "type of task", TaskKind, _own(), where="task.type")  # type: ignore[type-abstract]


def names() -> list[str]:
    """Return the names of all kinds, the package's own first."""
    return offers().names()


def get(name: str) -> TaskKind:
    """Return a kind. Raises InputError where it cannot be loaded, and with the nearest name where there is none."""
    if name in _own():
        return _own()[name]
    if name in offers():
        return offers().load(name)
    near = difflib.get_close_matches(name, names(), n=1)
    raise InputError(
        f"unknown type of task {name!r}; known are {', '.join(names())}",
        where="task.type",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def usable() -> tuple[list[TaskKind], list[str]]:
    """Return all kinds that work, and a line for each that another package offers and that does not."""
    found, problems = offers().usable()
    return [*_own().values(), *found], problems


def providing(needs: Set[str]) -> list[str]:
    """Return the names of the kinds that work and provide what a method needs, in their order."""
    return sorted(kind.name for kind in usable()[0] if needs <= kind.provides)


def recognisable() -> list[str]:
    """Return the names of the kinds that data may show, so that a recipe need not say them."""
    return [kind.name for kind in usable()[0] if type(kind).recognises is not TaskKind.recognises]


def set_of(section: TaskSection) -> NamedSet | None:
    """Return the set that `[task]` names; None for a user's own data and other names."""
    named = None if section.is_own else named_sets().get(section.name)
    return named if named is not None and section.type in (None, named.kind) else None


def kind_of(section: TaskSection) -> TaskKind:
    """Return the kind of `[task]`: the one that it names, or that of its set; else the usual one.

    Where `type` is left out, a user's own data may turn out to be of another kind: see `recognise`. Parts are of the
    kind of the first known set among them.
    """
    named = set_of(section)
    if section.type is None:
        known = (named_sets().get(part.name) for part in section.part or () if not part.is_own)
        named = next((one for one in known if one is not None), named)
    return get(named.kind if named is not None else section.type or USUAL)


def fields_of(kind: TaskKind, section: TaskSection) -> Any:
    """Return the kind's own fields of `[task]`. Raises InputError for those that it does not have, or other values."""
    try:
        return kind.fields.model_validate(section.fields)
    except ValidationError as error:
        first, *_ = told(problems_of(kind.fields, error, prefix=("task",)), section.fields, kind, usable()[0])
        raise InputError(first.message, where=first.name, hint=first.hint) from error


def recognise(columns: Columns, section: TaskSection, source: str, notes: list[str]) -> TaskKind:
    """Return the kind of a user's own data, where the recipe does not say. notes: takes what is doubtful about that.

    Kinds that have no place for the fields of `[task]` are none. Raises InputError where several fit.
    """
    usual = get(USUAL)
    fitting = []
    for kind in usable()[0]:
        try:
            fields = kind.fields.model_validate(section.fields)
        except ValidationError:
            continue
        if kind is not usual and kind.recognises(columns, fields, source, notes):
            fitting.append(kind)
    if len(fitting) > 1:
        types = " or ".join(f'"{kind.name}"' for kind in fitting)
        raise InputError(f"{source} may be of several kinds", where="task.type", hint=f"give type = {types}")
    if not fitting:
        usual.recognises(columns, fields_of(usual, section), source, notes)
    return fitting[0] if fitting else usual
