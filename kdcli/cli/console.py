"""Where words go: the result to stdout, everything else to stderr."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcli.errors import RunError
from kdcli.faults import explain
from kdcli.files import to_json_text
from kdcli.gates import Gate, exit_code_of
from kdcli.terminal import Terminal, forget, json_for, stderr, tell, wide

SCHEMA_VERSION = 1
"""Of the JSON documents: one more when a field goes or changes its meaning, not when one is added."""

err = stderr()


def emit(document: dict[str, Any], *, table: Any, as_json: bool, kept: str | None = None) -> None:
    """Print the result: one JSON document, or a table for people; a string is printed as it is.

    kept: where the result is written down, too. Where the reader has gone (`kdcli ... | head`), there is no one to
    tell; the command still ends with its own code. Raises RunError when stdout is closed or full.
    """
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        if as_json:
            print(_json(document))
        elif isinstance(table, str):
            print(table.removesuffix("\n"))
        else:
            wide(Terminal()).print(table)
        sys.stdout.flush()
    except BrokenPipeError:
        forget(sys.stdout)
    except OSError as error:
        forget(sys.stdout)
        raise RunError(
            f"the result cannot be written to stdout: {error.strerror or error}",
            hint=f"it is in {kept}" if kept is not None else "run the command again with another place for its output",
        ) from error


def _json(document: dict[str, Any]) -> str:
    return json_for(to_json_text({"schema_version": SCHEMA_VERSION, **document}), sys.stdout.encoding or "utf-8")


def emit_error(error: dict[str, Any]) -> None:
    """Print an error as a JSON document, as far as stdout takes it."""
    try:
        print(_json({"error": error}), flush=True)
    except (AttributeError, OSError, ValueError):
        forget(sys.stdout)


def soften_streams() -> None:
    """Let no letter that stdout or stderr lacks end the program: it is replaced."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def flush_stdout() -> str | None:
    """Write what is still to be written, and return why it cannot be, if so. A reader that has gone is no reason."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        forget(sys.stdout)
    except OSError as error:
        forget(sys.stdout)
        return error.strerror or str(error)
    return None


def shown_path(path: Path) -> str:
    """Return a path as it is named from the working folder, where it lies below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def settle(gates: Sequence[Gate]) -> int:
    """Say which gates are not met, and return the exit code."""
    for gate in gates:
        if not gate.passed:
            info(f"gate not met: {gate.message}")
    return int(exit_code_of(gates))


def info(message: str) -> None:
    """Say something on stderr."""
    tell(err, message)


def usable(registry: Any) -> list[Any]:
    """Return what a registry holds and works; say on stderr what of other packages does not."""
    found, problems = registry.usable()
    for problem in problems:
        info(f"left out: {problem}")
    return found


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    # A writer in a thread fails in the main one, too, and is told from there.
    if failed.exc_value is None or explain(failed.exc_value) is None:
        threading.__excepthook__(failed)


def quiet_libraries() -> None:
    """Keep the libraries' own warnings and progress bars away from the user: kdcli says what matters."""
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _in_a_thread
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "datasets", "torch", "accelerate", "onnxscript", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
