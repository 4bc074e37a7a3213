"""Scores of retrieval beside scikit-learn's and plain loops, also where documents are alike."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from kdcli.tasks.ranking import METRICS, ranking_scores


def world(seed: int) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return queries, documents and relevances; every second world has many equal similarities, down to all."""
    draw = np.random.default_rng(seed)
    count, width = int(draw.integers(2, 40)), int(draw.integers(2, 6))
    shape = (int(draw.integers(1, 4)), width), (count, width)
    if seed % 2:
        queries, documents = (draw.integers(0, 2, size).astype(float) for size in shape)
    else:
        queries, documents = (draw.normal(size=size) for size in shape)
    relevant = []
    for _ in queries:
        numbers = draw.choice(count, int(draw.integers(1, count + 1)), replace=False)
        relevant.append((numbers, draw.integers(1, 4, len(numbers)).astype(float)))
    return queries, documents, relevant


def cosines(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return the cosine of every query with every document; 0 for zeros."""

    own, other = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (queries, documents)
    )
    return own @ other.T


def test_ndcg_is_scikit_learns_on_a_thousand_worlds():
    for seed in range(1000):
        queries, documents, relevant = world(seed)
        truth = np.zeros((len(queries), len(documents)))
        for row, (numbers, grades) in zip(truth, relevant, strict=True):
            row[numbers] = grades
        expected = ndcg_score(truth, cosines(queries, documents), k=10)
        assert ranking_scores(queries, documents, relevant)["ndcg@10"] == pytest.approx(expected, abs=1e-12), seed


def test_recall_and_rank_are_those_of_a_plain_loop():
    for seed in range(0, 400, 2):
        queries, documents, relevant = world(seed)
        recalls, ranks = [], []
        for row, (numbers, _) in zip(cosines(queries, documents), relevant, strict=True):
            best = sorted(range(len(row)), key=lambda i, row=row: -row[i])[:10]
            recalls.append(len(set(best) & set(numbers)) / len(numbers))
            ranks.append(next((1 / rank for rank, number in enumerate(best, 1) if number in numbers), 0.0))
        found = ranking_scores(queries, documents, relevant)
        assert (found["recall@10"], found["mrr@10"]) == pytest.approx((np.mean(recalls), np.mean(ranks)))


def test_documents_that_are_alike_share_their_places():
    # Twenty equal documents, one of them relevant: it is among the ten in half of all orders.
    found = ranking_scores(np.ones((1, 2)), np.ones((20, 2)), [(np.array([3]), np.array([1.0]))])
    assert found["recall@10"] == pytest.approx(0.5)
    assert found["ndcg@10"] == pytest.approx(sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / 20)


def test_a_perfect_order_scores_one_whatever_the_length_of_vectors():
    queries = np.array([[3.0, 0.0], [0.0, 0.1]])
    documents = np.array([[0.0, 9.0], [0.2, 0.0], [-1.0, -1.0]])
    relevant = [(np.array([1]), np.array([2.0])), (np.array([0]), np.array([1.0]))]
    assert ranking_scores(queries, documents, relevant) == dict.fromkeys(METRICS, 1.0)
