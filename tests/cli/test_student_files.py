"""What is in the folders that a run leaves: the type of the weights, and nothing of where the run took place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

RUN = Path("runs") / "recipe"


def types(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def distil(world: World, **tables: Any) -> dict:
    without = ("student",) if "form" in tables.get("student", {}) else ()
    done = world.call("distill", world.recipe(*without, **tables), "--json")
    assert done.code == 0, done.err
    return done.json


@pytest.mark.parametrize(
    "student", [{"form": "depth", "layers": 1}, {"form": "low-rank", "rank": 8}], ids=["depth", "low-rank"]
)
def test_a_student_is_kept_in_its_teachers_type(student: dict, world: World):
    world.model("half")
    record = distil(world, student=student)
    folder = world.folder / RUN / "student"
    assert types(folder) == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for side, place in (("teacher", world.folder / "teacher"), ("student", folder)):
        weights = sum(tensor.numel() for tensor in load_file(place / "model.safetensors").values())
        assert record[side]["megabytes"] == round(2 * weights / 1e6, 3)
        size = (place / "model.safetensors").stat().st_size
        assert 0 < size - 1e6 * record[side]["megabytes"] < 10_000
    # What was scored is what was kept.
    again = world.call("eval", "--json")
    assert again.json["metrics"] == record["student"]["metrics"]


def test_the_recipe_may_want_another_type(world: World):
    world.model("half")
    record = distil(world, student={"dtype": "float32"})
    assert types(world.folder / RUN / "student") == {torch.float32}
    assert record["student"]["megabytes"] > record["teacher"]["megabytes"]


def test_a_type_for_a_full_teacher_and_over_parameterised(world: World):
    world.model()
    distil(world, student={"dtype": "float16"}, overparam={"length": 1})
    folder = world.folder / RUN / "student"
    assert types(folder) == {torch.float16}
    assert AutoModelForSequenceClassification.from_pretrained(folder).dtype == torch.float16


def test_chains_are_kept_in_full_and_a_contracted_model_as_it_is(world: World):
    world.model("half")
    assert world.call("overparam", "./teacher", "--out", "wide", "--length", "1").code == 0
    assert types(world.folder / "wide") == {torch.float32}
    assert world.call("contract", "wide", "--out", "plain").code == 0
    assert types(world.folder / "plain") == {torch.float32}
    # Nothing to contract: the file is what it was.
    assert world.call("contract", "./teacher", "--out", "same").code == 0
    assert types(world.folder / "same") == {torch.bfloat16}


def test_an_unknown_type_is_refused(world: World):
    world.model()
    done = world.call("distill", world.recipe(student={"dtype": "int8"}))
    assert done.code == 2 and "student.dtype" in done.err and "bfloat16" in done.err


@pytest.mark.slow
def test_the_same_run_gives_the_same_files_whether_its_teacher_came_from_the_cache(world: World):
    world.model("headless")
    tables = {
        "teacher": {"finetune": {"max_steps": 1}},
        "export": {"onnx": True, "runs": 1, "batch_sizes": [1], "sequence_lengths": [8]},
    }
    found = []
    for place in ("first", "second"):
        done = world.call("distill", world.recipe(**tables), "--output", place, "--json")
        assert done.code == 0, done.err
        assert ("fine-tuned before" in done.err) == (place == "second")
        run = world.folder / place / "recipe"
        files = [path for name in ("student", "onnx") for path in sorted((run / name).rglob("*")) if path.is_file()]
        assert len(files) >= 8
        found.append({str(path.relative_to(run)): path.read_bytes() for path in files})
        for path in files:
            if path.suffix == ".json":
                text = path.read_text()
                assert not any(word in text for word in (str(world.folder), "local_files_only", "truncation_strategy"))
    assert sorted(found[0]) == sorted(found[1])
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
