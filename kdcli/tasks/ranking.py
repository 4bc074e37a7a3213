"""How well queries find their documents: nDCG, recall and the rank of the first hit among the best few."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BEST = 10
"""Documents of each query that are looked at."""

METRICS = (f"ndcg@{BEST}", f"recall@{BEST}", f"mrr@{BEST}")

CHUNK_ELEMENTS = 2**24
"""Similarities that are held at a time."""


def ranking_scores(
    queries: "np.ndarray", documents: "np.ndarray", relevant: "Sequence[tuple[np.ndarray, np.ndarray]]"
) -> dict[str, float]:
    """Return the metrics of cosine search, each the mean over queries.

    queries: (q, width); documents: (d, width). relevant: of each query the numbers of its relevant documents and their
    grades, all above 0.
    """
    import numpy as np

    queries, documents = unit(queries), unit(documents)
    found = []
    size = max(1, CHUNK_ELEMENTS // len(documents))
    for start in range(0, len(queries), size):
        similarities = queries[start : start + size] @ documents.T
        found += [_scores_of(row, *relevant[start + i]) for i, row in enumerate(similarities)]
    return dict(zip(METRICS, np.mean(found, axis=0).tolist(), strict=True))


def unit(vectors: "np.ndarray") -> "np.ndarray":
    """Return vectors (n, width) of length 1 in double precision; zeros stay zeros."""
    import numpy as np

    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _scores_of(similarities: "np.ndarray", numbers: "np.ndarray", grades: "np.ndarray") -> tuple[float, float, float]:
    """Return the scores of one query. similarities: (d,); numbers, grades: of its relevant documents."""
    import numpy as np

    gains = np.zeros(len(similarities))
    gains[numbers] = grades
    positions, shares, order = ranked(similarities)
    # Where documents are alike, each stands in each of their places as often as any other.
    starts = np.cumsum(np.bincount(positions))[:-1]
    groups = [group.mean() for group in np.split(gains[order], starts)]
    hits = [(group > 0).mean() for group in np.split(gains[order], starts)]
    ideal = -np.sort(-grades)[:BEST]
    ndcg = float(np.dot(groups, shares) / np.dot(ideal, discounts(len(ideal))))
    places = np.diff(np.minimum(np.concatenate([[0], starts, [len(order)]]), BEST))
    recall = float(np.dot(hits, places) / len(grades))
    first = np.flatnonzero(gains[order][:BEST] > 0)
    return ndcg, recall, 1.0 / (1 + int(first[0])) if len(first) else 0.0


def ranked(similarities: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Return the documents that may be among the best, best first, as (groups, discounts, order).

    groups: the number of the group of equal similarities that each is in, (m,). discounts: the sum of those of each
    group's places among the best, (groups,). order: the documents' numbers, (m,); those alike in their own order.
    """
    import numpy as np

    best = min(BEST, len(similarities))
    last = np.partition(similarities, -best)[-best]
    among = np.flatnonzero(similarities >= last)
    order = among[np.argsort(-similarities[among], kind="stable")]
    groups = np.concatenate([[0], np.cumsum(np.diff(similarities[order]) != 0)])
    places = np.zeros(len(order))
    places[:best] = discounts(best)
    return groups, np.bincount(groups, weights=places), order


def discounts(count: int) -> "np.ndarray":
    """Return 1 / log2(rank + 1) of the first ranks, (count,)."""
    import numpy as np

    return 1.0 / np.log2(np.arange(count) + 2)
