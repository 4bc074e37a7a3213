"""Groups of commands whose modules are imported when a command is called, not before."""

import difflib
import importlib
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

from kdcli.errors import InputError

Table = dict[str, tuple[str, str]]
"""name -> (module:function or module:group, one line for --help)."""


class Commands(TyperGroup):
    """Imports a command's module only when the command is run or its own help is shown."""

    table: ClassVar[Table] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in self.table:
            return None
        place, summary = self.table[name]
        module, member = place.split(":")
        found = getattr(importlib.import_module(module), member)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        alone.command(name, short_help=summary)(found)
        return _as_written(typer.main.get_command(alone))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.table:
            near = difflib.get_close_matches(args[0], self.table, n=1)
            path = ctx.command_path
            hint = f"did you mean {path} {near[0]}?" if near else f"{path} --help shows what there is"
            raise InputError(f"No such command {args[0]!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.table.items()])


def _as_written(command: Any) -> Any:
    """Return a command whose help shows words in square brackets, which are markup otherwise."""
    from rich.markup import escape

    for one in (command, *command.params):
        one.help = escape(getattr(one, "help", None) or "")
    return command


def group(table: Table, **options: Any) -> typer.Typer:
    """Return a group of the commands in `table`; without a command it shows its help."""
    return typer.Typer(
        cls=type("Group", (Commands,), {"table": table}),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )
