"""kdcli tasks"""

from typing import Annotated, Any

import typer


def tasks(
    name: Annotated[str | None, typer.Argument(help="Explain this type.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """List the types of tasks that a recipe can have (`task.type`), or explain one.

    \b
    Examples:
      kdcli tasks
      kdcli tasks classification
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit, usable
    from kdcli.cli.methods import tasks_of
    from kdcli.methods import registry as methods
    from kdcli.recipe.fields import fields_of
    from kdcli.tasks import registry

    if name is None:
        kinds = usable(registry)
        lines = [(kind.name, kind.title, ", ".join(kind.usual_metrics)) for kind in kinds]
        rows = [{"name": kind.name, "title": kind.title, "metrics": list(kind.metrics)} for kind in kinds]
        emit({"tasks": rows}, table=render.columns(lines, ("name", "what it is", "usual metrics")), as_json=as_json)
        return 0
    kind = registry.get(name)
    entries = list(fields_of(kind.fields, ("task",)))
    document: dict[str, Any] = {
        "name": kind.name,
        "title": kind.title,
        "model": kind.head.title,
        "metrics": list(kind.metrics),
        "methods": [method.name for method in methods.usable()[0] if kind.name in tasks_of(method)],
        "fields": [
            {"field": e.name, "allowed": e.allowed, "default": e.default, "description": e.description} for e in entries
        ],
    }
    emit(document, table=render.kind(document, entries), as_json=as_json)
    return 0
