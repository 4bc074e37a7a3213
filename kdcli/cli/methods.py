"""kdcli methods"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel


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

    from kdcli.cli.console import emit, info
    from kdcli.methods import registry

    if name is None:
        found, problems = registry.usable()
        table = Table(show_lines=True)
        for column in ("name", "tasks", "signals", "constraints", "cost", "paper"):
            table.add_column(column, overflow="fold")
        for method in found:
            tasks = ", ".join(sorted(method.kinds))
            cells = (method.name, tasks, method.signals, method.constraints, method.cost, short_citation(method.paper))
            # As plain text: a formula's square brackets are no markup.
            table.add_row(*map(Text, cells))
        keys = ("name", "title", "signals", "constraints", "cost", "paper")
        rows = [{**{key: getattr(m, key) for key in keys}, "tasks": sorted(m.kinds)} for m in found]
        emit(rows, table=table, as_json=as_json)
        for problem in problems:
            info(f"left out: {problem}")
        return 0
    method = registry.get(name)
    options = method.options().model_dump()
    document: dict[str, Any] = {
        "name": method.name,
        "title": method.title,
        "tasks": sorted(method.kinds),
        "formula": method.formula,
        "signals": method.signals,
        "constraints": method.constraints,
        "cost": method.cost,
        "paper": method.paper,
        "options": options,
        "student": method.student,
        "train": method.train,
        "train_on_text": method.train | method.text_train if "text" in method.kinds else None,
    }
    table = Table(title=f"{method.name}: {method.title}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("tasks", ", ".join(document["tasks"]))
    for key in ("formula", "signals", "constraints", "cost", "paper"):
        table.add_row(key, Text(document[key]))
    table.add_section()
    for path, explanation in explanations(method.options, "method"):
        table.add_row(path, Text(explanation))
    table.add_section()
    for section, values in (("method", options), ("student", method.student), ("train", method.train)):
        for key, value in flat(values, section):
            table.add_row(key, Text(as_toml(value)))
    for key, value in flat(method.text_train, "train"):
        table.add_row(key, Text(f"{as_toml(value)} on plain text"))
    emit(document, table=table, as_json=as_json)
    return 0


def short_citation(paper: str) -> str:
    """Return `Hinton et al. 2015, arXiv 1503.02531` for a full citation of that form, else the citation itself."""
    found = re.match(r"(?P<first>[^,(]+)(?P<others>,[^(]*)? \((?P<year>\d{4})\).*?(?P<id>arXiv [\d.]+\d)", paper)
    if found is None:
        return paper
    return f"{found['first'].strip()}{' et al.' if found['others'] else ''} {found['year']}, {found['id']}"


def explanations(options: type[BaseModel], path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the descriptions of a schema's fields, and of those of the tables inside it."""
    for name, field in options.model_fields.items():
        yield f"{path}.{name}", field.description or ""
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from explanations(kind, f"{path}.{name}")


def flat(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every value in nested tables, as `--set` takes them."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


def as_toml(value: Any) -> str:
    """Return a value as a recipe writes it; what is not set has no such form."""
    if value is None:
        return "(not set)"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
