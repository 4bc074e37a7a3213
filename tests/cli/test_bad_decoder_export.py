"""Wrong wishes for the graph of a causal language model."""

import json
from pathlib import Path

import pytest
import small_decoder
from bad_input import Cases
from conftest import World
from tiny_recipes import write_recipe

CASES = Cases()
case = CASES.add


def export(world: World, *options: str) -> list[str]:
    small_decoder.write_world(world.folder)
    return ["export", "./teacher", "--out", "made", "--no-latency", *options]


@case("--precision: ", "ONNX Runtime GenAI")
def weights_of_4_bits_without_the_builder(world: World) -> list[str]:
    # Its heads are 8 wide: it cannot be built with the extra, either.
    return export(world, "--precision", "int4")


@case("--builder: ", "ONNX Runtime GenAI")
def a_builder_that_cannot_build(world: World) -> list[str]:
    return export(world, "--builder", "genai")


@case("--precision: kdcli's own graph is of fp32, not fp16", "leave out --builder")
def two_makers_of_one_graph(world: World) -> list[str]:
    return export(world, "--builder", "kdcli", "--precision", "fp16")


@case("--opset: a graph with a key-value cache needs opset 23, not 21")
def an_opset_without_grouped_attention(world: World) -> list[str]:
    return export(world, "--opset", "21")


@case("--sequence-lengths", "256")
def a_prompt_that_is_longer_than_the_positions(world: World) -> list[str]:
    small_decoder.write_world(world.folder)
    return ["export", "./teacher", "--out", "made", "--sequence-lengths", "512"]


@case("--precision: int4 is for causal language models, and this is a ")
def weights_of_4_bits_for_an_encoder(world: World) -> list[str]:
    world.model()
    return ["export", "./teacher", "--out", "made", "--no-latency", "--precision", "int4"]


@case("--builder: genai is for causal language models")
def a_builder_for_an_encoder(world: World) -> list[str]:
    world.model()
    return ["export", "./teacher", "--out", "made", "--no-latency", "--builder", "genai"]


def graph(world: World) -> str:
    small_decoder.write_world(world.folder)
    (world.folder / "teacher").rename(world.folder / "graph")
    (world.folder / "graph" / "model.onnx").touch()
    return "./graph"


@case("MODEL: ./graph is an exported graph already", "name the model it was made from")
def a_graph_to_make_a_graph_of(world: World) -> list[str]:
    return ["export", graph(world), "--out", "made"]


@case("--teacher: ./graph is an exported graph already", "name the model it was made from")
def a_graph_to_time_beside(world: World) -> list[str]:
    name = graph(world)
    return export(world, "--teacher", name)


@case("--precision: ", "does not keep to the window of 5 tokens", "kdcli's own graph does, in fp32")
def weights_of_16_bits_with_a_window(world: World) -> list[str]:
    options = export(world, "--precision", "fp16")
    path = world.folder / "teacher" / "config.json"
    other = {"sliding_window": 5, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    return options


@case("export.precision: ", "ONNX Runtime GenAI")
def a_recipe_for_weights_of_4_bits(world: World) -> list[str]:
    recipe = small_decoder.write_world(world.folder, method="kd", export={"onnx": True, "precision": "int4"})
    write_recipe(world.folder / "recipe.toml", recipe)
    return ["distill", "recipe.toml"]


@pytest.mark.parametrize("name", CASES)
def test_wrong_wishes_for_graphs_are_told(name: str, world: World, own_cache: Path) -> None:
    CASES.check(name, world, own_cache)
