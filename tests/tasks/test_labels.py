"""Classes of a model and labels of a task meet by their names."""

import itertools

import pytest
import torch
from families import tiny
from transformers import BertConfig

from kdcli.errors import InputError
from kdcli.models.classes import class_names_of
from kdcli.tasks.base import Owner
from kdcli.tasks.labels import align_outputs, output_order
from kdcli.tasks.regression import KIND as REGRESSION


def config(*names: str) -> BertConfig:
    return BertConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def order_of(config: BertConfig, *labels: str) -> list[int]:
    return output_order(config, labels, Owner())


@pytest.mark.parametrize("order", list(itertools.permutations(("entailment", "neutral", "contradiction"))))
def test_every_order_of_three_classes_is_found(order: tuple[str, ...]):
    labels = ["entailment", "neutral", "contradiction"]
    assert [order[i] for i in order_of(config(*order), *labels)] == labels


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
    assert order_of(config(*classes), *labels) == expected


def test_the_librarys_own_names_have_the_tasks_order():
    assert order_of(BertConfig(num_labels=3), "b", "a", "c") == [0, 1, 2]


def test_the_librarys_own_names_are_names_where_the_task_has_them():
    assert order_of(config("LABEL_1", "LABEL_0"), "LABEL_0", "LABEL_1") == [1, 0]


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
        order_of(config(*classes), *labels)
    assert caught.value.where == "teacher.labels" and "teacher.labels = [...]" in str(caught.value)
    assert all(name in caught.value.message for name in (*classes, *labels))


def test_another_number_of_classes_is_an_error_that_shows_both():
    with pytest.raises(InputError, match=r"the model has 3 classes \(a, b, c\), the task has 2 \(a, b\)") as caught:
        order_of(config("a", "b", "c"), "a", "b")
    assert caught.value.where == "teacher.model"


def test_a_regression_needs_a_single_output():
    model = tiny("bert", labels=1)
    assert REGRESSION.align(model, (), Owner()) is model
    with pytest.raises(InputError, match="a regression, but the model has 2 outputs"):
        REGRESSION.align(tiny("bert"), (), Owner())


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
        after = align_outputs(model, ("entailment", "neutral", "contradiction"), Owner())(ids).logits
    torch.testing.assert_close(after, before[:, [2, 0, 1]], rtol=0, atol=1e-6)
    assert class_names_of(model.config) == ["entailment", "neutral", "contradiction"]
