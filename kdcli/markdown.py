"""Names and messages in Markdown: read as they stand; they make no table, link, tag or heading of their own."""

import re

from kdcli.terminal import visible

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: str) -> str:
    """Return a name or a message as text of one line, with what Markdown and HTML would read as their own escaped."""
    line = " ".join(visible(text).split())
    return re.sub(r"[\\`*_\[\]|~#$&<>]", lambda found: _ENTITIES.get(found[0], "\\" + found[0]), line)


def code(text: str) -> str:
    """Return a name as a code span, whatever backticks it has."""
    line = " ".join(visible(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line[:1] in ("", "`") or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def table_row(cells: list[str]) -> str:
    """Return a line of a table. cells: Markdown already."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
