"""The weights of a fixed teacher in memory: halved where nothing is lost by it, and whole ones for its student."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import FOLDER, changed, run_recipe, tiny_recipe, write_recipe
from training import stages

from kdcli.distill.prepare import Prepared, prepare
from kdcli.distill.recipe import load_recipe
from kdcli.models.load import load_model, load_tokenizer
from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.tasks.classification import KIND

KD = tiny_recipe("teacher", teacher=FOLDER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, and `half`, the same in a file of bf16."""
    folder = stages.folder_with_recipe(tmp_path_factory.mktemp("weights"), KD)
    model = load_model(folder / "teacher", KIND.head)
    model.config.dtype = torch.bfloat16
    (folder / "half").mkdir()
    save_model(model, folder / "half", load_tokenizer(folder / "teacher"))
    return folder


def prepared(folder: Path, **changes: Any) -> Prepared:
    path = write_recipe(folder / "recipe.toml", changed(KD, **changes))
    return prepare(load_recipe(path, []), path)


@pytest.mark.parametrize(
    ("teacher", "precision", "dtype", "expected"),
    [
        ("half", "bf16", "auto", torch.bfloat16),
        ("half", "fp32", "auto", torch.float32),
        ("teacher", "bf16", "auto", torch.float32),
        ("teacher", "fp32", "bf16", torch.bfloat16),
        ("half", "bf16", "fp32", torch.float32),
    ],
)
def test_weights_are_halved_where_the_file_and_the_computation_are(
    folder: Path, teacher: str, precision: str, dtype: str, expected: torch.dtype
):
    start = prepared(folder, teacher={"model": teacher, "dtype": dtype}, train={"precision": precision}).teacher
    assert {parameter.dtype for parameter in start.model.parameters()} == {expected}


@pytest.mark.parametrize(
    "student", [{"form": "depth", "layers": 1}, {"form": "low-rank", "rank": 4}], ids=["depth", "low-rank"]
)
def test_a_student_of_halved_weights_starts_as_one_of_whole_ones(folder: Path, student: dict[str, Any]):
    halved = prepared(folder, student={"layers": None, **student}, teacher={"model": "half", "dtype": "bf16"})
    whole = load_model(folder / "half", KIND.head)
    [follower] = halved.followers
    own, other = (build_student(model, follower.section, seed=1).model for model in (halved.teacher.model, whole))
    for (name, one), two in zip(own.named_parameters(), other.parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two), name


RUNS: dict[str, dict[str, Any]] = {
    "kd": {},
    "inside": {"method": {"name": "hs"}},
    "activations": {"method": {"name": "makd"}, "student": {"form": "low-rank", "layers": None, "init": "activations"}},
    "gradients": {"method": {"name": "makd"}, "student": {"form": "low-rank", "layers": None, "init": "gradients"}},
    "chains": {"overparam": {"length": 1}},
    "width": {"student": {"form": "width", "layers": None, "hidden_size": 16, "init": "projections"}},
    "kept": {"method": {"name": "hs"}, "teacher": {"cache": "all"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_teacher_of_halved_weights_teaches(folder: Path, name: str):
    changes = {**RUNS[name], "teacher": {"model": "half", "dtype": "bf16", **RUNS[name].get("teacher", {})}}
    path = write_recipe(folder / f"{name}.toml", changed(KD, **changes))
    halved = run_recipe(path)
    whole = run_recipe(path, f"name={name}-whole", "teacher.dtype=fp32")
    [one], [two] = halved["training"][-1:], whole["training"][-1:]
    losses = [next(e["loss"] for e in record["history"] if "loss" in e) for record in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_one_device_has_all_of_a_teacher_that_may_be_spread(folder: Path):
    path = write_recipe(folder / "spread.toml", changed(KD, teacher={"device_map": "auto"}))
    run_recipe(path)
    run_recipe(path, "name=plain", 'teacher.device_map={cpu="1GB"}')
