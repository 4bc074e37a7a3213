"""The line of a TOML text where a key is written."""

import re

_TABLE = re.compile(r"^\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in re.split(r"\.(?=(?:[^\"']*[\"'][^\"']*[\"'])*[^\"']*$)", dotted))


def lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Return the line (from 1) of every table header and key of a TOML text; a good guess for odd layouts."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.match(line):
            table = _parts(header[1])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            path = (*table, *_parts(key[1]))
            found.setdefault(path, number)
            rest = line[key.end() :]
            for inner in re.finditer(r"[{,]\s*([A-Za-z0-9_-]+)\s*=", rest):
                found.setdefault((*path, inner[1]), number)
    return found


def line_of(text: str, path: tuple[str, ...]) -> int | None:
    """Return the line of a field, or of the innermost table around it that is written; None when none is."""
    lines = lines_of_keys(text)
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None
