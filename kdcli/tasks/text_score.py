"""How near a generated text is to its references: ROUGE-L and exact match; and a generated text as it is scored.

Sources: Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3; Gu et al. 2023, MiniLLM
(arXiv 2306.08543), section 3.1, whose scores are those of the package rouge-score with stemming.
"""

import re
import string
from collections.abc import Callable, Collection, Sequence
from functools import cache

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile("[a-z0-9]+")
SHORT = 3
"""Words of at most so many letters are not stemmed."""


def exact_match(text: str, references: Sequence[str]) -> float:
    """Return 1 where a text is one of its references, but for case, punctuation and white space, else 0.

    An empty text is none of them.
    """
    own = _plain(text)
    return float(bool(own) and any(own == _plain(reference) for reference in references))


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Return the best ROUGE-L over the references, 0 to 1: the F-measure of the longest common subsequence of words.

    Words are runs of ASCII letters and digits, in lower case and stemmed.
    """
    own = words_of(text)
    return max((_f_measure(own, words_of(reference)) for reference in references), default=0.0)


def words_of(text: str) -> list[str]:
    """Return the stemmed words of a text."""
    stem = _stemmer()
    return [stem(word) if len(word) > SHORT else word for word in _WORD.findall(text.lower())]


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is held as the bits of one number. Source: Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited", algorithm of section 4.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & every
    return len(first) - row.bit_count()


def tokens_of_text(ids: Sequence[int], end: Collection[int]) -> list[int]:
    """Return generated ids up to the first end token."""
    return list(ids[: next((place for place, token in enumerate(ids) if token in end), len(ids))])


def _f_measure(own: Sequence[str], other: Sequence[str]) -> float:
    common = common_length(own, other)
    return 2 * common / (len(own) + len(other)) if common else 0.0


def _plain(text: str) -> str:
    # Of nothing but punctuation, that is what is compared.
    return " ".join((text.lower().translate(_PUNCTUATION).strip() or text).split())


@cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    # Words come again and again.
    return cache(PorterStemmer().stem)
