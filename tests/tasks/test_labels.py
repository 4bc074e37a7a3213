"""Classes of a model and labels of a task meet by their names."""

import itertools

import pytest
import torch
from datasets import Dataset
from families import tiny
from transformers import BertConfig

from kdcli.distill.teacher import align_labels
from kdcli.errors import InputError
from kdcli.tasks import registry as kinds
from kdcli.tasks.base import Task
from kdcli.tasks.labels import class_names_of, label_permutation


def config(*names: str) -> BertConfig:
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def task_of(*names: str) -> Task:
    rows = Dataset.from_dict({"index": [0], "text": ["x"], "label": [0] if names else [0.5]})
    kind = "classification" if names else "regression"
    return Task("own", kinds.get(kind), names, ("accuracy",), "accuracy", False, rows, rows, {"validation": rows})


@pytest.mark.parametrize("order", list(itertools.permutations(("entailment", "neutral", "contradiction"))))
def test_every_order_of_three_classes_is_found(order: tuple[str, ...]):
    task = task_of("entailment", "neutral", "contradiction")
    permutation = label_permutation(config(*order), task)
    assert permutation is not None
    assert [order[i] for i in permutation] == list(task.label_names)


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (("POSITIVE", "NEGATIVE"), ("negative", "positive"), [1, 0]),
        (("Not Entailment", "Entailment"), ("entailment", "not_entailment"), [1, 0]),
        (("not-equivalent", " equivalent "), ("not_equivalent", "equivalent"), [0, 1]),
        (("1", "-1"), ("-1", "1"), [1, 0]),
        (("+", "-"), ("-", "+"), [1, 0]),
        (("a", "A"), ("A", "a"), [1, 0]),
        (("negativ", "übel"), ("Übel", "Negativ"), [1, 0]),
        (("负面", "正面"), ("正面", "负面"), [1, 0]),
        (("c++", "c"), ("c", "c++"), [1, 0]),
    ],
)
def test_names_match_as_they_are_or_without_case_and_punctuation(
    classes: tuple[str, ...], labels: tuple[str, ...], expected: list[int]
):
    assert label_permutation(config(*classes), task_of(*labels)) == expected


def test_the_librarys_own_names_have_the_tasks_order():
    assert label_permutation(BertConfig(num_labels=3), task_of("b", "a", "c")) == [0, 1, 2]


def test_the_librarys_own_names_are_names_where_the_task_has_them():
    assert label_permutation(config("LABEL_1", "LABEL_0"), task_of("LABEL_0", "LABEL_1")) == [1, 0]


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (("good", "bad"), ("negative", "positive")),
        (("LABEL_0", "positive"), ("negative", "positive")),
        (("yes", "no"), ("yes", "nope")),
        (("a-b", "a b"), ("a_b", "c")),
        (("a", "b"), ("a", "A")),
        (("1", "0"), ("1", "-0")),
    ],
)
def test_other_names_are_an_error_that_shows_both(classes: tuple[str, ...], labels: tuple[str, ...]):
    with pytest.raises(InputError) as caught:
        label_permutation(config(*classes), task_of(*labels))
    assert caught.value.where == "teacher.labels" and "teacher.labels = [...]" in str(caught.value)
    assert all(name in caught.value.message for name in (*classes, *labels))


def test_another_number_of_classes_is_an_error_that_shows_both():
    with pytest.raises(InputError, match=r"the model has 3 classes \(a, b, c\), task own has 2 \(a, b\)") as caught:
        label_permutation(config("a", "b", "c"), task_of("a", "b"))
    assert caught.value.where == "teacher.model"


def test_a_regression_needs_a_single_output():
    assert label_permutation(BertConfig(num_labels=1), task_of()) is None
    with pytest.raises(InputError, match="regression, but the model has 2 outputs"):
        label_permutation(BertConfig(num_labels=2), task_of())


def test_class_names_come_in_the_order_of_the_logits():
    assert class_names_of(BertConfig(id2label={2: "c", 0: "a", 1: "b"}, label2id={"a": 0, "b": 1, "c": 2})) == [
        "a",
        "b",
        "c",
    ]


def test_ten_and_more_classes_are_in_numerical_order():
    names = [f"team {i}" for i in range(12)]
    assert class_names_of(config(*names)) == names


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_an_aligned_model_gives_the_same_logits_in_the_tasks_order(family: str):
    model = tiny(family, labels=3)
    model.config.id2label = {0: "neutral", 1: "contradiction", 2: "entailment"}
    ids = torch.randint(5, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        after = align_labels(model, task_of("entailment", "neutral", "contradiction"))(ids).logits
    torch.testing.assert_close(after, before[:, [2, 0, 1]], rtol=0, atol=1e-6)
    assert class_names_of(model.config) == ["entailment", "neutral", "contradiction"]
