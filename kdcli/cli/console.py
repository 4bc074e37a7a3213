"""Where words go: the result to stdout, everything else to stderr."""

import logging
import os
import sys
import warnings
from typing import Any

from rich.console import Console

from kdcli.files import to_json_text


class _Stdout(Console):
    """A console that says when its reader has gone, instead of ending the program with the exit code of a gate."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Names and paths are the user's: their square brackets are no markup.
out = _Stdout(soft_wrap=False, markup=False)
err = Console(stderr=True, markup=False)


def emit(document: Any, *, table: Any, as_json: bool) -> None:
    """Print the result: one JSON document, or a table for people.

    Where the reader has gone (`kdcli ... | head`), nobody is left to tell; the command still ends with its own code.
    """
    try:
        if as_json:
            print(to_json_text(document))
        else:
            # On a pipe there is no width to fit: a cut table would be a wrong table. (The width of a single
            # print() can only be less than its console's.)
            console = out if out.is_terminal else _Stdout(width=max(out.width, 120), markup=False)
            console.print(table)
        sys.stdout.flush()
    except BrokenPipeError:
        forget_stdout()


def forget_stdout() -> None:
    """Let what is still written to stdout vanish."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def info(message: str) -> None:
    """Say something on stderr."""
    err.print(message, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep the libraries' own warnings and progress bars away from the user: kdcli says what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "datasets", "torch", "accelerate", "onnxscript", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
