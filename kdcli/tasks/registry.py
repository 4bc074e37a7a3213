"""Kinds of tasks by name: the package's own, and those that other packages offer as `kdcli.tasks` entry points."""

import importlib

from kdcli.errors import InputError
from kdcli.tasks.kind import TaskKind

BUILT_IN = {"classification": "classification", "regression": "regression", "text": "masked_lm"}
"""The module of each kind of this folder."""


def names() -> list[str]:
    """Return the names of all kinds."""
    return list(BUILT_IN)


def get(name: str) -> TaskKind:
    """Return a kind of task. Raises InputError where there is none of that name."""
    if name not in BUILT_IN:
        raise InputError(f"unknown type of task {name!r}; known are {', '.join(names())}", where="task.type")
    return importlib.import_module(f"kdcli.tasks.{BUILT_IN[name]}").KIND
