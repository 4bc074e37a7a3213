"""Wrong input of `kdcli predict` and `kdcli export` on models of images."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_input import Cases
from conftest import World
from families import tiny
from PIL import Image

from kdcli.models.save import save_model
from kdcli.models.scratch import new_image_processor

CASES = Cases()
case = CASES.add


def noise(form: str = "PNG") -> bytes:
    """Return the bytes of a small image."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def ask(world: World, *arguments: str) -> list[str]:
    return ["predict", str(world.model("viewer")), *arguments]


@case("photos/a.png is no image", "known formats are")
def a_file_that_is_no_image(world: World) -> list[str]:
    world.write("photos/a.png", "no image\n")
    return ask(world, "photos/a.png")


@case("TEXT: lost.png does not exist")
def a_typed_file_that_is_missing(world: World) -> list[str]:
    return ask(world, "lost.png")


@case("b.png is truncated")
def one_of_several_files_is_cut(world: World) -> list[str]:
    world.write("a.png", noise())
    world.write("b.png", noise()[:-60])
    return ask(world, "a.png", "b.png")


@case("photos/deep/b.jpg is empty")
def an_empty_file_below_a_folder(world: World) -> list[str]:
    world.write("photos/a.jpg", noise("JPEG"))
    world.write("photos/deep/b.jpg", b"")
    return ask(world, "photos")


@case("photos has no images", ".jpg or .png")
def a_folder_of_other_files(world: World) -> list[str]:
    world.write("photos/notes.txt", "no image\n")
    return ask(world, "photos")


@case("photos has no images", ".jpg or .png")
def an_input_folder_of_other_files(world: World) -> list[str]:
    world.write("photos/notes.txt", "no image\n")
    return ask(world, "--input", "photos")


@case("downloads no images")
def an_address_of_an_image(world: World) -> list[str]:
    return ask(world, "https://example.org/cat.png")


@case("--set image", "rows.csv has no image column 'image'; it has 'file', 'label'", "name it: --set image=COLUMN")
def a_table_without_the_column_of_images(world: World) -> list[str]:
    return ask(world, "--input", world.csv("rows.csv", [("a.png", "yes")], header="file,label"))


@case("rows.csv: row 2: ", "lost.png does not exist")
def a_row_whose_file_is_missing(world: World) -> list[str]:
    world.write("a.png", noise())
    return ask(world, "--input", world.csv("rows.csv", [("a.png", "yes"), ("lost.png", "no")], header="image,label"))


@case("files/lost.png does not exist")
def a_line_whose_file_is_missing(world: World) -> list[str]:
    return ask(world, "--input", world.write("files/list.txt", "lost.png\n"))


@case("--input: ", "lost.png does not exist")
def a_piped_line_whose_file_is_missing(world: World) -> list[str]:
    world.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"lost.png\n")))
    return ask(world, "-")


@case('type = "image-classification" has no text')
def a_text_column_for_images(world: World) -> list[str]:
    world.write("a.png", noise())
    return ask(world, "--input", world.csv("rows.csv", [("a.png", "yes")], header="image,label"), "--text", "label")


@case("--max-length", "reads images")
def a_length_of_images(world: World) -> list[str]:
    world.write("a.png", noise())
    return ask(world, "a.png", "--max-length", "16")


@case("--set flip: flip has no effect")
def a_field_of_training_for_a_model_that_answers(world: World) -> list[str]:
    world.write("a.png", noise())
    return ask(world, "a.png", "--set", "flip=true")


@case("--set cache_pixels: cache_pixels has no effect")
def a_field_of_training_for_a_model_that_is_scored(world: World) -> list[str]:
    world.write("photos/yes/a.png", noise())
    return ["eval", str(world.model("viewer")), "--data", "photos", "--set", "cache_pixels=true"]


@case("--sequence-lengths", "no tokens of text")
def a_grid_of_lengths_for_images(world: World) -> list[str]:
    return ["export", str(world.model("viewer")), "--out", "served", "--sequence-lengths", "16"]


@case("--image-sizes", "reads texts")
def a_grid_of_sizes_for_texts(world: World) -> list[str]:
    return ["export", str(world.model()), "--out", "served", "--image-sizes", "16"]


@case("--image-sizes", "2 pixels are less than a patch")
def a_size_below_a_patch(world: World) -> list[str]:
    return ["export", str(world.model("viewer")), "--out", "served", "--image-sizes", "2"]


def fixed(world: World) -> Path:
    """Put a model there that reads images of one size alone."""
    path = world.folder / "fixed"
    path.mkdir()
    save_model(tiny("beit", labels=2, use_relative_position_bias=True), path, new_image_processor(16, 16))
    return path


@case("--image-sizes", "16 x 16 pixels alone, not of 32")
def another_size_for_a_fixed_one(world: World) -> list[str]:
    return ["export", str(fixed(world)), "--out", "served", "--image-sizes", "16,32"]


@case("--precision", "causal language model")
def fewer_bits_for_images(world: World) -> list[str]:
    return ["export", str(world.model("viewer")), "--out", "served", "--precision", "fp16"]


@case("export.image_sizes", "reads texts")
def a_recipe_with_sizes_for_texts(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(export={"onnx": True, "image_sizes": [32]})]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
