"""Wrong input about tags of words."""

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World

CASES = Cases()
case = CASES.add

GOOD = [
    {"tokens": ["New", "York", "is", "big"], "tags": ["B-place", "I-place", "O", "O"]},
    {"tokens": ["Ann", "sleeps"], "tags": ["B-person", "O"]},
] * 10


def tags(world: World, *more: dict[str, Any], file: str = "tags.jsonl", **fields: Any) -> list[str]:
    """Write good rows and then others, and return the arguments of a run on them."""
    world.write("tags.jsonl", "".join(json.dumps(row) + "\n" for row in (*GOOD, *more)))
    world.model()
    task = {"type": "token-classification", "text": None, "data": file, **fields}
    return ["distill", world.recipe(task=task, teacher={"finetune": {"max_steps": 1}})]


@case("tags.jsonl: row 21 has 2 words and 1 tag", "task.label", "each word needs a tag of its own")
def fewer_tags_than_words(world: World) -> list[str]:
    return tags(world, {"tokens": ["a", "b"], "tags": ["O"]})


@case("tags.jsonl: row 21 has no words in 'tokens'", "task.text", "remove it")
def a_row_without_words(world: World) -> list[str]:
    return tags(world, {"tokens": [], "tags": []})


@case("tags.jsonl: row 21 has no tags in 'tags'", "task.label")
def a_row_without_tags(world: World) -> list[str]:
    return tags(world, {"tokens": ["a"], "tags": None})


@case("tags.jsonl: 'tokens' of row 21 is 'a text', not a list of words", ".conll")
def words_as_one_text(world: World) -> list[str]:
    return tags(world, {"tokens": "a text", "tags": ["O", "O"]})


@case("tags.csv: 'tokens' of row 1 is \"['a', 'b']\", not a list of words", "JSON lines or Parquet")
def lists_in_csv(world: World) -> list[str]:
    world.write("tags.csv", "tokens,tags\n\"['a', 'b']\",\"['O', 'O']\"\n" * 2)
    return tags(world, file="tags.csv")


@case("row 21 has None among its words, not a text")
def a_word_that_is_nothing(world: World) -> list[str]:
    return tags(world, {"tokens": ["a", None], "tags": ["O", "O"]})


@case("row 21 has None among its tags, not a text or a number")
def a_tag_that_is_nothing(world: World) -> list[str]:
    return tags(world, {"tokens": ["a", "b"], "tags": ["O", None]})


@case("row 21 has the label 'B-palce', which is not in task.labels", "did you mean 'B-place'?")
def an_unknown_tag(world: World) -> list[str]:
    names = ["O", "B-place", "I-place", "B-person", "I-person"]
    return tags(world, {"tokens": ["a", "b"], "tags": ["O", "B-palce"]}, labels=names)


@case("row 2 has the label '3', which is not in task.labels (O, B-x, I-x)")
def a_tag_number_without_a_name(world: World) -> list[str]:
    rows = [{"tokens": ["a", "b"], "tags": [1, 2]}, {"tokens": ["a"], "tags": [3]}]
    world.write("numbers.jsonl", "".join(json.dumps(row) + "\n" for row in rows * 10))
    return tags(world, file="numbers.jsonl", labels=["O", "B-x", "I-x"])


@case("held.jsonl: row 1 has the label 'B-firm', which the training data does not have")
def a_tag_that_only_held_out_rows_have(world: World) -> list[str]:
    world.write("held.jsonl", json.dumps({"tokens": ["a"], "tags": ["B-firm"]}) + "\n")
    return tags(world, data=None, train="tags.jsonl", validation="held.jsonl")


@case(
    "6 of 26 spans begin against IOB2 (first: row 21, word 2, 'b', has 'I-place')", "in IOB2 each span begins with B-"
)
def many_spans_that_begin_wrong(world: World) -> list[str]:
    return tags(world, *[{"tokens": ["a", "b", "c"], "tags": ["O", "I-place", "O"]}] * 6)


@case("row 3 has 'B-x' at word 1 ('a'), which is of no complete span of IOBES", "a single S-")
def a_span_of_iobes_without_an_end(world: World) -> list[str]:
    rows = [(["a", "b"], ["B-x", "E-x"]), (["a", "b"], ["S-x", "O"]), (["a", "b"], ["B-x", "O"])]
    content = "".join(json.dumps({"tokens": words, "tags": marks}) + "\n" for words, marks in rows * 5)
    world.write("spans.jsonl", content)
    return tags(world, file="spans.jsonl")


@case("'f1' cannot be the metric of a token-classification task; known are accuracy", "task.metrics")
def f1_of_tags_without_spans(world: World) -> list[str]:
    world.write("pos.jsonl", (json.dumps({"tokens": ["a", "b"], "tags": ["DET", "NOUN"]}) + "\n") * 20)
    return tags(world, file="pos.jsonl", metrics=["f1"])


@case("tags.conll:4 has 1 column, line 1 has 2", "a blank line ends a sentence")
def a_line_without_a_tag(world: World) -> list[str]:
    world.write("tags.conll", "a O\nb B-x\n\nc\n")
    return tags(world, file="tags.conll")


@case("tags.conll has no label column '-3'; it has '1', '2'", "task.label")
def a_column_of_tags_that_is_not_there(world: World) -> list[str]:
    world.write("tags.conll", "a O\nb B-x\n")
    return tags(world, file="tags.conll", label=-3)


@case("tags.jsonl has no text column 'token'", "did you mean 'tokens'?")
def a_near_miss_of_a_column(world: World) -> list[str]:
    return tags(world, text="token")


@case("task.max_length", "max_length 2 leaves no room for text")
def no_room_for_a_word(world: World) -> list[str]:
    return tags(world, max_length=2)


@case("task.stride", "-1")
def a_stride_below_nothing(world: World) -> list[str]:
    return tags(world, stride=-1)


@case("no trained head for classifying tokens (it is a classifier of texts)", "finetune = false")
def a_classifier_of_texts_that_must_not_be_trained(world: World) -> list[str]:
    tags(world)
    task = {"type": "token-classification", "text": None, "data": "tags.jsonl"}
    return ["distill", world.recipe(task=task, teacher={"finetune": False})]


@pytest.mark.parametrize("name", CASES)
def test_wrong_tags_are_told_in_one_message_and_leave_nothing_behind(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
