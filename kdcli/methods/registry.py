"""Methods by name: the package's own, and those that other packages offer as `kdcli.methods` entry points."""

import difflib
import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from kdcli.errors import InputError
from kdcli.methods.base import Method

BUILT_IN = ("kd", "makd", "od", "hs", "minilm", "minilmv2", "tinybert", "distilbert", "theseus", "lgtm", "dbkd", "adkd")
GROUP = "kdcli.methods"


@cache
def _offered() -> dict[str, list[EntryPoint]]:
    """Return the entry points of other packages by name, in the order of names; none of them is loaded."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP)):
        found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _load(name: str) -> Method:
    """Return the method of an entry point. Raises InputError that names the package when it has none to give."""
    point, *others = _offered()[name]
    if others or name in BUILT_IN:
        owners = ["kdcli"] * (name in BUILT_IN) + [_package(entry) for entry in (point, *others)]
        raise InputError(f"the name {name!r} is taken by several packages: {', '.join(owners)}", where="method.name")
    source = f"the method {name!r} of the package {_package(point)}"
    try:
        method = point.load()
    except Exception as error:
        raise InputError(
            f"{source} cannot be loaded ({type(error).__name__}: {error})",
            where="method.name",
            hint="install what it needs, or remove the package",
        ) from error
    if not isinstance(method, Method) or method.name != name:
        found = f"is called {method.name!r}" if isinstance(method, Method) else f"is a {type(method).__name__}"
        raise InputError(
            f"{source} {found}; {point.value} must be a kdcli.methods.base.Method with the entry point's name",
            where="method.name",
        )
    return method


def names() -> list[str]:
    """Return the names of all methods, the package's own first."""
    return [*BUILT_IN, *(name for name in _offered() if name not in BUILT_IN)]


def get(name: str) -> Method:
    """Return a method. Raises InputError where it cannot be loaded, and with the nearest name where there is none."""
    if name in BUILT_IN:
        return importlib.import_module(f"kdcli.methods.{name}").METHOD
    if name in _offered():
        return _load(name)
    near = difflib.get_close_matches(name, names(), n=1)
    raise InputError(
        f"unknown method {name!r}; known are {', '.join(names())}",
        where="method.name",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def usable() -> tuple[list[Method], list[str]]:
    """Return all methods that work, and a line for each that another package offers and that does not."""
    methods, problems = [get(name) for name in BUILT_IN], []
    for name in _offered():
        try:
            methods.append(_load(name))
        except InputError as error:
            problems.append(error.message)
    return methods, problems
