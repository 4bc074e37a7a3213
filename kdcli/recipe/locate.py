"""The line of a TOML text where a key is written."""

import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\r\n]+")

Keys = tuple[str, ...]


def lines_of_keys(text: str) -> dict[Keys, int]:
    """Return the line (from 1) where each table and key of a valid TOML text is first written.

    Keys are paths from the top: `("student", "budget")` for `budget` under `[student]`, for `student.budget`,
    and for `student = {budget = ...}` alike. Tables that only a longer header or a dotted key implies count, too.
    A table in a list has its place in the path: `("finetune", "[0]", "epochs")` for the first `[[finetune]]`.
    """
    return _Scanner(text).scan()


def line_of(lines: Mapping[Keys, int], path: Keys) -> int | None:
    """Return the line of a field, or of the innermost table around it that is written; None when none is.

    lines: as `lines_of_keys` returns them.
    """
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


class _Scanner:
    """Walks over a text that tomllib has accepted; it need not find errors, only keys."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.found: dict[Keys, int] = {}
        self.lists: dict[Keys, int] = {}

    def scan(self) -> dict[Keys, int]:
        table: Keys = ()
        while self._peek():
            table = self._header() if self._peek() == "[" else self._pair(table)
        return self.found

    def _header(self) -> Keys:
        """Read `[table]` or `[[list of tables]]`; below a list, a name means its last table."""
        many = self.text.startswith("[[", self.place)
        line = bisect_right(self.starts, self.place)
        self._take("[[" if many else "[")
        parts = self._parts()
        table: Keys = ()
        for number, part in enumerate(parts, 1):
            table = (*table, part)
            self.found.setdefault(table, line)
            if many and number == len(parts):
                self.lists[table] = self.lists.get(table, 0) + 1
            if table in self.lists:
                table = (*table, f"[{self.lists[table] - 1}]")
                self.found.setdefault(table, line)
        self._take("]]" if many else "]")
        return table

    def _peek(self) -> str:
        """Skip white space and comments, and return the next character, or "" at the end."""
        match = _SPACE.match(self.text, self.place)
        assert match is not None
        self.place = match.end()
        return self.text[self.place : self.place + 1]

    def _take(self, words: str) -> None:
        self._peek()
        if not self.text.startswith(words, self.place):
            raise ValueError(f"no {words!r} at character {self.place}: the text is not valid TOML")
        self.place += len(words)

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._peek()
        match = pattern.match(self.text, self.place)
        if match is None:
            raise ValueError(f"the text is not valid TOML at character {self.place}")
        self.place = match.end()
        return match[0]

    def _parts(self) -> Keys:
        """Read a dotted key and return its parts."""
        parts: Keys = ()
        while True:
            quoted = self._peek() in ('"', "'")
            part = self._match(_STRING if quoted else _BARE)
            # The library knows best what a quoted key's escapes mean.
            parts = (*parts, *(tomllib.loads(f"{part} = 0") if quoted else [part]))
            if self._peek() != ".":
                return parts
            self._take(".")

    def _pair(self, table: Keys) -> Keys:
        """Read `key = value`, note the key's line, and return the table around it."""
        self._peek()
        line = bisect_right(self.starts, self.place)
        path = table
        for part in self._parts():
            path = (*path, part)
            self.found.setdefault(path, line)
        self._take("=")
        self._value(path)
        return table

    def _value(self, path: Keys) -> None:
        opening = self._peek()
        if opening in ("[", "{"):
            self._take(opening)
            closing = "]" if opening == "[" else "}"
            number = 0
            while self._peek() != closing:
                if self._peek() == ",":
                    self._take(",")
                elif opening == "[":
                    self._value((*path, f"[{number}]"))
                    number += 1
                else:
                    self._pair(path)
            self._take(closing)
        elif opening in ('"', "'"):
            self._match(_STRING)
        else:
            self._match(_SCALAR)
