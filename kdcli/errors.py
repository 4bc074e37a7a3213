"""The errors that a user meets, and the exit code of each."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the process."""

    OK = 0
    GATE = 1
    INPUT = 2
    RUN = 3
    INTERRUPTED = 130
    TERMINATED = 143


def cut(text: str, most: int = 80) -> str:
    """Return what a message repeats of a user's words: the beginning, where there are many."""
    return text if len(text) <= most else text[: most - 3] + "..."


class KdcliError(Exception):
    """An error with a message for the user: what is wrong, where, and what would be right.

    `where` is a place (`recipe.toml:12, field student.budget`); `hint` is the way out.
    """

    exit_code = ExitCode.RUN

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  hint: {self.hint}" if self.hint else head


class InputError(KdcliError):
    """The recipe, an option, a model or the data is wrong; nothing was started."""

    exit_code = ExitCode.INPUT


class UnfitTaskError(InputError):
    """The method does not work on tasks of this kind."""


class GateError(KdcliError):
    """The result is there, but below a limit that the user set."""

    exit_code = ExitCode.GATE


class RunError(KdcliError):
    """The input was right, but the run failed."""

    exit_code = ExitCode.RUN
