"""Column files of the CoNLL shared tasks: a word a line with its tags, blank lines between sentences."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from kdcli.data.columns import Column, Columns, chunked
from kdcli.errors import InputError
from kdcli.words import counted

ENDINGS = (".bio", ".conll", ".conllu", ".conllup", ".iob", ".iob2")

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""The columns of CoNLL-U (universaldependencies.org/format.html)."""

DOCUMENT = "-DOCSTART-"

_NAMED = re.compile(r"#\s*[\w.:-]+\s*=")
"""A comment that names a value."""

Sentence = list[list[str]]


def read_conll(path: Path, lines: Iterator[str], where: str) -> Columns:
    """Return a list a sentence for each column. Columns are named "1", "2", ...; those of CoNLL-U as it names them.

    Columns are separated by a tab where the first word's line has one, else by spaces. Left out are comments, which
    stand before a sentence, -DOCSTART- lines, and in CoNLL-U the lines of joined words (1-2) and empty nodes (1.1).
    A line that begins with # is a word where it has as many columns as the first other line, and names no value.
    A file that names its columns (`# global.columns = FORM UPOS`) has these names, in lower case.
    Raises InputError for a line with another number of columns than the first.
    """
    names = list(CONLLU) if path.suffix.lower() == ".conllu" else []
    parts: list[list[list[list[str]]]] = []
    for chunk in chunked(_sentences(path, lines, names, where)):
        parts.append([[list(column) for column in zip(*sentence, strict=True)] for sentence in chunk])
    return {
        name: Column([[sentence[place] for sentence in part] for part in parts]) for place, name in enumerate(names)
    }


def _sentences(path: Path, lines: Iterator[str], names: list[str], where: str) -> Iterator[Sentence]:
    """Yield sentences as lists of words, which are lists of cells. names: takes the columns' names."""
    opening, tabs, count = _opening(lines)
    sentence: Sentence = []
    first = 0
    for number, line in enumerate(chain(opening, lines), 1):
        line = line.rstrip("\r\n")
        if not line.strip(" \t"):
            if sentence:
                yield sentence
            sentence = []
            continue
        if found := re.match(r"#\s*global\.columns\s*=\s*(.+)", line):
            names[:] = found[1].lower().split()
            continue
        cells = _cells(line, tabs)
        # In front of a file that is separated by spaces, "# words" may have as many columns as a word.
        bare = cells[0] == "#" and not first and not tabs
        comment = bare or _NAMED.match(line) or len(cells) != (len(names) or count)
        if (line.startswith("#") and not sentence and comment) or line.split()[:1] == [DOCUMENT]:
            continue
        if names[:1] == ["id"] and re.fullmatch(r"\d+[-.]\d+", cells[0]):
            continue
        if not names:
            names[:] = [str(place) for place in range(1, len(cells) + 1)]
        first = first or number
        if len(cells) != len(names):
            raise InputError(
                f"{path}:{number} has {counted(len(cells), 'column')}, "
                f"{f'line {first}' if first < number else 'the format'} has {len(names)}",
                where=where,
                hint="each line has a word and its tags, in as many columns everywhere; a blank line ends a sentence",
            )
        sentence.append(cells)
    if sentence:
        yield sentence


def _opening(lines: Iterator[str]) -> tuple[list[str], bool, int]:
    """Take the lines up to the first that certainly is a word's; return them, whether tabs part it, and its columns.

    Where all lines begin with # it is the first with several columns and no white space behind the #.
    """
    opening = []
    for line in lines:
        opening.append(line)
        if line.strip(" \t\r\n") and not line.startswith(("#", DOCUMENT)):
            break
    else:
        hashtags = (line for line in opening if re.match(r"#\S+[ \t]+\S", line) and not _NAMED.match(line))
        line = next(hashtags, "")
    line = line.rstrip("\r\n")
    return opening, (tabs := "\t" in line), len(_cells(line, tabs))


def _cells(line: str, tabs: bool) -> list[str]:
    return line.split("\t") if tabs else re.split("[ \t]+", line.strip(" \t"))
