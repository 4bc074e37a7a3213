"""Runs whose chains stand in place of selected matrices only."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from training.stages import Killed, kill_after

from kdcli.distill.recipe import load_recipe
from kdcli.distill.run import run_distill
from kdcli.errors import InputError

STATIC = {"length": 1, "select": "static", "matrices": 3}


def recipe(folder: Path, **changes: Any) -> Path:
    return write_recipe(folder / "recipe.toml", tiny_recipe(**{"overparam": STATIC, **changes}))


def chained(document: dict[str, Any]) -> list[tuple[int, str]]:
    return [(row["block"], row["matrix"]) for row in document["overparam"]["matrices"]]


def test_a_run_puts_chains_in_place_of_as_many_matrices_as_asked_for(tmp_path: Path):
    document = run_recipe(recipe(tmp_path))
    assert len(set(chained(document))) == 3 and {layer for layer, _ in chained(document)} == {1}
    assert len(document["contraction"]["matrices"]) == 3


def test_a_resumed_run_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = recipe(tmp_path, train={"max_steps": 4, "eval_every": 2, "keep_checkpoints": True})
    whole = run_recipe(path, "name=whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, "parts")
        run_recipe(path, "name=parts")
    [kept] = (tmp_path / "runs" / "parts").rglob("matrices.json")
    assert [tuple(key) for key in json.loads(kept.read_text())] == chained(whole)
    # Measured again it might differ, on another machine: what it says is what counts.
    chosen = [[1, "query"], [1, "key"], [1, "value"]]
    assert sorted(map(tuple, chosen)) != sorted(chained(whole))
    kept.write_text(json.dumps(chosen))
    for checkpoint in kept.parent.glob("*/checkpoint-*"):
        shutil.rmtree(checkpoint)
    document = run_recipe(path, "name=parts", resume=True)
    assert [list(key) for key in chained(document)] == chosen


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"select": "static"}, "needs a number of matrices"),
        ({"matrices": 3}, "nothing selects them"),
        ({"select": "static", "matrices": 7}, "6 of the student"),
    ],
)
def test_a_number_that_selects_nothing_is_refused_before_the_run(tmp_path: Path, section: dict[str, Any], message: str):
    path = recipe(tmp_path, overparam={"length": 1, **section})
    with pytest.raises(InputError, match=message) as caught:
        run_distill(load_recipe(path, []), recipe_path=path, output=tmp_path / "runs", console=Console(quiet=True))
    assert caught.value.where == "overparam.matrices"


def test_matrices_that_become_chains_in_training_are_in_the_record_of_the_run(tmp_path: Path):
    section = {"length": 1, "select": "dynamic", "matrices": 3, "select_count": 2, "select_every": 1}
    document = run_recipe(recipe(tmp_path, overparam=section, train={"max_steps": 4}))
    assert len(set(chained(document))) == len(document["contraction"]["matrices"]) == 3
    assert document["overparam"]["parameters_after"] > document["overparam"]["parameters_before"]
    assert document["contraction"]["max_abs_difference"] < 1e-4


def test_a_second_stage_goes_on_with_the_chains_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    section = {"length": 1, "select": "dynamic", "matrices": 4, "select_count": 1, "select_every": 3}
    train = {"max_steps": 12, "eval_every": 2, "keep_checkpoints": True, "select": "last"}
    path = recipe(tmp_path, overparam=section, train=train, method={"name": "tinybert"})
    whole = run_recipe(path, "name=whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, "2-prediction")
        run_recipe(path, "name=parts")
    document = run_recipe(path, "name=parts", resume=True)
    assert len(chained(whole)) == 4 and chained(document) == chained(whole)
    folders = [tmp_path / "runs" / name / "student" / "model.safetensors" for name in ("whole", "parts")]
    weights = [load_file(folder) for folder in folders]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "lgtm"}}, "remembers the student's parameters"),
        ({"teacher": {"scratch": {"family": "modernbert"}}}, "several of them in one"),
    ],
)
def test_where_matrices_cannot_change_in_training_they_are_not_chosen_there(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    path = recipe(tmp_path, overparam={"select": "dynamic", "matrices": 2}, **changes)
    with pytest.raises(InputError, match=message) as caught:
        run_recipe(path)
    assert caught.value.where == "overparam.select"
