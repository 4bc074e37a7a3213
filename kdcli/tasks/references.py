"""Reference answers of questions, read from the columns of a set: their texts, and where the first one begins."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kdcli.data.columns import Columns, is_missing, need_column, shape_of_value
from kdcli.errors import InputError, cut
from kdcli.tasks.labels import readable
from kdcli.words import counted

ANSWERS = ("answers", "answer")
"""The columns that hold answers where a recipe names none, the hub's first."""

STARTS = "answer_start"


class Reference(NamedTuple):
    """A row's answers: none where its context holds none. start: the character where the first begins, or -1."""

    texts: list[str]
    start: int


def column_of(columns: Columns, named: str | None) -> str:
    """Return the column that holds answers. named: the one that a recipe names."""
    return named or next((name for name in ANSWERS if name in columns), ANSWERS[0])


def references(
    columns: Columns, answer: str | None, starts: str | None, contexts: Iterator[str], source: str, *, train: bool
) -> Iterator[Reference]:
    """Yield the references of each row. answer, starts: the columns that a recipe names. contexts: of each row.

    train: whether a model is trained on the rows, for which the place of the first answer must be known: where it is
    not given, it is searched for. White space around answers is left out. Raises InputError, with the row, for answers
    that do not stand in their context.
    """
    name = column_of(columns, answer)
    cells = need_column(columns, name, "answer", source)
    beside = need_column(columns, starts, STARTS, source) if starts is not None else columns.get(STARTS)
    places: Iterator[Any] = iter(beside) if beside is not None else itertools.repeat(None)
    for row, (cell, place, context) in enumerate(zip(cells, places, contexts, strict=beside is not None), 1):
        place_of = f"{source}: row {row}"
        texts, given = _parts(cell, place, place_of)
        texts = [readable(text, row, source, "task.answer") for text in texts]
        found = []
        for number, (text, start) in enumerate(zip(texts, given, strict=True)):
            if start is not None:
                _check(text, start, context, place_of)
                found.append(start + len(text) - len(text.lstrip()))
            else:
                # A model is trained on the first answer only.
                found.append(_searched(text.strip(), context, place_of, train=train and number == 0))
        yield Reference([text.strip() for text in texts], found[0] if found else -1)


def _parts(cell: Any, place: Any, row: str) -> tuple[list[str], list[int | None]]:
    """Return the answers of a cell, and where each begins (None: not given). row: names it in messages."""
    if isinstance(cell, str) and cell.strip()[:2] in ("{'", '{"', "['", '["', "[{"):
        raise InputError(
            f"{row} has the text {cut(repr(cell))} for its answers, not a table or a list",
            where="task.answer",
            hint="keep tables and lists in JSON lines or Parquet; in CSV write the answer alone",
        )
    if isinstance(cell, list) and cell and all(isinstance(part, dict) for part in cell):
        # As SQuAD's own files have them.
        place = [part.get(STARTS) for part in cell]
        cell = [part.get("text") for part in cell]
    elif isinstance(cell, dict):
        if "text" not in cell:
            raise InputError(
                f"{row} has answers without text; it has {', '.join(map(repr, cell))}",
                where="task.answer",
                hint="answers as the hub has them are {text: [...], answer_start: [...]}",
            )
        place, cell = cell.get(STARTS), cell["text"]
    texts = cell if isinstance(cell, list) else [] if is_missing(cell) else [cell]
    places = place if isinstance(place, list) else [None if is_missing(place) else place] * min(len(texts), 1)
    if not isinstance(place, list):
        places += [None] * (len(texts) - len(places))
    if len(places) != len(texts):
        raise InputError(
            f"{row} has {counted(len(texts), 'answer')} and {counted(len(places), 'place')} where they begin",
            where=f"task.{STARTS}",
            hint="give one for each, or none",
        )
    if texts and all(map(is_missing, texts)):
        return [], []
    return [_text(text, row) for text in texts], [_place(place, row) for place in places]


def _text(value: Any, row: str) -> str:
    if is_missing(value):
        raise InputError(
            f"{row} has an empty answer beside others", where="task.answer", hint="a row without an answer has none"
        )
    if isinstance(value, list | dict | bytes):
        raise InputError(f"{row} has {shape_of_value(value)} for an answer, not a text", where="task.answer")
    return str(value)


def _place(value: Any, row: str) -> int | None:
    if is_missing(value):
        return None
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value) or number < 0:
            raise ValueError
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{row} has {cut(repr(value))} for the place where its answer begins",
            where=f"task.{STARTS}",
            hint="it is counted in characters of the context, from 0",
        ) from error
    return number


def _check(text: str, start: int, context: str, row: str) -> None:
    """Raise InputError where an answer does not begin at `start`, with what stands there."""
    if context.startswith(text, start):
        return
    there = context[start : start + len(text)]
    others = _occurrences(text, context)
    if others:
        hint = (
            f"it begins at {', '.join(map(str, others[:5]))}: places are counted in characters of the context, from 0"
        )
    else:
        hint = _hint_of_absence(text, context)
    stands = f"there stands {cut(repr(there))}" if there else f"the context has {len(context):,} characters"
    raise InputError(
        f"{row}: its answer {cut(repr(text))} does not begin at {start}: {stands}", where=f"task.{STARTS}", hint=hint
    )


def _searched(text: str, context: str, row: str, *, train: bool) -> int:
    places = _occurrences(text, context)
    if not places:
        raise InputError(
            f"{row}: its answer {cut(repr(text))} is not in its context",
            where="task.answer",
            hint=_hint_of_absence(text, context),
        )
    if train and len(places) > 1:
        raise InputError(
            f"{row}: its answer {cut(repr(text))} is {len(places)} times in its context, at "
            f"{', '.join(map(str, places[:5]))}{', ...' if len(places) > 5 else ''}",
            where="task.answer",
            hint=f"say where it begins: a column {STARTS} with the character, counted from 0",
        )
    return places[0]


def _occurrences(text: str, context: str) -> list[int]:
    places, start = [], context.find(text)
    while start >= 0:
        places.append(start)
        start = context.find(text, start + 1)
    return places


def _hint_of_absence(text: str, context: str) -> str:
    near = context.casefold().find(text.strip().casefold())
    if near >= 0:
        return f"there it is written {cut(repr(context[near : near + len(text.strip())]))}, letter for letter"
    return "an answer is a part of its context, letter for letter; a row without an answer has an empty one"


def any_given(cells: Sequence[Any]) -> bool:
    """True when some cell holds an answer."""
    return any(map(_is_given, cells))


def _is_given(cell: Any) -> bool:
    if isinstance(cell, dict):
        return _is_given(cell.get("text"))
    if isinstance(cell, list):
        return any_given(cell)
    return not is_missing(cell)
