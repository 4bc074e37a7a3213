"""Exact match and F1 of answers, by the rules of SQuAD's own scripts for v1.1 and v2.0.

Sources: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1; Rajpurkar et al. 2018 (arXiv 1806.03822).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and white space beside single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def scores_of(answer: str, references: Sequence[str], *, unanswerable: bool) -> tuple[float, float]:
    """Return exact match and F1, each the best over the references; an empty answer says that there is none.

    unanswerable: whether the set has questions without an answer, which v2.0's rules are for. There references of
    nothing but articles and punctuation do not count, and nothing is right where no other reference is left; under
    those of v1.1 an F1 without a common word is 0.
    """
    own, others = normalised(answer), [normalised(text) for text in references]
    if unanswerable:
        others = [other for other in others if other] or [""]
    exact = max((float(own == other) for other in others), default=0.0)
    return exact, max((_f1(own.split(), other.split(), empty=unanswerable) for other in others), default=0.0)


def _f1(own: list[str], other: list[str], *, empty: bool) -> float:
    if empty and not (own and other):
        return float(own == other)
    common = sum((Counter(own) & Counter(other)).values())
    if not common:
        return 0.0
    precision, recall = common / len(own), common / len(other)
    return 2 * precision * recall / (precision + recall)
