"""Wrong wishes for how predictions over a vocabulary are compared, and what is kept of them."""

from pathlib import Path
from typing import Any

import families
import pytest
from bad_input import Cases
from conftest import World
from small_decoder import write_world
from tiny_recipes import write_recipe

from kdcli.models.save import save_model

CASES = Cases()
case = CASES.add

KD = {"name": "kd", "max_new_tokens": None}


def recipe(world: World, method: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """Write a decoder that teaches, prompts with responses and a recipe, and return the arguments of a run."""
    document = write_world(world.folder, method={**KD, **(method or {})}, **changes)
    return ["distill", str(write_recipe(world.folder / "recipe.toml", document))]


@case("a classification task predicts no tokens", "teacher.top_k", "leave it out")
def classes_cut_to_some(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(teacher={"model": "teacher", "top_k": 8})]


@case("gkd trains on text that the student writes meanwhile", "teacher.top_k")
def tokens_of_text_that_is_not_written_yet(world: World) -> list[str]:
    return recipe(world, {"name": "gkd"}, teacher={"top_k": 8})


@case("top_k = 100,000 leaves nothing out of the teacher's", "such as 64")
def more_tokens_than_there_are(world: World) -> list[str]:
    return recipe(world, teacher={"top_k": 100_000})


@case("top_k keeps what the teacher says, and cache = false keeps nothing")
def tokens_kept_without_a_cache(world: World) -> list[str]:
    return recipe(world, teacher={"top_k": 8, "cache": False})


@case("top_k is computed by one process", "sharding")
def tokens_of_a_teacher_in_parts(world: World) -> list[str]:
    return recipe(world, teacher={"top_k": 8, "sharding": "fsdp"})


@case("teacher.top_k: must be a whole number above 0")
def no_tokens_kept(world: World) -> list[str]:
    return recipe(world, teacher={"top_k": 0})


@case("hs compares no predictions of the teacher here", "teacher.top_k")
def tokens_kept_that_nothing_compares(world: World) -> list[str]:
    weights = {"prediction": 0.0}
    return recipe(world, {"name": "hs", "weights": weights}, teacher={"top_k": 8})


@case("beta has no effect beside divergence skew-kl", "method.beta", "js")
def a_share_of_another_divergence(world: World) -> list[str]:
    return recipe(world, {"divergence": "skew-kl", "beta": 0.3})


@case("method.divergence: must be one of", "reverse-kl")
def an_unknown_divergence_of_kd(world: World) -> list[str]:
    return recipe(world, {"divergence": "hellinger"})


@case("both models must read the same tokens", "student.model", "choose a student with the teacher's tokenizer")
def a_decoder_of_other_tokens(world: World) -> list[str]:
    arguments = recipe(world, student={"form": "checkpoint", "model": "other", "layers": None})
    (world.folder / "other").mkdir()
    save_model(families.tiny("llama"), Path(world.folder / "other"), families.tokenizer())
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
