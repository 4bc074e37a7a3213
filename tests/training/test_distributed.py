"""Two processes with half of each batch give what one process with the whole batch gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer
from kdcli.tasks.synthetic import LABELS, reviews

RECIPE = """
method = "makd"

[task]
name = "reviews"
train_samples = 200
validation_samples = 64

[teacher]
model = "teacher"
finetune = false

[student]
budget = 0.5

[overparam]
length = 1

[train]
max_steps = 8
batch_size = 16
learning_rate = 1e-3
precision = "fp32"
eval_every = 4
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(reviews()["train"]["text"], 300)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        # Every process draws its own dropout: equality can only be asked for without.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    (tmp_path / "teacher").mkdir()
    save_model(BertForSequenceClassification(config), tmp_path / "teacher", tokenizer)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def distill(folder: Path, name: str, *launcher: str, extra: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    command = [
        sys.executable, *launcher, "-m", "kdcli", "distill", "recipe.toml", "--json", "--set", f"name={name}", *extra,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["status"] == "done"
    return load_file(folder / "runs" / name / "student" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_agree_with_one(folder: Path):
    one = distill(folder, "one")
    two = distill(folder, "two", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


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
