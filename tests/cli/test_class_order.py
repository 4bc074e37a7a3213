"""The order of a model's classes: a student that starts from a trained head means by class 0 what the task does."""

from pathlib import Path

import pytest
import torch
from conftest import World
from families import tiny, tokenizer

from kdcli.data.reviews import reviews
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.tasks.heads import load_model

NAMES = ["positive", "negative"]
"""Not the order of the alphabet, which is the task's."""


@pytest.fixture
def rows(world: World) -> list[tuple[str, str]]:
    """Put a classifier into `start`, and reviews with the labels that it gives them itself into `own.csv`."""
    model, words = tiny("bert", id2label=dict(enumerate(NAMES)), seed=3), tokenizer()
    texts = list(dict.fromkeys(reviews()["train"]["text"]))[:200]
    with torch.no_grad():
        batch = words(texts, padding=True, return_tensors="pt")
        logits = model(**batch).logits
        # Half of the texts in each class.
        model.classifier.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
        answers = model(**batch).logits.argmax(-1).tolist()
    (world.folder / "start").mkdir()
    save_model(model, world.folder / "start", words)
    found = [(text, NAMES[answer]) for text, answer in zip(texts, answers, strict=True)]
    assert 80 < answers.count(0) < 120
    world.csv("own.csv", [(f'"{text}"', label) for text, label in found])
    return found


def train(world: World, **tables: object) -> dict:
    """Take one step at a rate that changes nothing, from `start`, and return the run's record."""
    recipe = world.recipe(
        "teacher",
        "student",
        **{
            "task": {"data": "own.csv", "max_length": 64},
            "student": {"form": "checkpoint", "model": "start"},
            "train": {"learning_rate": 1e-9},
            **tables,
        },
    )
    done = world.call("distill", recipe, "--json")
    assert done.code == 0, done.err
    return done.json


def agrees(folder: Path, rows: list[tuple[str, str]]) -> bool:
    """True when a saved student gives texts the class of their label, by the names in its configuration.

    One of the texts is the median, which a rounding may move to the other class.
    """
    model, words = load_model(folder), load_tokenizer(folder)
    with torch.no_grad():
        answers = model(**words([text for text, _ in rows], padding=True, return_tensors="pt")).logits.argmax(-1)
    pairs = zip(answers.tolist(), rows, strict=True)
    return sum(model.config.id2label[answer] == label for answer, (_, label) in pairs) >= len(rows) - 2


@pytest.mark.parametrize("method", ["kd", "dbkd"])
def test_teacher_and_student_from_one_folder_agree(method: str, world: World, rows: list[tuple[str, str]]):
    record = train(world, method=method, teacher={"model": "start"})
    assert record["teacher"]["score"] == record["student"]["score"] == 1.0
    assert agrees(world.folder / "runs" / "recipe" / "student", rows)


def test_the_student_of_a_black_box_keeps_what_its_checkpoint_knows(world: World, rows: list[tuple[str, str]]):
    world.write(
        "decider.py", "def decide(texts):\n    return ['positive' if 'good' in t else 'negative' for t in texts]\n"
    )
    method = {"name": "dbkd", "copies": 2, "black_box": {"callable": "decider:decide"}}
    record = train(world, method=method, teacher={"black_box": True})
    assert record["student"]["score"] == 1.0
    assert agrees(world.folder / "runs" / "recipe" / "student", rows)
