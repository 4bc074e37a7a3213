"""What is refused of models of which only outputs are seen, and of halves of larger models."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bad_input import Cases
from conftest import World
from image_rows import pictures, rows_of
from outer_models import processor, swin, tower, whole
from tiny_recipes import changed, write_recipe
from transformers import PreTrainedModel

from kdcli.models.heads import IMAGE_CLASSIFICATION
from kdcli.models.save import save_model

CASES = Cases()
case = CASES.add

RECIPE: dict[str, Any] = {
    "method": "kd",
    "task": {
        "name": "pictures",
        "type": "image-classification",
        "data": "rows.parquet",
        "labels": ["a", "b", "c"],
    },
    "teacher": {"model": "teacher"},
    "student": {"form": "checkpoint", "model": "teacher"},
    "train": {"max_steps": 1, "precision": "fp32"},
}
NAMED = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
REASON = "of Swin kdcli sees outputs only, because its blocks have other widths"


def put(world: World, model: PreTrainedModel, name: str) -> Path:
    model.config.update(NAMED)
    (world.folder / name).mkdir()
    save_model(model.eval(), world.folder / name, processor())
    return world.folder / name


def recipe(world: World, **changes: Any) -> list[str]:
    """Put a Swin, rows and a recipe of both there, and return the arguments of the program."""
    put(world, swin(), "teacher")
    pq.write_table(rows_of(pictures(12)).data.table, world.folder / "rows.parquet")
    return ["distill", write_recipe(world.folder / "recipe.toml", changed(RECIPE, **changes)).name]


def plain_tower() -> PreTrainedModel:
    return IMAGE_CLASSIFICATION.auto_class().from_config(tower("clip_vision_model", num_labels=3))


@case("student.form", f'a student of form = "depth" needs blocks, and {REASON}', 'use form = "checkpoint"')
def cut_from_swin(world: World) -> list[str]:
    return recipe(world, student={"form": "depth", "model": None})


@case("student.form", f'a student of form = "low-rank" needs blocks, and {REASON}')
def factors_of_swin(world: World) -> list[str]:
    return recipe(world, student={"form": "low-rank", "model": None, "budget": 0.5})


@case("student.layers", f"a number of layers needs blocks, and {REASON}", "leave it out")
def layers_of_a_student_of_outputs(world: World) -> list[str]:
    return recipe(world, student={"layers": 1})


@case("method.name", f"minilm looks inside both models, and {REASON}", "such as kd")
def attention_of_swin(world: World) -> list[str]:
    return recipe(world, method="minilm")


@case("method.name", f"hs looks inside both models, and {REASON}")
def hidden_states_into_swin(world: World) -> list[str]:
    put(world, plain_tower(), "tower")
    return recipe(world, method="hs", teacher={"model": "tower"})


@case("method.name", f"adkd looks inside both models, and {REASON}")
def gradients_at_embeddings_of_swin(world: World) -> list[str]:
    put(world, plain_tower(), "tower")
    return recipe(world, method="adkd", teacher={"model": "tower"})


@case("method.name", f"theseus looks inside both models, and {REASON}")
def replaced_blocks_of_swin(world: World) -> list[str]:
    return recipe(world, method="theseus")


@case("overparam.layers", f"overparam.layers needs blocks, and {REASON}", "leave it out")
def chains_in_some_blocks_of_swin(world: World) -> list[str]:
    return recipe(world, overparam={"layers": [0], "length": 1})


@case("overparam.aux_weight", "no matrix of the student has a teacher matrix of its shape", "aux_weight = 0")
def chains_without_matrices_to_compare(world: World) -> list[str]:
    put(world, plain_tower(), "tower")
    return recipe(world, teacher={"model": "tower"}, overparam={"length": 1})


@case("assistant.form", f'a student of form = "width" needs blocks, and {REASON}')
def assistant_of_swin(world: World) -> list[str]:
    return recipe(world, assistant={"hidden_size": 16})


@case("teacher.scratch.family", f"a teacher from scratch needs blocks, and {REASON}")
def swin_from_scratch(world: World) -> list[str]:
    return recipe(world, teacher={"model": None, "scratch": {"family": "swin", "image_size": 32}})


@case("teacher.device_map", f"teacher.device_map needs blocks, and {REASON}")
def swin_over_several_devices(world: World) -> list[str]:
    return recipe(world, teacher={"device_map": "auto"})


@case("depths is 3,000,000", "use at most 1,000")
def more_blocks_than_any_model_has(world: World) -> list[str]:
    arguments = recipe(world)
    change(world.folder / "teacher", depths=[3_000_000, 1])
    return arguments


@case("has no vision_config", "or its part that reads images")
def half_that_is_not_there(world: World) -> list[str]:
    arguments = recipe(world, teacher={"model": "whole"})
    whole("clip", "clip_vision_model").save_pretrained(world.folder / "whole")
    change(world.folder / "whole", vision_config=None)
    return arguments


@case("'tiny_wit' is not supported in your version of timm", "pip install -U timm")
def architecture_that_timm_has_not(world: World) -> list[str]:
    arguments = recipe(world)
    change(world.folder / "teacher", model_type="timm_wrapper", architecture="tiny_wit", architectures=None)
    return arguments


def change(folder: Path, **settings: Any) -> None:
    """Change fields of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


QUICK = {"cut_from_swin", "attention_of_swin", "gradients_at_embeddings_of_swin"}
"""One for each way in which a model is refused: the others are slower than they are different."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
