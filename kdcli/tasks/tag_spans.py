"""Spans in sequences of tags: the schemes that write them, what is wrong about one, and precision, recall and F1.

Rules are those of seqeval 1.2.2 (Nakayama 2018), which are those of CoNLL's conlleval: where tags are IOB, an I-
without a span to go on begins one; where they are IOBES or BILOU, only complete spans count (seqeval's strict mode).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

OUTSIDE = "O"

Scheme = Literal["IOB", "IOBES", "BILOU"]

Span = tuple[str, int, int]
"""Type, first word, last word."""


@cache
def parts_of(tag: str) -> tuple[str, str]:
    """Return a tag's prefix and type; of a tag without a type "_"."""
    return tag[:1], tag[1:].split("-", maxsplit=1)[-1] or "_"


def scheme_of(tags: Iterable[str]) -> Scheme | None:
    """Return the scheme that a set of tags is of; None where it writes no spans.

    All tags but O have a prefix before a hyphen, or all are a prefix alone.
    """
    tags = set(tags) - {OUTSIDE}
    prefixes = {tag[:1] for tag in tags}
    if not tags or not (all(re.match("[BIESLU]-.", tag) for tag in tags) or tags == prefixes):
        return None
    if prefixes <= set("BI") and (tags != prefixes or "B" in prefixes):
        return "IOB"
    if not prefixes & set("BSU"):
        return None
    return "IOBES" if prefixes <= set("BIES") else "BILOU" if prefixes <= set("BILU") else None


def types_of(tags: Iterable[str]) -> list[str]:
    """Return the types of spans that tags of a scheme write, sorted."""
    return sorted({parts_of(tag)[1] for tag in tags if tag != OUTSIDE})


def completed(tags: Iterable[str]) -> set[str]:
    """Return tags and, where they write spans, those of each type with each prefix that one of them has."""
    tags = set(tags)
    spans = tags - {OUTSIDE}
    if scheme_of(tags) is None or spans == {tag[:1] for tag in spans}:
        return tags
    return tags | {f"{tag[:1]}-{kind}" for tag in spans for kind in types_of(spans)}


def spans_of(tags: Sequence[str], scheme: Scheme) -> list[Span]:
    """Return the spans of a sequence of tags, in order."""
    return _lenient(tags) if scheme == "IOB" else _complete(tags)


def _lenient(tags: Sequence[str]) -> list[Span]:
    found: list[Span] = []
    before = ("O", "_")
    for place, (prefix, kind) in enumerate(map(parts_of, tags)):
        if prefix != "O":
            if prefix == "B" or before[0] == "O" or kind != before[1]:
                found.append((kind, place, place))
            else:
                found[-1] = (kind, found[-1][1], place)
        before = (prefix, kind)
    return found


def _complete(tags: Sequence[str]) -> list[Span]:
    found: list[Span] = []
    begun: tuple[str, int] | None = None
    for place, (prefix, kind) in enumerate(map(parts_of, tags)):
        if prefix in "SU":
            found.append((kind, place, place))
        if prefix in "EL" and begun is not None and begun[0] == kind:
            found.append((kind, begun[1], place))
        if prefix == "B":
            begun = (kind, place)
        elif prefix != "I" or (begun is not None and begun[0] != kind):
            begun = None
    return found


# Errors


def incomplete(tags: Sequence[str]) -> int | None:
    """Return the first word whose IOBES or BILOU tag is of no complete span; None where all are right."""
    covered = {place for _, first, last in _complete(tags) for place in range(first, last + 1)}
    return next((place for place, tag in enumerate(tags) if tag != OUTSIDE and place not in covered), None)


@dataclass(frozen=True)
class Beginnings:
    """How the spans of IOB tags begin.

    spans: their number. bare: those that begin with I-, which IOB2 has not. parting: those that begin with B- though no
    span of their type stands before them, which IOB1 has not. first_bare, first_parting: row and word of the first of
    each, from 0.
    """

    spans: int
    bare: int
    parting: int
    first_bare: tuple[int, int]
    first_parting: tuple[int, int]

    @property
    def scheme(self) -> str:
        """IOB1 or IOB2, the one with fewer errors."""
        return "IOB1" if self.parting < self.bare else "IOB2"

    @property
    def errors(self) -> int:
        return min(self.bare, self.parting)


def beginnings(rows: Iterable[Sequence[str]]) -> Beginnings:
    """Count how the spans of rows of IOB tags begin."""
    spans = 0
    bare: list[tuple[int, int]] = []
    parting: list[tuple[int, int]] = []
    for row, tags in enumerate(rows):
        before = ("O", "_")
        for place, tag in enumerate(map(parts_of, tags)):
            goes_on = before[0] != "O" and tag[1] == before[1]
            if tag[0] == "B" and not goes_on:
                parting.append((row, place))
            if tag[0] == "I" and not goes_on:
                bare.append((row, place))
            spans += tag[0] == "B" or (tag[0] == "I" and not goes_on)
            before = tag
    return Beginnings(spans, len(bare), len(parting), (bare or [(0, 0)])[0], (parting or [(0, 0)])[0])


# Scores


@dataclass(frozen=True)
class Scores:
    """Precision, recall and F1 of what was found; 0 where there is nothing to divide by."""

    hits: int
    answered: int
    gold: int

    @property
    def precision(self) -> float:
        return self.hits / self.answered if self.answered else 0.0

    @property
    def recall(self) -> float:
        return self.hits / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        return 2 * self.hits / (self.answered + self.gold) if self.answered + self.gold else 0.0


def scores_by_type(
    answers: Iterable[Sequence[str]], truth: Iterable[Sequence[str]], scheme: Scheme
) -> dict[str, Scores]:
    """Return the scores of each type of span that answers or gold tags have. A span is right with its type and ends."""
    hits: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    gold: Counter[str] = Counter()
    for own, right in zip(answers, truth, strict=True):
        found, wanted = set(spans_of(own, scheme)), set(spans_of(right, scheme))
        for counter, spans in ((hits, found & wanted), (answered, found), (gold, wanted)):
            counter.update(kind for kind, _, _ in spans)
    return {kind: Scores(hits[kind], answered[kind], gold[kind]) for kind in sorted({*answered, *gold})}


def joined(scores: dict[str, Scores]) -> Scores:
    """Return the scores over the spans of all types (micro)."""
    return Scores(*(sum(getattr(one, name) for one in scores.values()) for name in ("hits", "answered", "gold")))
