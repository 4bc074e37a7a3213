"""The best five classes, and the scores of each class by itself, against scikit-learn's."""

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

from kdcli.evaluation.result import tables_by_class
from kdcli.tasks import registry
from kdcli.tasks.by_class import ClassScores

CLASSIFICATION, MULTI_LABEL = registry.get("classification"), registry.get("multi-label")


def drawn(seed: int, rows: int = 60, classes: int = 9) -> tuple[np.ndarray, Dataset, list[str]]:
    """Logits by which class 3 is never answered, gold classes without class 8, and the names of all."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes)).astype(np.float32)
    logits[:, 3] = -9.0
    labels = generator.integers(0, classes - 1, rows)
    return logits, Dataset.from_dict({"label": labels.tolist()}), [f"class {i}" for i in range(classes)]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_five_are_scikit_learns(seed: int):
    logits, rows, names = drawn(seed)
    answers = CLASSIFICATION.decode({"logits": logits}, rows, rows)
    found = CLASSIFICATION.score(answers, rows, names, ["top5_accuracy", "accuracy"])
    numbers = range(len(names))
    assert found == {
        name: pytest.approx(top_k_accuracy_score(rows["label"], logits, k=k, labels=numbers))
        for name, k in (("top5_accuracy", 5), ("accuracy", 1))
    }


def test_of_equal_logits_the_first_classes_come_first():
    rows = Dataset.from_dict({"label": [0, 0]})
    answers = CLASSIFICATION.decode({"logits": np.zeros((2, 7), np.float32)}, rows, rows)
    assert answers.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_chance_has_the_five_largest_classes_right():
    rows = Dataset.from_dict({"label": [6] * 4 + [5] * 3 + [0, 1, 2, 3, 4]})
    names = [str(i) for i in range(7)]
    assert CLASSIFICATION.chance([rows], names, "top5_accuracy") == pytest.approx(10 / 12)
    assert CLASSIFICATION.chance([rows], names, "accuracy") == pytest.approx(4 / 12)


@pytest.mark.parametrize(("classes", "fits"), [(2, False), (5, False), (6, True), (10, True)])
def test_the_best_five_need_six_classes(classes: int, fits: bool):
    every, _ = CLASSIFICATION.metrics_for([str(i) for i in range(classes)])
    assert ("top5_accuracy" in every) is fits and "accuracy" in every


@pytest.mark.parametrize("seed", range(4))
def test_the_scores_of_each_class_are_scikit_learns(seed: int):
    logits, rows, names = drawn(seed)
    found = CLASSIFICATION.by_class(CLASSIFICATION.decode({"logits": logits}, rows, rows), rows, names)
    table = precision_recall_fscore_support(rows["label"], logits.argmax(1), labels=range(len(names)), zero_division=0)
    expected = dict(zip(names, zip(*table, strict=True), strict=True))
    assert list(found) == names
    for name, one in found.items():
        assert (one.precision, one.recall, one.f1, one.support) == pytest.approx(expected[name])


def test_a_class_that_no_row_has_and_no_answer_names_is_left_out():
    rows = Dataset.from_dict({"label": [0, 1]})
    answers = CLASSIFICATION.decode({"logits": np.array([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])}, rows, rows)
    assert CLASSIFICATION.by_class(answers, rows, ["a", "b", "c", "d"]) == {
        "a": ClassScores(1, 1.0, 1.0, 1.0),
        "b": ClassScores(1, 0.0, 0.0, 0.0),
        "c": ClassScores(0, 0.0, 0.0, 0.0),
    }


def test_each_of_several_labels_is_scored_by_itself():
    generator = np.random.default_rng(0)
    truth, logits = generator.integers(0, 2, (40, 4)), generator.normal(size=(40, 4))
    rows = Dataset.from_dict({"label": truth.astype(float).tolist()})
    answers = MULTI_LABEL.decode({"logits": logits}, rows, rows)
    found = MULTI_LABEL.by_class(answers, rows, ["a", "b", "c", "d"])
    table = precision_recall_fscore_support(truth, answers.chosen, zero_division=0)
    for expected, one in zip(zip(*table, strict=True), found.values(), strict=True):
        assert (one.precision, one.recall, one.f1, one.support) == pytest.approx(expected)


def test_models_stand_side_by_side_and_of_many_classes_those_with_the_lowest_f1():
    teacher = {"test": {"cat": ClassScores(3, 0.5, 1.0, 2 / 3), "dog": ClassScores(2, 1.0, 1.0, 1.0)}}
    student = {"test": {"cat": ClassScores(3, 1.0, 1.0, 1.0), "dog": ClassScores(2, 0.0, 0.0, 0.0)}}
    student["test"]["elk"] = ClassScores(0, 0.0, 0.0, 0.0)
    sides = {"teacher": teacher, "student": student}
    [head, *rows] = tables_by_class(sides)["test"]
    scores = [f"{score} {side}" for score in ("precision", "recall", "F1") for side in ("teacher", "student")]
    assert head == ["class", "examples", *scores]
    assert rows == [
        ["cat", "3", "50.00", "100.00", "100.00", "100.00", "66.67", "100.00"],
        ["dog", "2", "100.00", "0.00", "100.00", "0.00", "100.00", "0.00"],
        ["elk", "0", "0.00", "0.00", "0.00", "0.00", "0.00", "0.00"],
    ]
    assert [cells[0] for cells in tables_by_class(sides, most=2)["test"][1:]] == ["dog", "elk"]
