"""kdcli methods"""

from typing import Annotated, Any

import typer


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

    from kdcli.cli.console import emit
    from kdcli.methods import registry

    if name is None:
        found = [registry.get(known) for known in registry.names()]
        keys = ("name", "signals", "constraints", "cost", "paper")
        table = Table(*keys)
        for method in found:
            table.add_row(*(getattr(method, key) for key in keys))
        emit([{key: getattr(m, key) for key in ("title", *keys)} for m in found], table=table, as_json=as_json)
        return 0
    method = registry.get(name)
    options = method.options().model_dump()
    document: dict[str, Any] = {
        "name": method.name,
        "title": method.title,
        "formula": method.formula,
        "signals": method.signals,
        "constraints": method.constraints,
        "cost": method.cost,
        "paper": method.paper,
        "options": options,
        "student": method.student,
        "train": method.train,
    }
    table = Table(title=f"{method.name}: {method.title}", show_header=False)
    for key in ("formula", "signals", "constraints", "cost", "paper"):
        table.add_row(key, document[key])
    for key, value in options.items():
        table.add_row(f"method.{key}", repr(value))
    for section in ("student", "train"):
        for key, value in document[section].items():
            table.add_row(f"{section}.{key}", repr(value))
    emit(document, table=table, as_json=as_json)
    return 0
