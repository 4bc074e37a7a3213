"""The program: its commands, and how its errors reach the shell."""

import os
import re
import sys
from typing import Annotated, Any

import typer

from kdcli import __version__, interrupts
from kdcli.cli.commands import Table, group
from kdcli.errors import ExitCode, KdcliError

COMMANDS: Table = {
    "distill": ("kdcli.cli.distill:distill", "Make a student from a recipe: train, compress, score, report."),
    "compare": ("kdcli.cli.compare:compare", "Run recipes on equal terms with several seeds, and compare them."),
    "overparam": ("kdcli.cli.overparam:overparam", "Put tensor chains in place of a model's block matrices."),
    "contract": ("kdcli.cli.contract:contract", "Multiply tensor chains back into the plain model."),
    "convert": ("kdcli.cli.convert:convert", "Write a pickled model's weights as safetensors."),
    "trim": ("kdcli.cli.trim:trim", "Leave out the pieces of a vocabulary that text does not use."),
    "eval": ("kdcli.cli.eval:evaluate", "Score a model on a task."),
    "predict": ("kdcli.cli.predict:predict", "Answer texts with a model, for every type of task."),
    "export": ("kdcli.cli.export:export", "Write a model as ONNX, check it, time it."),
    "methods": ("kdcli.cli.methods:methods", "List the methods, or explain one."),
    "tasks": ("kdcli.cli.tasks:tasks", "List the types of tasks, or explain one."),
    "families": ("kdcli.cli.families:families", "List the families of models."),
    "recipes": ("kdcli.cli.recipes:app", "List, show and copy recipes; explain their fields."),
    "env": ("kdcli.cli.env:env", "Show versions, devices and folders, for bug reports."),
}


app = group(
    COMMANDS,
    name="kdcli",
    epilog="Exit codes: 0 done; 1 a gate was not met; 2 the input is wrong; 3 the run failed; "
    "130 interrupted (Ctrl-C); 143 terminated (SIGTERM). Under --json an error is a JSON document on stdout, too.",
)


def _version(value: bool) -> None:
    if value:
        print(f"kdcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Make transformer models smaller by knowledge distillation, with the evidence.

    kdcli distill recipe.toml, then kdcli eval --task sst2, then kdcli export --onnx.
    """


def _wants_debug(arguments: list[str]) -> bool:
    return "--debug" in arguments or os.environ.get("KDCLI_DEBUG", "") not in ("", "0")


RESUMES = {"distill": "it goes on with --resume", "compare": "it goes on with the same command"}
"""command -> how one that was interrupted goes on, for those that can."""

KINDS = {int(ExitCode.GATE): "gate", int(ExitCode.INPUT): "input", int(ExitCode.RUN): "run"}
"""exit code -> the kind of error that a JSON document names; the codes of signals are "interrupted"."""


def _fail(code: int, message: str, where: str | None = None, hint: str | None = None, *, as_json: bool = False) -> int:
    """Tell the user what went wrong, under --json the program that reads stdout, too, and return the exit code."""
    from kdcli.cli.console import emit_error, err
    from kdcli.terminal import tell

    head = f"{where}: {message}" if where else message
    tell(err, head, mark="error:")
    if hint:
        tell(err, f"  hint: {hint}")
    # Of several processes one writes to stdout.
    if as_json and os.environ.get("RANK", "0") == "0":
        emit_error({"kind": KINDS.get(int(code), "interrupted"), "message": message, "where": where, "hint": hint})
    return int(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the program on `arguments` (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = _wants_debug(arguments)
    # Accepted in any place, so that it can be added to a command that has just failed.
    arguments = [a for a in arguments if a != "--debug"]
    as_json = any(a.split("=")[0] == "--json" for a in arguments)
    from kdcli.cli.console import quiet_libraries, soften_streams
    from kdcli.faults import explain
    from kdcli.terminal import forget

    soften_streams()
    quiet_libraries()
    try:
        result = _call(arguments)
    except KdcliError as error:
        if debug:
            raise
        return _fail(error.exit_code, error.message, error.where, error.hint, as_json=as_json)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError" and context is not None:
            print(context.get_help())
            return int(ExitCode.INPUT)
        command = context.command_path if context is not None else "kdcli"
        # A missing argument may say itself which command lists what it can be.
        about = getattr(getattr(error, "param", None), "help", None) or ""
        lister = re.search("`(kdcli [^`]+)`", about)
        hint = f"{lister[1] if lister else f'{command} --help'} shows what there is"
        near = getattr(error, "possibilities", None)
        if near:
            hint = f"did you mean {' or '.join(sorted(near))}?"
        if type(error).__name__ == "NoSuchOption" and getattr(error, "option_name", None) == "--json":
            hint = "--json goes behind a command: kdcli COMMAND --json"
        message = error.message if near else error.format_message()
        return _fail(ExitCode.INPUT, message, hint=hint, as_json=as_json)
    except typer.Exit as error:
        return int(error.exit_code)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        # Typer's end when the reader of a help page has gone.
        forget(sys.stdout)
        return int(ExitCode.OK)
    except Exception as error:
        if debug:
            raise
        if (known := explain(error)) is not None:
            return _fail(known.exit_code, known.message, known.where, known.hint, as_json=as_json)
        text = str(error).strip().splitlines()
        return _fail(
            ExitCode.RUN,
            f"{type(error).__name__}: {text[0] if text else 'no message'}",
            hint="this is a bug or a broken machine; run again with --debug for the traceback",
            as_json=as_json,
        )
    if result in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
        word = interrupts.WORDS[result - 128]
        command = next((a for a in arguments if not a.startswith("-")), "")
        return _fail(int(result), "; ".join([word, *filter(None, [RESUMES.get(command)])]), as_json=as_json)
    return _code(result)


def _call(arguments: list[str]) -> Any:
    """Run the command. What a signal's exception has become on its way here is the signal all the same."""
    result = None
    try:
        with interrupts.caught():
            # Typer makes 130 of a KeyboardInterrupt, and says nothing.
            result = typer.main.get_command(app).main(arguments, prog_name="kdcli", standalone_mode=False)
    except KeyboardInterrupt:
        result = ExitCode.INTERRUPTED
    except Exception:
        if interrupts.received() is None:
            raise
    number = interrupts.received()
    return result if number is None else ExitCode(128 + number)


def _code(result: Any) -> int:
    return int(result) if isinstance(result, int) else 0


def _show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print what --debug lets through; an error's message has other people's words, too."""
    import traceback

    from kdcli.cli.console import info

    info("".join(traceback.format_exception(kind, error, trace)).rstrip())


def main() -> None:
    """The console script."""
    sys.excepthook = _show_traceback
    code = run()
    from kdcli.cli.console import flush_stdout

    problem = flush_stdout()
    if problem is not None and code == ExitCode.OK:
        code = _fail(ExitCode.RUN, f"the result cannot be written to stdout: {problem}")
    sys.exit(code)
