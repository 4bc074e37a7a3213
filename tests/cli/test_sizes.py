"""The sizes in config.json: what is no size, or more than the file can hold, is named before a model is built."""

import json
from typing import Any

import pytest
from conftest import World

EVAL = ("eval", "teacher", "--data", "rows.csv", "--text", "text")


def change(world: World, kind: str = "teacher", *without: str, **fields: Any) -> None:
    path = world.model(kind) / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("kind", ["teacher", "chains"])
@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("num_hidden_layers", "says 2,147,483,648 blocks (num_hidden_layers), the file holds 2"),
        ("vocab_size", "vocab_size is 2,147,483,648, and the largest tensor dimension in the file is 220"),
        ("hidden_size", "hidden_size is 2,147,483,648, and the largest"),
        ("intermediate_size", "intermediate_size is 2,147,483,648, and the largest"),
        ("num_attention_heads", "hidden_size 32 is not divisible by num_attention_heads 2,147,483,648"),
        ("max_position_embeddings", "max_position_embeddings is 2,147,483,648"),
        ("type_vocab_size", "type_vocab_size is 2,147,483,648"),
    ],
)
def test_more_than_the_file_holds_is_refused_at_once(world: World, kind: str, field: str, words: str):
    change(world, kind, **{field: 2**31})
    outcome = world.call(*EVAL)
    assert outcome.code == 2 and "config.json" in outcome.err and words in outcome.err


def test_a_number_of_classes_without_names_has_a_limit(world: World):
    change(world, "teacher", "id2label", "label2id", num_labels=2**31)
    outcome = world.call(*EVAL)
    assert outcome.code == 2 and "config.json: num_labels is 2,147,483,648" in outcome.err


def test_an_architecture_that_is_not_named_changes_nothing(world: World):
    change(world, "teacher", "architectures", num_hidden_layers=2**31)
    outcome = world.call(*EVAL)
    assert outcome.code == 2 and "the file holds 2" in outcome.err


COMMANDS = [
    EVAL,
    ("distill", "recipe.toml", "--dry-run"),
    ("overparam", "teacher", "--length", "1", "--out", "made"),
    ("export", "teacher", "--out", "made", "--no-latency"),
]


@pytest.mark.parametrize("value", [-1, 0, "4", 4.0, float("nan"), True, None, [4], "x" * 500])
def test_what_is_no_size_is_named_by_every_command(world: World, value: Any):
    change(world, num_attention_heads=value)
    world.recipe()
    for command in COMMANDS:
        outcome = world.call(*command)
        assert outcome.code == 2, command
        assert "config.json: num_attention_heads is " in outcome.err, command
        assert "use a whole number of at least 1" in outcome.err and "\x1b" not in outcome.err and outcome.out == ""


@pytest.mark.parametrize(
    "field", ["num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"]
)
def test_a_size_that_is_missing_is_named_and_not_made_up(world: World, field: str):
    change(world, "teacher", field)
    world.recipe()
    for command in COMMANDS:
        outcome = world.call(*command)
        assert outcome.code == 2 and f"config.json has no {field}" in outcome.err, command
