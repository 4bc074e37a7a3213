"""Two processes with half of each batch give what one process with the whole batch gives."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import FOLDER, changed, tiny_recipe, write_recipe
from torch import Tensor
from training import stages
from training.stages import TWO_PROCESSES

from kdcli.data.reviews import LABELS

TRAIN = {"max_steps": 8, "batch_size": 16, "eval_every": 4}
RECIPE = tiny_recipe("teacher", task={"train_samples": 200, "validation_samples": 64}, teacher=FOLDER, train=TRAIN)
MAKD = changed(RECIPE, "student", method="makd", student={"budget": 0.5}, overparam={"length": 1})
BY_LENGTH = changed(MAKD, overparam={"learning_rate": "by-length"})
# Its first stage leaves the head out; in the second every parameter is used.
TINYBERT = changed(RECIPE, method="tinybert")
# Which blocks are used, and so which parameters, is drawn in every step.
THESEUS = changed(RECIPE, method="theseus")
KD = changed(RECIPE, method={"name": "kd", "alpha": 1.0})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stages.folder_with_recipe(tmp_path, MAKD)


def distill(folder: Path, name: str, *launcher: str, extra: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return stages.distill(folder, name, *launcher, extra=extra)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [MAKD, BY_LENGTH, TINYBERT, THESEUS], ids=["makd", "by-length", "tinybert", "theseus"]
)
def test_without_dropout_two_processes_agree_with_one(folder: Path, method: dict[str, Any]):
    write_recipe(folder / "recipe.toml", method)
    one = distill(folder, "one")
    two = distill(folder, "two", *TWO_PROCESSES)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_with_dropout_every_process_draws_its_own_and_the_same_in_every_run(tmp_path: Path):
    own = {"name": "own", "data": "rows.csv", "text": "text"}
    folder = stages.folder_with_recipe(tmp_path, changed(KD, task=own), dropout=0.3)
    rows = "\n".join(f"a fine and moving film,{LABELS[number % 2]}" for number in range(40))
    (folder / "rows.csv").write_text(f"text,label\n{rows}\n")
    # All rows are equal, and the teacher alone is followed. So were two processes to draw the same dropout, they would
    # do the same twice: what one of them does with half of the examples.
    steps = ("--set", "train.max_steps=2")
    one = distill(folder, "one", extra=("--set", "train.batch_size=8", *steps))
    two, again = (distill(folder, name, *TWO_PROCESSES, extra=steps) for name in ("two", "again"))
    assert max(float((two[key] - one[key]).abs().max()) for key in one) > 1e-4
    assert all(torch.equal(two[key], again[key]) for key in two)


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_to_the_same_student(tmp_path: Path):
    folder = stages.folder_with_recipe(tmp_path, KD, dropout=0.3)
    options = ("--set", "train.keep_checkpoints=true")
    whole = distill(folder, "two", *TWO_PROCESSES, extra=options)
    run = folder / "runs" / "two"
    [last] = run.glob("checkpoints/*/checkpoint-8")
    assert (last / "rng_state_1.pth").is_file()
    # As a process leaves it that was killed after its first checkpoint.
    for path in (last, last.parent / "final", run / "student"):
        shutil.rmtree(path)
    record = json.loads((run / "run.json").read_text())
    del record["checksum"]
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resumed = distill(folder, "two", *TWO_PROCESSES, extra=(*options, "--resume"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_accumulated_batches_agree_with_whole_ones(folder: Path):
    one = distill(folder, "one")
    parts = distill(folder, "parts", extra=("--set", "train.gradient_accumulation=4"))
    for key in one:
        torch.testing.assert_close(parts[key], one[key], atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


def test_a_batch_that_cannot_be_split_is_refused(folder: Path):
    command = [sys.executable, "-m", "kdcli", "distill", "recipe.toml", "--set", "train.gradient_accumulation=3"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "gradient_accumulation" in result.stderr or "accumulation" in result.stderr
    assert not (folder / "runs").exists()
