"""Texts alone, without answers: of files, folders and hub sets."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdcli.data import files
from kdcli.data.columns import Columns
from kdcli.data.documents import PLAIN
from kdcli.errors import InputError
from kdcli.files import expanded

READABLE = (PLAIN, *files.READABLE)

USUAL = "text"
"""The column of a table that is read where none is named."""


def read_texts(source: str, base: Path, where: str, *, columns: Sequence[str] = (), notes: list[str]) -> list[str]:
    """Return the texts of a file, of all files of a folder, or of the training rows of a hub set.

    A .txt file gives a text a line; a table its columns, lists of words joined by spaces. base: the folder that
    relative paths start from. where: the option or field that names the source. notes: takes what a user should know.
    Raises InputError where there is no such source, no such column, or no text.
    """
    given = expanded(source, where)
    path = given if given.is_absolute() else base / given
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READABLE)
        if not paths:
            raise InputError(f"{source} holds none of {', '.join(READABLE)}", where=where)
        texts = [text for one in paths for text in _of_file(one, where, columns, notes)]
    elif path.exists() or path.suffix.lower() in READABLE or source.startswith((".", "/", "~")):
        texts = _of_file(path, where, columns, notes)
    else:
        splits = files.read_hub(source, None, where)
        texts = _of_table(splits.get("train") or next(iter(splits.values())), source, where, columns)
    if not texts:
        raise InputError(f"{source} holds no text", where=where)
    return texts


def check_columns(sources: Sequence[str], base: Path, where: str) -> None:
    """Raise InputError where columns are named, by the option or field `where`, and no source is a table."""
    if all(_is_plain(base / expanded(source, where)) for source in sources):
        raise InputError(
            f"names columns of tables, and none is given: {PLAIN} files have no columns",
            where=where,
            hint="leave it out, or give a table",
        )


def _is_plain(path: Path) -> bool:
    """Return whether a source is a file of lines, or a folder with no table."""
    if path.is_dir():
        return not any(file.suffix.lower() in files.READABLE for file in path.rglob("*"))
    return path.suffix.lower() == PLAIN


def _of_file(path: Path, where: str, columns: Sequence[str], notes: list[str]) -> list[str]:
    if path.suffix.lower() != PLAIN:
        table = files.read_file(path, where, beside=(PLAIN,), notes=notes)
        return _of_table(table, str(path), where, columns)
    files.check_exists(path, where)
    try:
        with files.open_text(path, None) as file:
            return [line.strip() for line in file if line.strip()]
    except UnicodeError as error:
        raise files.undecodable(path, "text", None, where) from error
    except OSError as error:
        raise InputError(f"{path} is not readable: {error.strerror}", where=where) from error


def _of_table(table: Columns, source: str, where: str, columns: Sequence[str]) -> list[str]:
    names = columns or (USUAL,)
    if missing := [name for name in names if name not in table]:
        raise InputError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(map(repr, table))}",
            where=where,
            hint="name the columns of text: --column NAME" if where.startswith("--") else "name them in columns",
        )
    return [text for name in names for text in _said(table[name])]


def _said(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(text, str) and text.strip():
            yield text
