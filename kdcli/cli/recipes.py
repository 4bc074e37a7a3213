"""kdcli recipes"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcli.cli.commands import Table, group

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcli.methods.base import Method
    from kdcli.recipe.fields import Entry

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="The recipe's name, as `kdcli recipes list` shows it.", show_default=False)]

COMMANDS: Table = {
    "list": ("kdcli.cli.recipes:list_", "List the recipes that come with kdcli."),
    "show": ("kdcli.cli.recipes:show", "Print a recipe."),
    "copy": ("kdcli.cli.recipes:copy", "Copy a recipe, to be changed and run."),
    "explain": ("kdcli.cli.recipes:explain", "Explain all fields of a recipe, or one."),
    "schema": ("kdcli.cli.recipes:schema", "Print the JSON Schema of recipes, for editors."),
}

app = group(COMMANDS, add_completion=False)


@app.callback()
def _recipes() -> None:
    """List, show and copy the recipes that come with kdcli; explain the fields of a recipe. All take --json.

    \b
    Examples:
      kdcli recipes list
      kdcli recipes copy quickstart
      kdcli recipes explain student.budget
    """


def list_(as_json: AsJson = False) -> int:
    """List the recipes that come with kdcli.

    \b
    Examples:
      kdcli recipes list
      kdcli recipes list --json
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit
    from kdcli.recipe.shipped import shipped

    rows = [{"name": recipe.name, "summary": recipe.summary} for recipe in shipped()]
    lines = [(row["name"], row["summary"]) for row in rows]
    emit({"recipes": rows}, table=render.columns(lines), as_json=as_json)
    return 0


def show(name: Name, as_json: AsJson = False) -> int:
    """Print a recipe that comes with kdcli.

    \b
    Examples:
      kdcli recipes show quickstart
      kdcli recipes show methods/kd
    """
    from kdcli.cli.console import emit
    from kdcli.recipe.shipped import find

    recipe = find(name)
    emit({"name": recipe.name, "text": recipe.text}, table=recipe.text, as_json=as_json)
    return 0


def copy(
    name: Name,
    dest: Annotated[
        Path | None,
        typer.Argument(help="A .toml file to write, or a folder for it (default: here).", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: AsJson = False,
) -> int:
    """Copy a recipe that comes with kdcli, and beside it the JSON Schema that editors complete it with.

    \b
    Examples:
      kdcli recipes copy quickstart
      kdcli recipes copy own-csv tickets.toml
      kdcli recipes copy methods/makd experiments/
    """
    from kdcli.cli.console import emit, info, shown_path
    from kdcli.errors import InputError
    from kdcli.faults import unwritable
    from kdcli.files import expanded, write_text
    from kdcli.recipe.shipped import SCHEMA_FILE, find

    recipe = find(name)
    path = expanded(dest) if dest is not None else Path()
    if path.suffix != ".toml":
        path = path / recipe.path.name
    if path.is_dir() or (path.exists() and not force):
        raise InputError(f"{path} exists already", hint="give another DEST, or --force to replace a file")
    try:
        write_text(path, f"#:schema ./{SCHEMA_FILE}\n{recipe.text}")
    except OSError as error:
        raise unwritable(path.parent, error) from error
    beside = _write_schema(path.parent / SCHEMA_FILE)
    emit({"recipe": str(path), "schema": str(beside)}, table=shown_path(path), as_json=as_json)
    info(f"next: change it, then kdcli distill {shlex.quote(shown_path(path))} --dry-run")
    return 0


def _write_schema(path: Path) -> Path:
    """Write the JSON Schema of recipes, in place of an older one of kdcli's; another file stays as it is."""
    import json

    from kdcli.cli.console import info
    from kdcli.files import write_json

    document = _schema()
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))["title"] == document["title"]
    except FileNotFoundError:
        ours = True
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if ours:
        write_json(path, document)
    else:
        info(f"{path} was not written by kdcli and stays as it is: editors will not complete this recipe")
    return path


def explain(
    field: Annotated[
        str | None, typer.Argument(help="A field such as student.budget, or a table.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="With this method's options and defaults.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Explain all fields of a recipe, or one: what it means, what it may hold, and its default.

    \b
    Examples:
      kdcli recipes explain
      kdcli recipes explain student.budget
      kdcli recipes explain train --method makd
      kdcli recipes explain method.alpha --method makd
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit
    from kdcli.methods import registry

    chosen = registry.get(method) if method is not None else None
    entries = _entries(chosen)
    if field is None:
        emit({"fields": [_row(e, chosen) for e in entries]}, table=render.reference(entries), as_json=as_json)
        return 0
    path = _find(field, entries, chosen)
    # A field of several kinds of tasks, each of which means something else by it, is told for each.
    found = [_row(entry, chosen) for entry in entries if entry.path == path]
    inside = [entry for entry in entries if entry.path[:-1] == path]
    document = {"fields": [*found, *(_row(entry, chosen) for entry in inside)]}
    emit(document, table=render.fields(found, inside), as_json=as_json)
    return 0


def _entries(method: "Method | None") -> "list[Entry]":
    """Return all fields of a recipe, with those of every kind of task, and with a method's options."""
    from kdcli.recipe.fields import fields_of, fields_of_kinds
    from kdcli.recipe.schema import Recipe

    kinds = _kinds()
    found: list[Entry] = []
    for entry in fields_of(Recipe):
        found.append(entry)
        if entry.name == "method.name" and method is not None:
            found += fields_of(method.options, ("method",))
        if entry.name in ("task.type", "finetune.task.type"):
            found += fields_of_kinds(kinds, entry.path[:-1])
    return found


def _find(field: str, entries: "list[Entry]", method: "Method | None") -> tuple[str, ...]:
    """Return the path of a field. Raises InputError with the nearest one where there is none."""
    import re

    from kdcli.errors import InputError, cut
    from kdcli.recipe.fields import nearest, unknown_part

    # Brackets of tables and places say nothing here: `[student]`, `finetune[0].task`.
    path = tuple(part.strip() for part in re.sub(r"\[\d*\]|[\[\]]", "", field).split("."))
    known = [entry.path for entry in entries]
    wrong = unknown_part(known, path)
    if wrong is not None and method is None and wrong[0] == "method":
        owners = _methods_with(wrong[1])
        raise InputError(
            f"{cut(field)} would be an option of a method, and which one is not said",
            hint=f"give --method, one of {', '.join(owners)}" if owners else "kdcli methods NAME lists its options",
        )
    if wrong is not None:
        raise InputError("unknown field", where=cut(".".join(wrong)), hint=nearest(known, wrong))
    # A key of one's own, such as overparam.factors.768, is explained by the field that has such keys.
    return max((own for own in known if path[: len(own)] == own), key=len)


def _methods_with(option: str) -> list[str]:
    from kdcli.methods import registry

    return [method.name for method in registry.usable()[0] if option in method.options.model_fields]


def _kinds() -> "dict[str, type[BaseModel]]":
    from kdcli.cli.console import usable
    from kdcli.tasks import registry

    return {kind.name: kind.fields for kind in usable(registry)}


def _row(entry: "Entry", method: "Method | None") -> dict[str, Any]:
    table, *inner = entry.path
    own = {"student": method.student, "train": method.train}.get(table, {}) if method is not None else {}
    row = {
        "field": entry.name,
        "kinds": list(entry.kinds),
        "allowed": entry.allowed,
        "required": entry.field.is_required(),
        "default": entry.default,
        "description": entry.description,
    }
    return {**row, "default_of_method": own[inner[0]]} if inner and inner[0] in own else row


def schema(as_json: AsJson = False) -> int:
    """Print the JSON Schema of recipes (draft 2020-12), for editors with a TOML language server.

    A recipe names it in its first line: #:schema ./recipe.schema.json

    \b
    Examples:
      kdcli recipes schema
      kdcli recipes schema > recipe.schema.json
    """
    from kdcli.cli.console import emit
    from kdcli.files import to_json_text

    document = _schema()
    emit(document, table=f"{to_json_text(document)}\n", as_json=as_json)
    return 0


def _schema() -> dict[str, Any]:
    from kdcli.methods import registry
    from kdcli.models import families
    from kdcli.recipe.json_schema import recipe_schema
    from kdcli.tasks.registry import recognisable

    return recipe_schema(
        {method.name: method.options for method in registry.usable()[0]},
        _kinds(),
        recognised=recognisable(),
        families=[family.name for family in families.usable()[0]],
    )
