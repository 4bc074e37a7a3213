"""Runs on a task of parts: a small set of one's own beside a known one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import FOLDER, run_recipe, tiny_recipe
from training import stages
from training.stages import TWO_PROCESSES, Killed, kill_after

from kdcli.cli.app import run
from kdcli.data.reviews import LABELS

TASK: dict[str, Any] = {
    "name": "films",
    "type": "classification",
    "text": "text",
    "train_samples": 240,
    "validation_samples": 12,
    "mixing_temperature": 3.0,
    "part": [{"name": "own", "data": "rows.csv"}, {"name": "reviews"}],
}
RECIPE = tiny_recipe("teacher", task=TASK, teacher=FOLDER, train={"max_steps": 10, "batch_size": 16, "eval_every": 5})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = stages.folder_with_recipe(tmp_path, RECIPE)
    rows = "\n".join(f"a fine and moving film number {number},{LABELS[number % 2]}" for number in range(300))
    (folder / "rows.csv").write_text(f"text,label\n{rows}\n")
    return folder / "recipe.toml"


def test_scores_of_parts_and_their_mean_are_told_everywhere(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["distill", "recipe.toml", "--set", "train.max_steps=2"]) == 0
    table = capsys.readouterr().out
    document = json.loads((recipe.parent / "runs/recipe/run.json").read_text())
    student = document["student"]
    assert list(student["metrics"]) == ["own", "reviews"]
    mean = np.mean([scores["accuracy"] for scores in student["metrics"].values()])
    assert student["score"] == student["mean"]["accuracy"] == pytest.approx(mean)
    for name in ("own, 12 examples", "reviews, 12 examples", "mean of 2 sets"):
        assert f"accuracy ({name})" in table
        assert f"accuracy ({name})" in (recipe.parent / "runs/recipe/student/README.md").read_text()
    best = max(entry.get("eval_accuracy", 0) for entry in document["training"][0]["history"])
    # The same rows choose the checkpoint here.
    assert best == pytest.approx(mean)
    assert run(["eval", "--json", "--fail-under", f"{mean + 0.01}"]) == 1
    scored = json.loads(capsys.readouterr().out)
    assert scored["metrics"] == student["metrics"] and scored["mean"] == student["mean"]
    assert scored["score"] == pytest.approx(mean)
    assert run(["eval", "--fail-under", f"{mean - 0.01}"]) == 0
    assert "accuracy (mean of 2 sets)" in capsys.readouterr().out


def test_the_plan_tells_the_share_of_each_part(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(recipe.parent)
    changes = ("--set", "train.epochs=3", "--set", "train.max_steps=", "--set", "task.train_samples=640")
    assert run(["distill", "recipe.toml", "--dry-run", "--json", *changes]) == 0
    plan = json.loads(capsys.readouterr().out)
    own, reviews = plan["task"]["parts"]
    total = own["examples"] + reviews["examples"]
    assert (own["name"], reviews["name"], total) == ("own", "reviews", 640)
    weights = np.array([own["examples"], reviews["examples"]]) ** (1 / 3)
    assert [own["share"], reviews["share"]] == pytest.approx(list(weights / weights.sum()))
    # As many steps as without a mixture.
    assert plan["stages"][0]["steps"] == 3 * 640 // 16


def test_a_stopped_run_of_a_mixture_goes_on_and_ends_the_same(recipe: Path):
    whole = run_recipe(recipe, "name=whole", "train.max_steps=20")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 10, "checkpoints/1-")
        run_recipe(recipe, "name=parts", "train.max_steps=20")
    resumed = run_recipe(recipe, "name=parts", "train.max_steps=20", resume=True)
    assert resumed["hashes"]["student"] == whole["hashes"]["student"]
    other = run_recipe(recipe, "name=other", "train.max_steps=20", "task.mixing_temperature=1.0")
    assert other["hashes"]["student"] != whole["hashes"]["student"]


@pytest.mark.parametrize(("method", "kept"), [("kd", "true"), ("hs", '"all"')])
def test_what_is_kept_of_the_teacher_is_that_of_the_rows_that_are_drawn(method: str, kept: str, recipe: Path):
    students = []
    for name, cache in {"kept": kept, "fresh": "false"}.items():
        done = run_recipe(recipe, f"name={name}", f"method={method}", f"teacher.cache={cache}", "train.max_steps=6")
        students.append(load_file(Path(done["paths"]["student"]) / "model.safetensors"))
    for key, tensor in students[0].items():
        torch.testing.assert_close(tensor, students[1][key], atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_agree_with_one_on_a_mixture(recipe: Path):
    one = stages.distill(recipe.parent, "one")[1]
    two = stages.distill(recipe.parent, "two", *TWO_PROCESSES)[1]
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-3)
