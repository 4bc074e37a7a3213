"""Wrong input about methods whose models write text."""

from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World
from small_decoder import model, tokenizer, write_world
from tiny_recipes import write_recipe

CASES = Cases()
case = CASES.add


def recipe(world: World, method: dict[str, Any], **changes: Any) -> list[str]:
    """Write a teacher that writes, rows and a recipe, and return the arguments of a run."""
    document = write_world(world.folder, method={"max_new_tokens": None, **method}, **changes)
    return ["distill", str(write_recipe(world.folder / "recipe.toml", document))]


@case("seqkd works on instruct tasks: it needs prompts that a model answers", "own is a causal-lm task")
def plain_text_without_prompts(world: World) -> list[str]:
    world.write("text.txt", "A text.\n\nAnother text.\n" * 40)
    task = {"type": "causal-lm", "train": "text.txt", "validation": "text.txt", "max_prompt_length": None}
    return recipe(world, {"name": "seqkd"}, task=task)


@case("gkd works on instruct tasks: it needs prompts that a model answers", "own is a classification task")
def classes_to_be_written(world: World) -> list[str]:
    world.csv("rows.csv", [("a fine film", "yes"), ("a dull film", "no")] * 20)
    world.model()
    return ["distill", world.recipe(method="gkd")]


@case("160 new tokens leave no room for a prompt within task.max_length = 160", "method.max_new_tokens", "at most 80")
def responses_as_long_as_the_whole(world: World) -> list[str]:
    return recipe(world, {"name": "seqkd", "max_new_tokens": 160})


@case("200 new tokens leave no room for a prompt", "method.max_new_tokens")
def responses_longer_than_the_whole(world: World) -> list[str]:
    return recipe(world, {"name": "minillm", "max_new_tokens": 200})


@case("max_length 300 is more than the 256 positions that the model knows", "use at most 256")
def text_longer_than_the_context(world: World) -> list[str]:
    return recipe(world, {"name": "gkd"}, task={"max_length": 300})


@case("method.max_new_tokens: must be a whole number above 0")
def no_new_tokens(world: World) -> list[str]:
    return recipe(world, {"name": "seqkd", "max_new_tokens": 0})


@case("top_k has no effect at sampling_temperature = 0", "method.top_k", "leave it out")
def a_choice_among_one(world: World) -> list[str]:
    return recipe(world, {"name": "seqkd", "sampling_temperature": 0.0, "top_k": 5})


@case("method.top_p: must be a number above 0 and at most 1")
def no_share_of_tokens(world: World) -> list[str]:
    return recipe(world, {"name": "gkd", "top_p": 0.0})


@case("temperature has no effect where token_kd is 0", "method.temperature")
def a_temperature_of_nothing(world: World) -> list[str]:
    return recipe(world, {"name": "seqkd", "temperature": 2.0})


@case('beta has no effect without divergence = "js"', "method.beta")
def a_mean_of_one_distribution(world: World) -> list[str]:
    return recipe(world, {"name": "gkd", "divergence": "kl", "beta": 0.3})


@case('method.divergence: must be one of "js", "kl", "reverse-kl"')
def an_unknown_divergence(world: World) -> list[str]:
    return recipe(world, {"name": "gkd", "divergence": "wasserstein"})


@case("top_p has no effect where on_policy is 0", "method.top_p")
def sampling_that_never_happens(world: World) -> list[str]:
    return recipe(world, {"name": "gkd", "on_policy": 0.0, "top_p": 0.9})


@case("method.teacher_share: must be a number from 0 and below 1")
def a_teacher_that_writes_alone(world: World) -> list[str]:
    return recipe(world, {"name": "minillm", "teacher_share": 1.0})


@case("answers of a black box are not enough for seqkd", "teacher.black_box")
def a_black_box_that_would_write(world: World) -> list[str]:
    arguments = recipe(world, {"name": "seqkd"}, student={"form": "checkpoint", "model": "teacher", "layers": None})
    text = Path(arguments[1]).read_text().replace('model = "teacher"\n\n[student]', "black_box = true\n\n[student]")
    Path(arguments[1]).write_text(text)
    return arguments


@case("the teacher's states cannot be kept", "teacher.cache", "set teacher.cache = true")
def states_of_text_that_is_not_written(world: World) -> list[str]:
    return recipe(world, {"name": "gkd"}, teacher={"cache": "all"})


@case("student.model")
def a_student_of_another_tokenizer(world: World) -> list[str]:
    words = tokenizer()
    words.add_tokens(["kingfisher"])
    model(words).save_pretrained(world.folder / "other")
    words.save_pretrained(world.folder / "other")
    return recipe(world, {"name": "gkd"}, student={"form": "checkpoint", "model": "other", "layers": None})


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path) -> None:
    CASES.check(name, world, own_cache)
