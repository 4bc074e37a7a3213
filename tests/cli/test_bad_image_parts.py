"""What belongs to texts alone, asked of images."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input import Cases
from conftest import World
from families import tiny
from image_rows import encoded, pictures
from tiny_recipes import changed, write_recipe
from transformers import ViTImageProcessor

from kdcli.models.save import save_model

CASES = Cases()
case = CASES.add

NAMES = ("cat", "dog", "elk")
RECIPE: dict[str, Any] = {
    "method": "kd",
    "task": {"name": "own", "type": "image-classification", "data": "images.parquet"},
    "teacher": {"model": "vit"},
    "student": {"form": "depth", "layers": 1},
    "train": {"max_steps": 1, "precision": "fp32"},
}


def images(world: World) -> str:
    """Put a model of images and rows of three classes there, and return the name of the file of rows."""
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    (world.folder / "vit").mkdir()
    save_model(
        tiny("vit", labels=3, **names), world.folder / "vit", ViTImageProcessor(size={"height": 16, "width": 16})
    )
    column = pa.array([{"bytes": encoded(image), "path": None} for image in pictures(12)])
    pq.write_table(pa.table({"image": column, "label": [*NAMES] * 4}), world.folder / "images.parquet")
    return "images.parquet"


def distill(world: World, **changes: Any) -> list[str]:
    images(world)
    return ["distill", write_recipe(world.folder / "recipe.toml", changed(RECIPE, **changes)).name]


@case("task: augment needs texts that keep their answers where words change", "image-classification")
def copies_of_images_with_other_words(world: World) -> list[str]:
    return distill(world, task={"augment": {"model": "filler"}})


@case("student.vocabulary: the teacher reads images, and has no vocabulary", "leave it out")
def a_vocabulary_to_trim(world: World) -> list[str]:
    return distill(world, student={"vocabulary": {}})


@case("MODEL: vit reads images, and has no vocabulary")
def a_model_of_images_to_trim(world: World) -> list[str]:
    images(world)
    return ["trim", "vit", "--text", "nowhere.txt", "--out", "made"]


@case("teacher.top_k:", "an image-classification task predicts no tokens", "leave it out")
def the_most_probable_tokens(world: World) -> list[str]:
    return distill(world, teacher={"top_k": 5})


@case("student.embedding_rank: a model that reads images has no word embeddings", "leave it out")
def factors_of_word_embeddings(world: World) -> list[str]:
    return distill(world, student={"form": "low-rank", "layers": None, "rank": 4, "embedding_rank": 4})


@case("student.params: ", "parameters are not enough", "hint: allow more")
def fewer_parameters_than_stay(world: World) -> list[str]:
    return distill(world, student={"form": "low-rank", "layers": None, "params": "100"})


@case('task.max_prompt_length: type = "image-classification" has no max_prompt_length', 'type = "instruct" has it')
def a_prompt_of_images(world: World) -> list[str]:
    return distill(world, task={"max_prompt_length": 8})


@case('task.mask_probability: type = "image-classification" has no mask_probability', 'type = "text" has it')
def masked_images(world: World) -> list[str]:
    return distill(world, task={"mask_probability": 0.1})


@case("task.metrics: 'top5_accuracy' cannot be the metric of an image-classification task", "known are accuracy, f1")
def the_best_five_of_three_classes(world: World) -> list[str]:
    return distill(world, task={"metrics": ["accuracy", "top5_accuracy"]})


@case("od works on causal-lm, instruct and text tasks: it needs predictions over a vocabulary", "use kd, makd, hs")
def a_method_of_tokens(world: World) -> list[str]:
    return distill(world, method="od")


@case("embedding works on sentence-embedding tasks: it needs embeddings of texts")
def a_method_of_embeddings(world: World) -> list[str]:
    return distill(world, method="embedding")


@case("method.synonyms: synonyms has no effect on images, whose noise is on pixels", "leave it out")
def neighbours_of_images(world: World) -> list[str]:
    return distill(world, method={"name": "dbkd", "synonyms": True, "black_box": {"command": ["true"]}})


@case("method.name: logits are estimated for training examples as they are", "leave out what changes them")
def decisions_on_images_that_change(world: World) -> list[str]:
    return distill(world, task={"flip": True}, method={"name": "dbkd", "black_box": {"command": ["true"]}})


@case("--max-length: counts tokens of text, and vit reads images", "leave it out")
def the_length_of_an_image(world: World) -> list[str]:
    return ["eval", "vit", "--data", images(world), "--max-length", "16"]


@case("vit", "a classifier of images", "classifying texts")
def a_task_of_texts(world: World) -> list[str]:
    images(world)
    return ["eval", "vit", "--task", "reviews"]


@pytest.mark.parametrize("name", CASES)
def test_what_images_lack_is_told(name: str, world: World, own_cache: Any):
    CASES.check(name, world, own_cache)
