"""TOML from people: read from regular files of a bounded size, within limits that keep parsing fast."""

import difflib
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from kdcli.errors import InputError, cut

MOST_BYTES = 1_000_000
MOST_DOTTED = 3000
"""Dots in one line, or fewer in several: the library's time grows with the square of a dotted key's parts."""
MOST_DEPTH = 32


def read_text(path: Path, what: str = "recipe") -> str:
    """Return the text of a small file. Raises InputError for what is no UTF-8 text file of at most MOST_BYTES.

    what: the file should be, for the messages.
    """
    try:
        # Without blocking: a pipe that nothing is written to is no file, either.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        hint = _nearest_file(path) or (_shipped(path) if what == "recipe" else None)
        raise InputError(f"no {what} at {cut(str(path), 300)}", hint=hint) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {cut(str(path))}: {getattr(error, 'strerror', None) or error}") from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "device or a pipe"
            raise InputError(f"{path} is a {kind}, not a {what}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    finally:
        os.close(handle)
    if len(content) > MOST_BYTES:
        raise InputError(f"{path} has more than {MOST_BYTES:,} bytes", hint=f"is it a {what}?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", hint=f"is it a {what}?") from error


def _nearest_file(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.glob(f"*{path.suffix}")]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def _shipped(path: Path) -> str | None:
    """Return how to get the recipe of that name from those that come with the package; None where there is none."""
    from kdcli.recipe.shipped import shipped

    wanted = path.with_suffix("").as_posix().removeprefix("recipes/")
    names = [recipe.name for recipe in shipped() if recipe.name == wanted]
    return f"copy it first: kdcli recipes copy {names[0]}" if names else None


class BrokenTOML(ValueError):
    """A text that is no TOML, or more of it than a person writes: the reason, with line and column from 1."""

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.column = column


def parse(text: str) -> dict[str, Any]:
    """Return the document of a TOML text. Raises BrokenTOML."""
    cost = 0
    for number, line in enumerate(text.split("\n"), 1):
        cost += line.count(".") ** 2
        if cost > MOST_DOTTED**2:
            raise BrokenTOML("too many dots in a line", number, 1)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _broken(error, text) from error
    except RecursionError:
        raise BrokenTOML("too many brackets inside each other", *_end(text)) from None
    except ValueError as error:
        # A whole number of thousands of digits.
        raise BrokenTOML(str(error).partition(";")[0].lower(), *_end(text)) from error
    if _deeper_than(document, MOST_DEPTH):
        raise BrokenTOML(f"tables more than {MOST_DEPTH} deep", *_end(text))
    return document


def _broken(error: tomllib.TOMLDecodeError, text: str) -> BrokenTOML:
    """Return tomllib's reason with line and column; the end of the text when it says no more."""
    reason = re.sub(r" \(at .*\)$", "", str(error))
    if place := re.search(r"\(at line (\d+), column (\d+)\)", str(error)):
        return BrokenTOML(reason, int(place[1]), int(place[2]))
    return BrokenTOML(reason, *_end(text))


def _end(text: str) -> tuple[int, int]:
    return text.count("\n") + 1, len(text) - text.rfind("\n")


def _deeper_than(document: Any, depth: int) -> bool:
    level = [document]
    for _ in range(depth):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)
