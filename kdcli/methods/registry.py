"""Methods by name: the package's own, and those that other packages offer as `kdcli.methods` entry points."""

import difflib
import importlib
from functools import cache
from importlib.metadata import entry_points

from kdcli.errors import InputError
from kdcli.methods.base import Method

BUILT_IN = ("kd", "makd", "od", "hs", "minilm", "minilmv2", "tinybert", "distilbert", "theseus", "lgtm", "dbkd", "adkd")
GROUP = "kdcli.methods"


@cache
def _external() -> dict[str, Method]:
    found = {}
    for point in entry_points(group=GROUP):
        method = point.load()
        if not isinstance(method, Method):
            raise InputError(f"the entry point {point.name} of {GROUP} is no kdcli.methods.base.Method")
        found[method.name] = method
    return found


def names() -> list[str]:
    """Return the names of all methods, the package's own first."""
    return [*BUILT_IN, *sorted(set(_external()) - set(BUILT_IN))]


def get(name: str) -> Method:
    """Return a method. Raises InputError with the nearest name when there is none."""
    if name in BUILT_IN:
        return importlib.import_module(f"kdcli.methods.{name}").METHOD
    if name in _external():
        return _external()[name]
    near = difflib.get_close_matches(name, names(), n=1)
    raise InputError(
        f"unknown method {name!r}; known are {', '.join(names())}",
        where="method.name",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )
