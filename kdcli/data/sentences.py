"""Plain text cut into sentences or paragraphs."""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

Unit = Literal["sentences", "paragraphs", "texts"]

_PARAGRAPH = re.compile(r"\s*\n\s*")
_END = re.compile(
    r"[.!?\u2026\u061f\u0964\u0965]+[\"'\u2019\u201d\u00bb)\]]*\s+"
    r"|[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*\s*"
)
"""What a sentence may end with: marks of Latin, Arabic and Indian scripts before a space, those of Chinese and Japanese
without one."""

_SHORT = set(
    re.findall(
        r"\S+",
        "adm al apr aug bros capt cf co col corp dec dept dr e.g ed eds esp est etc feb fig figs ft gen gov hon i.e "
        "inc jan jr lt ltd maj messrs mme mr mrs ms mt mts no nos nov oct op p pp pres prof rep reps rev sec sen sept "
        "sgt sr st vol vs",
    )
)
"""Words that are written with a full stop, which ends no sentence."""


def cut(documents: Iterable[str], unit: Unit) -> Iterator[str]:
    """Yield the sentences, paragraphs or whole texts of documents; each once, and only those with a letter or a digit.

    A paragraph ends with its line. A sentence ends with a mark of its script (. ! ? ...) in front of what does not
    begin with a small letter, unless all letters of the paragraph are small; a full stop after an abbreviation, an
    initial or the number of a list ends none.
    """
    seen: set[int] = set()
    for document in documents:
        for part in _parts(document, unit):
            part = part.strip()
            if any(map(str.isalnum, part)) and (key := hash(part)) not in seen:
                seen.add(key)
                yield part


def _parts(document: str, unit: Unit) -> Iterator[str]:
    if unit == "texts":
        yield document
        return
    for paragraph in _PARAGRAPH.split(document):
        yield from sentences(paragraph) if unit == "sentences" else (paragraph,)


def sentences(paragraph: str) -> Iterator[str]:
    """Yield the sentences of a paragraph, which are all of it but the space between them."""
    start, small = 0, paragraph.islower()
    for match in _END.finditer(paragraph):
        after = paragraph[match.end() : match.end() + 2].lstrip("\"'(\u201c\u2018\u00ab[")
        if (small or not after[:1].islower()) and not _is_short(paragraph[start : match.start() + 1]):
            yield paragraph[start : match.end()].rstrip()
            start = match.end()
    if rest := paragraph[start:].strip():
        yield rest


def _is_short(sentence: str) -> bool:
    """True when what ends with this full stop is an abbreviation, an initial, or the number of a list."""
    if not sentence.endswith("."):
        return False
    *_, word = sentence[:-1].rsplit(None, 1) or [""]
    word = word.lstrip("\"'(\u201c\u2018[")
    alone = word == sentence[:-1].strip()
    return word.lower() in _SHORT or (len(word) == 1 and word.isupper() and word != "I") or (alone and word.isdigit())
