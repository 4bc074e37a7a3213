"""DBKD on images: whole runs with a black box, with a model here, with recorded decisions; and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import tiny
from PIL import Image
from tiny_recipes import run_recipe, write_recipe
from transformers import ViTImageProcessor

from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.save import save_model

BOX = """\
from pathlib import Path


def by_colour(images):
    with Path(__file__).with_name("asked.txt").open("a") as file:
        file.write(f"{len(images)}\\n")
    return [max(range(3), key=lambda band: sum(image.getchannel(band).getdata())) for image in images]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images of three colours, a black box that knows them, and a small model of images."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(30):
        pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., number % 3] += 20
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % 3})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "colours.py").write_text(BOX)
    (tmp_path / "start").mkdir()
    save_model(tiny("vit", labels=3), tmp_path / "start", ViTImageProcessor(size={"height": 16, "width": 16}))
    return tmp_path


def recipe(folder: Path, *, task: dict[str, Any] | None = None, teacher: Any = None, **method: Any) -> Path:
    document = {
        "task": {"name": "colours", "type": "image-classification", "data": "rows.parquet", **(task or {})},
        "method": {"name": "dbkd", **method},
        "teacher": teacher or {"black_box": True},
        "student": {"form": "checkpoint", "model": "start"},
        "train": {"max_steps": 2, "batch_size": 8, "precision": "fp32", "device": "cpu"},
    }
    return write_recipe(folder / "recipe.toml", document)


def asked(folder: Path) -> int:
    return sum(map(int, (folder / "asked.txt").read_text().split()))


def test_a_black_box_teaches_images_and_is_asked_once(folder: Path, own_cache: Path):
    path = recipe(folder, copies=3, ratio=0.02, black_box={"callable": "colours:by_colour", "queries_per_call": 10})
    record = run_recipe(path)
    assert record["status"] == "done" and record["teacher"] is None
    assert asked(folder) == 3 * record["task"]["sizes"]["train"] == 81
    [kept] = (own_cache / "decisions").iterdir()
    decisions = [json.loads(line)["decisions"] for line in kept.read_text().splitlines() if line]
    # Little noise: the colour of an image stays that of its copies.
    assert sum(len(set(each)) == 1 for each in decisions) >= 25
    run_recipe(path, "seed=1", "method.copies=4", force=True)
    assert asked(folder) == 81 + 27


@pytest.mark.slow
def test_a_model_here_and_its_recorded_decisions_teach_the_same(folder: Path, own_cache: Path):
    teacher = {"model": "start"}
    path = recipe(folder, teacher=teacher, copies=4)
    first = run_recipe(path)
    [kept] = (own_cache / "decisions").iterdir()
    lines = [json.loads(line) for line in kept.read_text().splitlines() if line]
    table = [{"index": row["index"], "counts": np.bincount(row["decisions"], minlength=3).tolist()} for row in lines]
    (folder / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    again = run_recipe(recipe(folder, teacher=teacher, black_box={"decisions": "recorded.jsonl"}), force=True)
    losses = [[entry["loss"] for entry in run["training"][0]["history"] if "loss" in entry] for run in (first, again)]
    assert losses[0] == losses[1] and len(losses[0]) > 0


@pytest.mark.parametrize(
    ("task", "method", "where", "words"),
    [
        ({}, {"synonyms": True}, "method.synonyms", "has no effect on images, whose noise is on pixels"),
        ({"flip": True}, {}, "method.name", "those of this task change from epoch to epoch"),
        ({"mixup": 0.2}, {}, "method.name", "those of this task change from epoch to epoch"),
    ],
)
def test_what_has_no_place_on_images_is_refused(
    task: dict[str, Any], method: dict[str, Any], where: str, words: str, folder: Path
):
    path = recipe(folder, task=task, black_box={"callable": "colours:by_colour"}, **method)
    with pytest.raises(InputError, match=words) as caught:
        prepare(load_recipe(path), path)
    assert caught.value.where == where
    assert not (folder / "asked.txt").exists()
