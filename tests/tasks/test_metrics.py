"""Metrics, against values computed by hand and against formulas written out here."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.evaluation.score import primary_score
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.regression import KIND as REGRESSION


def rows_of(labels: Sequence[float]) -> Dataset:
    return Dataset.from_dict({"label": list(labels)})


def scores(kind: TaskKind, names: Sequence[str], logits: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    rows = rows_of(labels)
    classes = [str(i) for i in range(logits.shape[-1])]
    return kind.score(kind.decode({"logits": logits}, rows, rows), rows, classes, names)


def logits_of(predictions: Sequence[int], classes: int) -> np.ndarray:
    return np.eye(classes)[list(predictions)] * 3 - 1


def score(name: str, predictions: Sequence[int], labels: Sequence[int], classes: int = 2) -> float:
    return scores(CLASSIFICATION, [name], logits_of(predictions, classes), labels)[name]


def correlation(name: str, predictions: Sequence[float], labels: Sequence[float]) -> float:
    return scores(REGRESSION, [name], np.array(predictions)[:, None], labels)[name]


def chance(primary: str, sets: dict[str, list], classes: int = 2) -> float | None:
    kind: TaskKind = CLASSIFICATION if primary in CLASSIFICATION.metrics else REGRESSION
    return kind.chance([rows_of(labels) for labels in sets.values()], list(map(str, range(classes))), primary)


LABELS = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
ANSWERS = [1, 1, 1, 0, 1, 0, 0, 0, 0, 0]
"""Three hits, one miss, one false alarm, five correct rejections."""


def test_two_classes_by_hand():
    assert score("accuracy", ANSWERS, LABELS) == pytest.approx(8 / 10)
    assert score("f1", ANSWERS, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert score("mcc", ANSWERS, LABELS) == pytest.approx((3 * 5 - 1 * 1) / math.sqrt(4 * 4 * 6 * 6))
    assert score("balanced_accuracy", ANSWERS, LABELS) == pytest.approx((3 / 4 + 5 / 6) / 2)


def test_f1_of_two_classes_asks_for_class_one():
    assert score("f1", [1 - p for p in ANSWERS], [1 - y for y in LABELS]) == pytest.approx(2 * 5 / (2 * 5 + 1 + 1))


def test_three_classes_by_hand():
    labels, answers = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    # One by one: 2 hits, 0 false alarms, 1 miss; 1, 1, 1; 1, 1, 0.
    assert score("f1", answers, labels, 3) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert score("balanced_accuracy", answers, labels, 3) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # Gorodkin's form: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)), c = 4 right of s = 6.
    top = 4 * 6 - (2 * 3 + 2 * 2 + 2 * 1)
    assert score("mcc", answers, labels, 3) == pytest.approx(top / math.sqrt((36 - 12) * (36 - 14)))


def test_f1_of_three_classes_stays_the_mean_when_one_of_them_does_not_occur():
    # Class 0: 2 hits, 1 miss; class 1: 1 hit, 1 false alarm. F1 of class 1 alone would be 2/3.
    assert score("f1", [0, 0, 1, 1], [0, 0, 0, 1], 3) == pytest.approx((4 / 5 + 2 / 3) / 2)


@pytest.mark.parametrize("name", ["mcc", "f1", "accuracy", "balanced_accuracy"])
def test_perfect_answers_score_one(name: str):
    assert score(name, [0, 1, 2, 1, 0], [0, 1, 2, 1, 0], 3) == pytest.approx(1.0)


def test_opposite_answers_have_an_mcc_of_minus_one():
    assert score("mcc", [1 - y for y in LABELS], LABELS) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("mcc", 0, 0.0),
        ("mcc", 1, 0.0),
        ("f1", 0, 0.0),
        ("f1", 1, 2 * 4 / (2 * 4 + 6)),
        ("accuracy", 0, 0.6),
        ("accuracy", 1, 0.4),
        ("balanced_accuracy", 0, 0.5),
        ("balanced_accuracy", 1, 0.5),
    ],
)
def test_one_answer_for_everything(name: str, answer: int, expected: float):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(name, [answer] * 10, LABELS) == pytest.approx(expected)


def test_the_largest_logit_is_the_answer_whatever_its_size():
    logits = np.array([[-9.0, -8.0], [1e-3, 0.0], [5.0, 70.0]])
    assert scores(CLASSIFICATION, ["accuracy"], logits, [1, 0, 1]) == {"accuracy": 1.0}


def test_pearson_by_hand():
    # Deviations -1.5 -0.5 0.5 1.5 and -1 -1 0 2: products 5, squares 5 and 6.
    assert correlation("pearson", [1, 2, 3, 4], [0, 0, 1, 3]) == pytest.approx(5 / math.sqrt(5 * 6))


def test_spearman_is_pearson_of_ranks_and_ties_share_theirs():
    # Ranks 1 2 3 4 and 1.5 1.5 3 4: products 4.5, squares 5 and 4.5.
    assert correlation("spearman", [1, 2, 3, 4], [0, 0, 1, 3]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_spearman_sees_order_alone_and_pearson_does_not():
    values = [0.1, 0.4, 1.0, 2.0, 7.0]
    assert correlation("spearman", [math.exp(v) for v in values], values) == pytest.approx(1.0)
    assert correlation("pearson", [math.exp(v) for v in values], values) < 0.98
    assert correlation("spearman", [-v for v in values], values) == pytest.approx(-1.0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=20),
    st.sampled_from([0.5, 2.0, 30.0]),
    st.integers(-5, 5),
)
def test_correlations_do_not_depend_on_scale_and_offset(pairs: list[tuple[int, int]], scale: float, offset: int):
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    for name in ("pearson", "spearman"):
        moved = correlation(name, [scale * v + offset for v in x], y)
        assert moved == pytest.approx(correlation(name, x, y), abs=1e-9) and -1 - 1e-9 <= moved <= 1 + 1e-9


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_constant_and_single_predictions_have_no_correlation(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert correlation(name, [2.5] * 4, [1.0, 2.0, 3.0, 4.0]) == 0.0
        assert correlation(name, [2.5], [1.0]) == 0.0


def test_errors_of_a_regression_by_hand():
    result = scores(REGRESSION, ["mse", "mae"], np.array([[1.0], [2.0], [4.0]]), [1.0, 4.0, 1.0])
    assert result == {"mse": pytest.approx((0 + 4 + 9) / 3), "mae": pytest.approx((0 + 2 + 3) / 3)}


def test_half_precision_predictions_are_scored_in_double():
    values = np.arange(1000, 1064, dtype=np.float16)[:, None]
    assert scores(REGRESSION, ["pearson"], values, np.arange(64.0).tolist())["pearson"] == pytest.approx(1.0)


def test_a_set_with_one_class_alone_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(CLASSIFICATION, CLASSIFICATION.metrics, logits_of([1, 1, 1], 2), [1, 1, 1])
    assert found == {"accuracy": 1.0, "f1": 1.0, "mcc": 0.0, "balanced_accuracy": 1.0, "top5_accuracy": 1.0}


@pytest.mark.parametrize(
    ("primary", "expected"),
    [("accuracy", 0.6), ("f1", 2 * 4 / (2 * 4 + 6)), ("mcc", 0.0), ("balanced_accuracy", 0.5)],
)
def test_chance_is_the_best_single_answer(primary: str, expected: float):
    assert chance(primary, {"validation": LABELS}) == pytest.approx(expected)


def test_chance_with_more_positives_than_negatives():
    flipped = {"validation": [1 - y for y in LABELS]}
    assert chance("f1", flipped) == pytest.approx(2 * 6 / (2 * 6 + 4))
    assert chance("accuracy", flipped) == pytest.approx(0.6)


def test_chance_of_three_classes():
    labels = {"validation": [0, 2, 2, 1, 2, 0]}
    assert chance("accuracy", labels, 3) == pytest.approx(0.5)
    assert chance("balanced_accuracy", labels, 3) == pytest.approx(1 / 3)
    # All 2: three hits and three false alarms make 2/3 for class 2, and 0 for the other two.
    assert chance("f1", labels, 3) == pytest.approx(2 / 3 / 3)


def test_chance_of_a_regression_is_no_correlation():
    assert chance("pearson", {"validation": [0.5, 1.5, 4.0]}) == 0.0


def test_chance_of_two_sets_is_the_mean_of_one_answer_over_both():
    sets = {"matched": [0, 0, 0, 1], "mismatched": [1, 1, 0, 2, 0, 2, 0, 0, 0, 0]}
    # Always 0: 3/4 and 6/10, whatever the sizes of the sets.
    assert chance("accuracy", sets, 3) == pytest.approx((3 / 4 + 6 / 10) / 2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=30), st.sampled_from(sorted(CLASSIFICATION.metrics)))
def test_no_single_answer_beats_chance(labels: list[int], primary: str):
    reached = chance(primary, {"validation": labels}, 3)
    best = max(score(primary, [answer] * len(labels), labels, 3) for answer in range(3))
    assert reached == pytest.approx(best)


def test_mnli_counts_as_the_mean_of_its_two_sets():
    scores = {"matched": {"accuracy": 0.8}, "mismatched": {"accuracy": 0.7}}
    assert primary_score(scores, "accuracy") == pytest.approx(0.75)


def test_only_the_first_metric_makes_the_score():
    assert primary_score({"validation": {"f1": 0.9, "accuracy": 0.1}}, "f1") == pytest.approx(0.9)
