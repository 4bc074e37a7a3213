"""Wrong input about pixels: image processors, augmentations, students that read other images."""

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World
from families import tokenizer
from image_rows import put_images, put_model
from tiny_recipes import changed, write_recipe

CASES = Cases()
case = CASES.add


def recipe(world: World, *without: str, processor: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    document = put_images(world.folder, **(processor or {}))
    return ["distill", write_recipe(world.folder / "recipe.toml", changed(document, *without, **changes)).name]


def settings(world: World, **changes: Any) -> list[str]:
    """Return arguments of a recipe whose image processor was changed by hand."""
    arguments = recipe(world)
    path = world.folder / "teacher" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return arguments


@case("teacher has no preprocessor_config.json", "teacher.tokenizer")
def pixels_without_a_processor(world: World) -> list[str]:
    arguments = recipe(world)
    (world.folder / "teacher" / "preprocessor_config.json").unlink()
    return arguments


@case("the image processor of", "cannot be loaded")
def pixels_broken_processor(world: World) -> list[str]:
    arguments = recipe(world)
    (world.folder / "teacher" / "preprocessor_config.json").write_text('{"size": ')
    return arguments


@case("the image processor of", "image_processor_type is 'WordProcessor'", "such as ViTImageProcessor")
def pixels_unknown_processor(world: World) -> list[str]:
    return settings(world, image_processor_type="WordProcessor")


@case("images of 32 x 32 pixels, and the model reads 16 x 16 pixels", "set size")
def pixels_of_another_size(world: World) -> list[str]:
    return settings(world, size={"height": 32, "width": 32})


@case("images of several sizes", "do_center_crop")
def pixels_of_several_sizes(world: World) -> list[str]:
    return settings(world, size={"shortest_edge": 16})


@case("gives 1 channel", "the model reads 3 channels", "image_mean")
def pixels_of_one_channel(world: World) -> list[str]:
    return settings(world, image_mean=[0.5], image_std=[0.5])


@case("cannot be used")
def pixels_std_of_other_channels(world: World) -> list[str]:
    return settings(world, image_std=[0.5, 0.5])


@case("no finite numbers", "image_std")
def pixels_std_of_zero(world: World) -> list[str]:
    return settings(world, image_std=[0.5, 0.0, 0.5])


@case("this is a tokenizer", "reads by an image processor")
def pixels_by_a_tokenizer(world: World) -> list[str]:
    tokenizer().save_pretrained(world.folder / "words")
    return recipe(world, teacher={"tokenizer": "words"})


@case("max_length", "tokens of text")
def pixels_with_max_length(world: World) -> list[str]:
    return recipe(world, task={"max_length": 64})


@case("crop and random_resized_crop", "give one")
def pixels_cropped_twice(world: World) -> list[str]:
    return recipe(world, task={"crop": 2, "random_resized_crop": [0.5, 1.0]})


@case("random_resized_crop", "the least share comes first")
def pixels_shares_the_wrong_way_round(world: World) -> list[str]:
    return recipe(world, task={"random_resized_crop": [1.0, 0.5]})


@case("task.mixup", "above 0")
def pixels_mixed_by_nothing(world: World) -> list[str]:
    return recipe(world, task={"mixup": 0.0})


@case("rand_augment")
def pixels_unknown_option_of_rand_augment(world: World) -> list[str]:
    return recipe(world, task={"rand_augment": {"ops": 2}})


@case("flip")
def pixels_flip_of_a_text_task(world: World) -> list[str]:
    return ["distill", world.recipe(teacher={"model": str(world.model())}, task={"flip": True})]


@case("states cannot be kept", "drawn again in every epoch", "teacher.cache = false, or leave it out")
def pixels_states_of_changing_images(world: World) -> list[str]:
    return recipe(world, task={"mixup": 0.2}, teacher={"cache": "all"})


@case("change from epoch to epoch", "[task]")
def pixels_decisions_on_changing_images(world: World) -> list[str]:
    return recipe(
        world, "student", method={"name": "dbkd"}, task={"flip": True}, teacher={"finetune": {"max_steps": 1}}
    )


@case("the student reads images of 8 x 8 pixels, the teacher of 16 x 16", "student.model")
def pixels_student_of_another_size(world: World) -> list[str]:
    arguments = recipe(world, "student", student={"form": "checkpoint", "model": "start"})
    put_model(world.folder / "start", model={"image_size": 8}, size={"height": 8, "width": 8})
    return arguments


@case("the student reads images of 1 channels, the teacher of 3", "student.model")
def pixels_student_of_another_channel_count(world: World) -> list[str]:
    arguments = recipe(world, "student", student={"form": "checkpoint", "model": "start"})
    put_model(world.folder / "start", model={"num_channels": 1}, image_mean=[0.5], image_std=[0.5])
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_wrong_pixels_are_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
