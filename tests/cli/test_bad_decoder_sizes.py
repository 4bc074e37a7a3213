"""Wrong sizes in a decoder's config.json, and methods that do not fit two decoders."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_decoder
from bad_input import Cases
from conftest import World
from families import tiny
from tiny_recipes import write_recipe

CASES = Cases()
case = CASES.add

TEXT: dict[str, Any] = {"type": "causal-lm", "text": "response", "max_length": 32, "max_prompt_length": None}


def distill(world: World, **changes: Any) -> list[str]:
    """Write a decoder and a recipe of plain text."""
    changes.setdefault("method", {"name": "kd", "max_new_tokens": None})
    recipe = small_decoder.write_world(world.folder, task=TEXT, **changes)
    write_recipe(world.folder / "recipe.toml", recipe)
    return ["distill", "recipe.toml"]


def sized(world: World, *without: str, family: str | None = None, **fields: Any) -> list[str]:
    """Write a decoder, change its config.json, and return the arguments of a run. family: its own, or Llama."""
    arguments = distill(world)
    if family is not None:
        words = small_decoder.tokenizer()
        tiny(family, vocab_size=len(words), pad_token_id=0).save_pretrained(world.folder / "teacher")
    path = world.folder / "teacher" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**config, **fields}))
    return arguments


@case("config.json: num_attention_heads 4 is not divisible by num_key_value_heads 3", "correct num_key_value_heads")
def keys_that_heads_cannot_share(world: World) -> list[str]:
    return sized(world, num_key_value_heads=3)


@case("config.json: num_key_value_heads is 0", "use a whole number of at least 1")
def no_heads_of_keys(world: World) -> list[str]:
    return sized(world, num_key_value_heads=0)


@case("config.json: num_key_value_heads is '2'", "use a whole number of at least 1")
def heads_of_keys_as_text(world: World) -> list[str]:
    return sized(world, num_key_value_heads="2")


@case("config.json: head_dim is 4.5", "use a whole number of at least 1")
def half_a_feature(world: World) -> list[str]:
    return sized(world, head_dim=4.5)


@case("4 heads of 7 features: Llama rotates pairs of features", "config.json: head_dim", "an even width")
def a_head_that_cannot_be_rotated(world: World) -> list[str]:
    return sized(world, head_dim=7)


@case("config.json: num_attention_heads times head_dim is 8,589,934,592, and the largest tensor dimension")
def heads_wider_than_the_file(world: World) -> list[str]:
    return sized(world, head_dim=2**31)


@case("teacher: model.layers.0.self_attn.k_proj.weight is 16 x 32, and 32 x 32 by its config.json")
def heads_of_another_width_than_the_file_has(world: World) -> list[str]:
    return sized(world, head_dim=16)


@case("hidden_size 32 is not divisible by num_attention_heads 5", "correct num_attention_heads")
def heads_that_do_not_divide_the_width(world: World) -> list[str]:
    return sized(world, "head_dim", num_attention_heads=5, num_key_value_heads=5)


@case("config.json has no num_attention_heads")
def a_decoder_without_heads(world: World) -> list[str]:
    return sized(world, "num_attention_heads")


@case("config.json: n_inner is 'wide'", "use a whole number of at least 1")
def a_feed_forward_width_that_is_none(world: World) -> list[str]:
    return sized(world, family="gpt2", n_inner="wide")


@case("config.json says 3 blocks (n_layer), the file holds 2", "correct n_layer")
def more_blocks_of_gpt2_than_the_file_has(world: World) -> list[str]:
    return sized(world, family="gpt2", n_layer=3)


@case("teacher is of the unknown family 'gemma3'", "known are albert, ", "gemma3_text", "kdcli.families")
def a_decoder_that_sees_pictures(world: World) -> list[str]:
    return sized(world, model_type="gemma3")


@case("values can be related over equal numbers of their heads, not 2 of the teacher and 4", "minilmv2")
def values_of_more_heads_than_the_teachers(world: World) -> list[str]:
    arguments = distill(
        world,
        method={"name": "minilm", "max_new_tokens": None},
        student={"form": "checkpoint", "model": "other", "layers": None},
    )
    words = small_decoder.tokenizer()
    other = tiny("llama", vocab_size=len(words), pad_token_id=0, num_key_value_heads=4)
    other.save_pretrained(world.folder / "other")
    words.save_pretrained(world.folder / "other")
    return arguments


@case("12 relation heads do not divide both 32 and 16, the widths", "method.relation_heads", "use 8")
def relation_heads_that_divide_queries_alone(world: World) -> list[str]:
    return distill(world, method={"name": "minilmv2", "relation_heads": 12, "max_new_tokens": None})


@case("dbkd works on classification and image-classification tasks", "own is a causal-lm task", "use kd, makd")
def decisions_on_plain_text(world: World) -> list[str]:
    return distill(world, method={"name": "dbkd", "max_new_tokens": None})


@case("teacher is of the family Llama, for which transformers has no model with a head for predicting masked tokens")
def masked_tokens_of_a_decoder(world: World) -> list[str]:
    arguments = distill(world)
    world.write("text.txt", "It is a bird and more.\n\n" * 30)
    recipe = small_decoder.write_world(world.folder, method={"name": "od", "max_new_tokens": None})
    words = small_decoder.tokenizer()
    words.mask_token = words.bos_token
    words.save_pretrained(world.folder / "teacher")
    recipe["task"] = {"name": "own", "type": "text", "data": "text.txt", "max_length": 32}
    write_recipe(world.folder / "recipe.toml", recipe)
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_wrong_sizes_of_decoders_are_told(name: str, world: World, own_cache: Path) -> None:
    CASES.check(name, world, own_cache)
