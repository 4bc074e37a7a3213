"""Runs whose chains stand in place of selected matrices only."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
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
