"""Ctrl-C and SIGTERM: one line and exit code 130 or 143 at any moment, and nothing that was begun is left half-done.

This module imports nothing that takes time: it is what a program does first.
"""

import contextlib
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send: it ends the program as Ctrl-C does."""


WORDS: "dict[int, str]" = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
PAUSE = 0.5
"""Seconds after the first signal in which further ones are taken for the same: launchers send one to each process
of a group, and then to each process."""


class _State:
    first: "int | None" = None
    since = 0.0
    waits = False
    """The first one has come in a block that is to be finished."""
    caught = 0
    tidy = 0
    unfinished = 0


def install() -> None:
    """Handle SIGINT and SIGTERM from here on; processes that are forked off are left to themselves."""
    for number in WORDS:
        signal.signal(number, _handle)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget)
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, lambda _, frame: _obey(frame))
        usual = sys.unraisablehook
        # A finaliser swallows what is raised in it: raised once more, a moment later.
        sys.unraisablehook = lambda lost: (
            signal.setitimer(signal.ITIMER_REAL, 0.01) if issubclass(lost.exc_type, KeyboardInterrupt) else usual(lost)
        )


def ignore() -> None:
    """Let SIGINT and SIGTERM do nothing from here on: the program has ended, Python is about to."""
    for number in WORDS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


def received() -> "int | None":
    """Return the signal that this program is to end with, if one has come."""
    return _State.first


@contextlib.contextmanager
def caught() -> "Iterator[None]":
    """Let a signal raise KeyboardInterrupt in the block; outside of all such blocks it ends the program at once."""
    with _counted("caught"):
        yield


@contextlib.contextmanager
def tidying() -> "Iterator[None]":
    """Let a signal raise KeyboardInterrupt in the block even while modules are imported: there is something to tidy."""
    with _counted("tidy"):
        yield


@contextlib.contextmanager
def finishing() -> "Iterator[None]":
    """Let the block be finished before a signal is obeyed; a second one, later than PAUSE, is obeyed at once."""
    try:
        with _counted("unfinished"):
            yield
    finally:
        if _State.waits and not _State.unfinished:
            _State.waits = False
            _raise(_State.first)


@contextlib.contextmanager
def _counted(name: str) -> "Iterator[None]":
    setattr(_State, name, getattr(_State, name) + 1)
    try:
        yield
    finally:
        setattr(_State, name, getattr(_State, name) - 1)


def _handle(number: int, frame: "FrameType | None") -> None:
    if _State.first is None:
        _State.first, _State.since = number, time.monotonic()
        if _State.unfinished:
            _State.waits = True
            return
    elif time.monotonic() - _State.since < PAUSE:
        return
    elif not _State.waits:
        # The first one is being obeyed, or some library has swallowed it.
        _leave()
    _State.waits = False
    _obey(frame)


def _obey(frame: "FrameType | None") -> None:
    # What an import that is cut short leaves is no place to go on from, and may even hide that it was cut short.
    if not _State.caught or (not _State.tidy and _importing(frame)):
        _leave()
    _raise(_State.first)


def _raise(number: "int | None") -> None:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _importing(frame: "FrameType | None") -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave() -> None:
    """End the process in this very moment."""
    number = _State.first or signal.SIGINT
    word = WORDS[number]
    with contextlib.suppress(OSError):
        # A progress bar may have hidden the cursor.
        os.write(2, b"\x1b[?25h\r" * os.isatty(2) + f"error: {word}\n".encode())
        if "--json" in sys.argv and os.environ.get("RANK", "0") == "0":
            os.write(1, document(word).encode())
    os._exit(128 + number)


def document(word: str) -> str:
    """Return the JSON document of a program that was ended before it could say more."""
    error = f'{{"kind": "interrupted", "message": "{word}", "where": null, "hint": null}}'
    return f'{{"schema_version": 1, "error": {error}}}\n'


def _forget() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
