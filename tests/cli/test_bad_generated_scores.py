"""Wrong wishes for texts that a model writes: how they are drawn, scored, asked for, and on which sets."""

import io
import json
import sys
from typing import Any

import pytest
from bad_input import Cases
from conftest import World
from small_decoder import RECIPE, ROWS, write_world
from tiny_recipes import write_recipe

CASES = Cases()
case = CASES.add


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Any):
    CASES.check(name, world, own_cache)


def distill(world: World, **task: Any) -> list[str]:
    """Return the arguments of a run on instructions."""
    recipe = write_world(world.folder, method={"name": "kd", "max_new_tokens": None}, task=task)
    return ["distill", write_recipe(world.folder / "recipe.toml", recipe).name]


def ask(world: World, *arguments: str) -> list[str]:
    """Return the arguments of `predict` with a decoder."""
    write_world(world.folder, RECIPE)
    return ["predict", "teacher", "--type", "instruct", *arguments]


def score(world: World, rows: list[dict[str, Any]], *arguments: str) -> list[str]:
    """Return the arguments of `eval` with a decoder and a file of its own."""
    write_world(world.folder, RECIPE)
    data = world.write("scored.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return ["eval", "teacher", "--type", "instruct", "--data", data, "--max-length", "160", *arguments]


@case("seeds are of texts that are drawn", "task")
def seeds_of_greedy_texts(world: World) -> list[str]:
    return distill(world, seeds=[1, 2])


@case("seeds takes each seed once", "task")
def a_seed_given_twice(world: World) -> list[str]:
    return distill(world, sampling={}, seeds=[1, 2, 1])


@case("task.seeds")
def no_seed_at_all(world: World) -> list[str]:
    return distill(world, sampling={}, seeds=[])


@case("task.sampling.top_p", "1.5")
def a_share_above_one(world: World) -> list[str]:
    return distill(world, sampling={"top_p": 1.5})


@case("task.sampling.temperature", "0")
def drawing_at_temperature_zero(world: World) -> list[str]:
    return distill(world, sampling={"temperature": 0})


@case("task.sampling.beams")
def an_unknown_way_to_draw(world: World) -> list[str]:
    return distill(world, sampling={"beams": 4})


@case("task.max_new_tokens")
def texts_of_no_tokens(world: World) -> list[str]:
    return distill(world, max_new_tokens=0)


@case("'rouge_2' cannot be the metric of an instruct task", "rouge_l", "task.metrics")
def a_metric_that_texts_do_not_have(world: World) -> list[str]:
    return distill(world, metrics=["rouge_2"])


@case("no file at", "other.jsonl", "task.test.far")
def a_test_set_that_is_not_there(world: World) -> list[str]:
    return distill(world, test={"near": "held.jsonl", "far": "other.jsonl"})


@case("task.test")
def no_test_set_in_a_table_of_them(world: World) -> list[str]:
    return distill(world, test={})


@case("classification models write no texts", "--temperature")
def drawing_from_a_classifier(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--temperature", "1"]


@case("classification models write no texts", "--max-new-tokens")
def tokens_of_a_classifier(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--max-new-tokens", "5"]


@case("has no effect: nothing is drawn", "--seed", "--temperature 1")
def a_seed_of_nothing_that_is_drawn(world: World) -> list[str]:
    return ask(world, "Name a bird.", "--seed", "3")


@case("has no effect: nothing is drawn", "--top-p")
def a_share_of_nothing_that_is_drawn(world: World) -> list[str]:
    return ask(world, "Name a bird.", "--temperature", "0", "--top-p", "0.5")


@case("instruct models give one answer", "--top")
def the_best_of_several_texts(world: World) -> list[str]:
    return ask(world, "Name a bird.", "--top", "3")


@case("an example here has no 'response'", "instruction and context", "--with")
def a_response_beside_the_prompt(world: World) -> list[str]:
    return ask(world, "Name a bird.", "--with", "response=A bird")


@case("unknown role 'robot'", "user")
def a_role_that_no_template_knows(world: World) -> list[str]:
    line = json.dumps({"messages": [{"role": "robot", "content": "Name a bird."}]})
    world.monkeypatch.setattr(sys, "stdin", io.StringIO(line + "\n"))
    return ask(world, "-", "--json-input")


@case("has 'a bird' as its messages, not a list of {role, content}")
def a_text_in_place_of_messages(world: World) -> list[str]:
    return score(world, [{"messages": "a bird"}])


@case("row 2 has an empty response", "--set response", "remove the row")
def a_reference_that_is_empty(world: World) -> list[str]:
    return score(world, [ROWS[0], {**ROWS[1], "response": " "}])


@case("row 1 has an empty response", "--set response")
def a_list_of_no_references(world: World) -> list[str]:
    return score(world, [{**ROWS[0], "response": []}])


@case("has no response column 'response'", "'answer'")
def references_in_a_column_of_another_name(world: World) -> list[str]:
    return score(world, [{"instruction": "Name a bird.", "answer": "A bird"}])


@case("seeds are of texts that are drawn")
def seeds_of_greedy_texts_of_a_file(world: World) -> list[str]:
    return score(world, ROWS[:2], "--set", "seeds=[1]")


@case("--max-length: ", "rows: none of 2 rows is left", "--set too_long=cut")
def rows_to_score_that_are_all_dropped(world: World) -> list[str]:
    return score(world, ROWS[:2], "--max-length", "12", "--set", "too_long=drop")


@case("--task: ", "'selfinst'", "--data FILE")
def a_set_to_score_on_without_training_rows(world: World) -> list[str]:
    write_world(world.folder, RECIPE)
    return ["eval", "teacher", "--task", "selfinst"]
