"""kdcli methods"""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kdcli.methods.base import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """List the methods a recipe can name, or explain one.

    \b
    Examples:
      kdcli methods
      kdcli methods makd
    """
    from rich.table import Table
    from rich.text import Text

    from kdcli.cli import render
    from kdcli.cli.console import emit, usable
    from kdcli.methods import registry
    from kdcli.recipe.fields import fields_of, show

    if name is None:
        found = usable(registry)
        lines = [(m.name, _tasks(m), m.title, short_citation(m.paper)) for m in found]
        keys = ("name", "title", "signals", "constraints", "cost", "paper")
        rows = [{**{key: getattr(m, key) for key in keys}, "tasks": tasks_of(m)} for m in found]
        table = render.columns(lines, ("name", "tasks", "what the student follows", "paper"))
        emit({"methods": rows}, table=table, as_json=as_json)
        return 0
    method = registry.get(name)
    options = method.options().model_dump()
    document: dict[str, Any] = {
        "name": method.name,
        "title": method.title,
        "tasks": tasks_of(method),
        "formula": method.formula,
        "signals": method.signals,
        "constraints": method.constraints,
        "cost": method.cost,
        "paper": method.paper,
        "options": options,
        "student": method.student,
        "student_on_images": method.student | method.image_student if method.image_student else None,
        "train": method.train,
        "train_on_text": method.train | method.text_train if method.text_train else None,
    }
    table = Table(title=f"{method.name}: {method.title}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("tasks", ", ".join(document["tasks"]))
    for key in ("formula", "signals", "constraints", "cost", "paper"):
        table.add_row(key, Text(document[key]))
    table.add_section()
    for entry in fields_of(method.options, ("method",)):
        default = f"Default: {entry.shown_default}." if entry.default is not None else ""
        table.add_row(entry.name, Text(f"{entry.description} {default}".strip()))
    table.add_section()
    defaults = [
        ("student", method.student, ""),
        ("student", method.image_student, " on images"),
        ("train", method.train, ""),
        ("train", method.text_train, " where tokens are predicted"),
    ]
    for section, values, where in defaults:
        for key, value in values.items():
            table.add_row(f"{section}.{key}", Text(f"{show(value)}{where}"))
    emit(document, table=table, as_json=as_json)
    return 0


def tasks_of(method: "Method") -> list[str]:
    """Return the names of the kinds of tasks that provide what a method needs."""
    from kdcli.tasks import registry

    return registry.providing(method.needs)


def short_citation(paper: str) -> str:
    """Return `Hinton et al. 2015` for a full citation that begins with authors and a year, else the citation itself."""
    found = re.match(r"(?P<first>[^,(]+)(?P<others>,[^(]*)? \((?P<year>\d{4})\)", paper)
    return f"{found['first'].strip()}{' et al.' if found['others'] else ''} {found['year']}" if found else paper


def _tasks(method: "Method") -> str:
    """Return what tasks a method works on, in few words: what they must provide; `kdcli methods NAME` names them."""
    needs = {"classes"} if "classes" in method.needs else method.needs
    return ", ".join(sorted(needs)) or "all"
