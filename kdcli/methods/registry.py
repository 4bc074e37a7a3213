"""Methods by name: the package's own, and those that other packages offer as `kdcli.methods` entry points."""

import difflib
import importlib

from kdcli.errors import InputError
from kdcli.methods.base import Method
from kdcli.offers import Offers

BUILT_IN = (
    "kd",
    "makd",
    "od",
    "hs",
    "minilm",
    "minilmv2",
    "tinybert",
    "distilbert",
    "theseus",
    "lgtm",
    "dbkd",
    "adkd",
    "embedding",
    "seqkd",
    "gkd",
    "minillm",
)
OFFERS = Offers("kdcli.methods", "method", Method, BUILT_IN, where="method.name")


def names() -> list[str]:
    """Return the names of all methods, the package's own first."""
    return OFFERS.names()


def get(name: str) -> Method:
    """Return a method. Raises InputError where it cannot be loaded, and with the nearest name where there is none."""
    if name in BUILT_IN:
        return importlib.import_module(f"kdcli.methods.{name}").METHOD
    if name in OFFERS:
        return OFFERS.load(name)
    near = difflib.get_close_matches(name, names(), n=1)
    raise InputError(
        f"unknown method {name!r}; known are {', '.join(names())}",
        where="method.name",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def usable() -> tuple[list[Method], list[str]]:
    """Return all methods that work, and a line for each that another package offers and that does not."""
    found, problems = OFFERS.usable()
    return [*map(get, BUILT_IN), *found], problems
