"""Runs whose chains stand in place of selected matrices only."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import FOLDER, run_recipe, tiny_recipe, write_recipe
from training.stages import Killed, kill_after

from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.distill.run import run_distill
from kdcli.errors import InputError
from kdcli.models.overparam import overparameterise
from kdcli.models.save import save_model
from kdcli.recipe.schema import OverparamSection
from kdcli.training.growing import GrowingChains

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


DYNAMIC = {"length": 1, "select": "dynamic", "matrices": 4, "select_count": 1}


@pytest.mark.parametrize(
    ("changes", "where", "hint"),
    [
        # Two turns at most in two steps.
        ({"overparam": {"select_every": 50}}, "matrices", "use up to 2, or set select_count to 2 or more"),
        ({"overparam": {}}, "matrices", "use up to 2, or set select_count to 2 or more"),
        ({"overparam": {"select_every": 4}, "train": {"max_steps": 12}}, "select_every", "use up to 3, "),
        # In two stages of five steps each two turns of two steps fit, but only one of three.
        (
            {"overparam": {"select_every": 3}, "train": {"max_steps": 10}, "method": {"name": "tinybert"}},
            "select_every",
            "use up to 2, ",
        ),
        # Without dynamic there are no turns.
        ({"overparam": {"select": "static", "select_every": 1}}, "select_every", "leave select_every out"),
        ({"overparam": {"select": "all", "matrices": None}}, "select_count", "leave select_count out"),
    ],
)
def test_turns_that_do_not_come_are_refused_before_the_run(
    tmp_path: Path, changes: dict[str, Any], where: str, hint: str
):
    section = {key: value for key, value in {**DYNAMIC, **changes["overparam"]}.items() if value is not None}
    path = recipe(tmp_path, **{**changes, "overparam": section})
    with pytest.raises(InputError) as caught:
        prepare(load_recipe(path, []), path)
    assert caught.value.where == f"overparam.{where}" and hint in (caught.value.hint or "")


def test_steps_between_choices_that_just_fit_are_accepted(tmp_path: Path):
    for number, (every, steps, method) in enumerate([(3, 12, "kd"), (2, 10, "tinybert"), (None, 4, "kd")]):
        section = {**DYNAMIC, **({"select_every": every} if every else {})}
        (folder := tmp_path / str(number)).mkdir()
        path = recipe(folder, overparam=section, train={"max_steps": steps}, method={"name": method})
        prepare(load_recipe(path, []), path)


def test_a_stage_chooses_in_time_what_the_stages_before_left_over():
    """Of five chains one step makes one; the others have the first third of the second stage."""
    section = OverparamSection(select="dynamic", matrices=5, select_count=1)
    student, console = tiny("bert", layers=2), Console(quiet=True)
    assert GrowingChains(student, section, steps=1, console=console).every == 1
    overparameterise(student, section, [(1, "query")])
    assert GrowingChains(student, section, steps=24, console=console).every == 2


def test_chains_that_the_kept_weights_lack_are_told(tmp_path: Path):
    """The best checkpoint is of a step before the last choice."""
    section = {"length": 1, "select": "dynamic", "matrices": 4, "select_count": 2, "select_every": 2}
    output = io.StringIO()
    train = {"max_steps": 4, "eval_every": 2, "learning_rate": 1e-12, "select": "best"}
    console = Console(file=output, width=200)
    document = run_recipe(recipe(tmp_path, overparam=section, train=train), console=console)
    assert len(set(chained(document))) == 2
    assert "2 of 4 matrices had become chains in the weights that are kept" in output.getvalue()


@pytest.mark.parametrize(("form", "pairs"), [("first", [(1, 1)]), ("last", [(1, 2)])])
def test_chains_of_a_student_of_decisions_are_compared_with_the_base_model(
    tmp_path: Path, form: str, pairs: list[tuple[int, int]]
):
    """They start as its tensors, so the auxiliary loss starts at zero; those of the fine-tuned teacher are others."""
    student = {"layers": 1, "select": form}
    train = {"max_steps": 1, "learning_rate": 1e-12, "log_every": 1}
    path = recipe(tmp_path, method={"name": "dbkd", "copies": 2}, overparam={"length": 1}, student=student, train=train)
    assert prepare(load_recipe(path, []), path).followers[-1].tensor_pairs == pairs
    document = run_recipe(path)
    [logged, *_] = [entry for entry in document["training"][0]["history"] if "tensor" in entry]
    assert logged["tensor"] < 1e-10


def test_without_a_base_model_there_is_nothing_to_compare_chains_of_decisions_with(tmp_path: Path):
    save_model(tiny("bert", layers=2), tmp_path / "teacher", tokenizer())
    changes = {"method": {"name": "dbkd"}, "teacher": FOLDER, "student": {"form": "checkpoint", "model": "teacher"}}
    path = write_recipe(tmp_path / "recipe.toml", tiny_recipe("teacher", "student", overparam={"length": 1}, **changes))
    with pytest.raises(InputError, match="nothing of the fine-tuned teacher but its labels") as caught:
        prepare(load_recipe(path, []), path)
    assert caught.value.where == "overparam.aux_weight"
    prepare(load_recipe(path, ["overparam.aux_weight=0"]), path)
