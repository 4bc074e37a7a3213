"""Two processes with half of each batch give what one process with the whole batch gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from kdcli.data.reviews import LABELS, reviews
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer

RECIPE = """
METHOD

[task]
name = "reviews"
train_samples = 200
validation_samples = 64

[teacher]
model = "teacher"
finetune = false

[train]
max_steps = 8
batch_size = 16
learning_rate = 1e-3
precision = "fp32"
eval_every = 4
"""


MAKD = """
method = "makd"
student = {budget = 0.5}
overparam = {length = 1}
"""
# Its first stage leaves the head out; in the second every parameter is used.
TINYBERT = """
method = "tinybert"
student = {layers = 1}
"""
# Which blocks are used, and so which parameters, is drawn in every step.
THESEUS = """
method = "theseus"
student = {layers = 1}
"""
TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(tmp_path: Path, dropout: float = 0.0) -> Path:
    tokenizer = train_tokenizer(reviews()["train"]["text"], 300)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    (tmp_path / "teacher").mkdir()
    save_model(BertForSequenceClassification(config), tmp_path / "teacher", tokenizer)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("METHOD", MAKD))
    return tmp_path


def distill(folder: Path, name: str, *launcher: str, extra: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    command = [
        sys.executable, *launcher, "-m", "kdcli", "distill", "recipe.toml", "--json", "--set", f"name={name}", *extra,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    # PyTorch says so where it looked for parameters without a gradient and there were none.
    assert "find_unused_parameters" not in result.stderr or "theseus" in (folder / "recipe.toml").read_text()
    assert json.loads(result.stdout)["status"] == "done"
    return load_file(folder / "runs" / name / "student" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", [MAKD, TINYBERT, THESEUS], ids=["makd", "tinybert", "theseus"])
def test_without_dropout_two_processes_agree_with_one(folder: Path, method: str):
    (folder / "recipe.toml").write_text(RECIPE.replace("METHOD", method))
    one = distill(folder, "one")
    two = distill(folder, "two", *TWO)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


KD = """
method = {name = "kd", alpha = 1.0}
student = {layers = 1}
"""


@pytest.mark.slow
def test_with_dropout_every_process_draws_its_own_and_the_same_in_every_run(tmp_path: Path):
    folder = written(tmp_path, dropout=0.3)
    rows = "\n".join(f"a fine and moving film,{LABELS[number % 2]}" for number in range(40))
    (folder / "rows.csv").write_text(f"text,label\n{rows}\n")
    recipe = RECIPE.replace("METHOD", KD).replace('name = "reviews"', 'name = "own"\ndata = "rows.csv"\ntext = "text"')
    (folder / "recipe.toml").write_text(recipe)
    # All rows are equal, and the teacher alone is followed. So were two processes to draw the same dropout, they would
    # do the same twice: what one of them does with half of the examples.
    steps = ("--set", "train.max_steps=2")
    one = distill(folder, "one", extra=("--set", "train.batch_size=8", *steps))
    two, again = (distill(folder, name, *TWO, extra=steps) for name in ("two", "again"))
    assert max(float((two[key] - one[key]).abs().max()) for key in one) > 1e-4
    assert all(torch.equal(two[key], again[key]) for key in two)


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_to_the_same_student(tmp_path: Path):
    folder = written(tmp_path, dropout=0.3)
    (folder / "recipe.toml").write_text(RECIPE.replace("METHOD", KD))
    options = ("--set", "train.keep_checkpoints=true")
    whole = distill(folder, "two", *TWO, extra=options)
    run = folder / "runs" / "two"
    [last] = run.glob("checkpoints/*/checkpoint-8")
    assert (last / "rng_state_1.pth").is_file()
    # As a process leaves it that was killed after its first checkpoint.
    for path in (last, last.parent / "final", run / "student"):
        shutil.rmtree(path)
    record = json.loads((run / "run.json").read_text())
    del record["checksum"]
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    resumed = distill(folder, "two", *TWO, extra=(*options, "--resume"))
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
