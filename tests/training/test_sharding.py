"""Two processes that hold half of a student each (FSDP2) give what one process with all of it gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import FOLDER, changed, run_recipe, tiny_recipe, write_recipe
from torch import Tensor
from training import stages
from training.stages import TWO_PROCESSES
from transformers import LlamaConfig, LlamaForCausalLM

from kdcli.data.reviews import reviews
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer

TRAIN = {"max_steps": 3, "batch_size": 16, "eval_every": 2, "keep_checkpoints": True, "sharding": "fsdp"}
KD = tiny_recipe("teacher", task={"train_samples": 64, "validation_samples": 24}, teacher=FOLDER, train=TRAIN)
LOW_RANK = changed(KD, "student", method="makd", student={"budget": 0.5})
TEXT = {"name": "own", "type": "causal-lm", "train": "text.txt", "validation": "held.txt", "max_length": 32}
DECODER = changed(KD, "task", task=TEXT, teacher={"model": "decoder"})
RECIPES: dict[str, dict[str, Any]] = {
    "depth": KD,
    "parts": changed(KD, train={"gradient_accumulation": 2}),
    "low-rank": LOW_RANK,
    # A step of a chain is scaled as a whole, whatever each process holds of it.
    "chains": changed(LOW_RANK, method="kd", student={"form": "low-rank"}, overparam={"length": 1, "aux_weight": 0.0}),
    # Nothing is predicted, and the last block's output is not compared.
    "inside": changed(KD, method={"name": "minilmv2"}, student={"layers": 2}),
    "checkpointed": changed(LOW_RANK, train={"gradient_checkpointing": True}),
    # Of the teacher each block is gathered while it runs, though it need not run to its end.
    "teacher": changed(KD, method={"name": "minilmv2"}, teacher={"sharding": "fsdp"}, train={"sharding": "none"}),
    # Its teacher is trained sharded, too.
    "finetuned": changed(KD, teacher={"finetune": {"max_steps": 2, "batch_size": 16}}),
    "decoder": DECODER,
    "half": changed(DECODER, train={"precision": "bf16"}),
    "both": changed(DECODER, method={"name": "hs"}, teacher={"sharding": "fsdp"}),
}


def write_decoder(folder: Path) -> None:
    """Write a tiny Llama, its tokenizer and some text."""
    texts = reviews()["train"]["text"]
    words = train_tokenizer(texts[:400], 300)
    words.eos_token = words.sep_token
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.cls_token_id,
        tie_word_embeddings=True,
    )
    (folder / "decoder").mkdir()
    save_model(LlamaForCausalLM(config), folder / "decoder", words)
    (folder / "text.txt").write_text("\n\n".join(texts[:150]))
    (folder / "held.txt").write_text("\n\n".join(texts[150:170]))


def weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / "runs" / name / "student" / "model.safetensors")


def without_the_last_checkpoint(folder: Path, name: str) -> None:
    """Leave a run as a process that was killed before its last step leaves it."""
    run = folder / "runs" / name
    [last] = run.glob("checkpoints/*/checkpoint-3")
    for path in (last, last.parent / "final", run / "student"):
        shutil.rmtree(path)
    record = json.loads((run / "run.json").read_text())
    del record["checksum"]
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every recipe, run by two processes as `two-NAME`."""
    folder = stages.folder_with_recipe(tmp_path_factory.mktemp("sharded"), KD)
    write_decoder(folder)
    runs = []
    for name, recipe in RECIPES.items():
        path = write_recipe(folder / f"{name}.toml", recipe)
        runs.append([str(path), [f"name=two-{name}"]])
    (folder / "runs.json").write_text(json.dumps(runs))
    worker = Path(__file__).with_name("sharded_worker.py")
    command = [sys.executable, *TWO_PROCESSES, str(worker), str(folder / "runs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_with_a_part_each_agree_with_one(folder: Path, name: str):
    run_recipe(folder / f"{name}.toml", f"name=one-{name}")
    one, two = weights(folder, f"one-{name}"), weights(folder, f"two-{name}")
    assert one.keys() == two.keys()
    # In half precision norms, too, are gathered in it: the direction of a small step changes in a few places.
    usual = {"atol": 1e-5, "rtol": 1e-4} if name != "half" else {"atol": 4e-3, "rtol": 0.0}
    for key in one:
        # A bias of keys moves no attention: its gradient is rounding, which Adam makes steps of.
        bounds = {"atol": 1e-3, "rtol": 0.0} if key.endswith("key.bias") and name != "half" else usual
        torch.testing.assert_close(two[key], one[key], **bounds, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_each_process_holds_half_of_the_weights(folder: Path):
    whole = sum(tensor.numel() for tensor in weights(folder, "two-depth").values())
    assert int((folder / "two-depth.held").read_text()) < 0.51 * whole


@pytest.mark.slow
def test_one_process_goes_on_where_two_with_a_part_each_ended(folder: Path):
    kept = weights(folder, "two-chains")
    without_the_last_checkpoint(folder, "two-chains")
    run_recipe(folder / "chains.toml", "name=two-chains", resume=True)
    resumed = weights(folder, "two-chains")
    for key in kept:
        torch.testing.assert_close(resumed[key], kept[key], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low-rank", "inside", "both"])
def test_activation_checkpointing_changes_nothing(folder: Path, name: str):
    path = folder / f"{name}.toml"
    run_recipe(path, f"name=plain-{name}")
    run_recipe(path, f"name=again-{name}", "train.gradient_checkpointing=true")
    plain, again = weights(folder, f"plain-{name}"), weights(folder, f"again-{name}")
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_accelerate_launch_says_that_a_student_is_sharded(folder: Path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2"]
    path = write_recipe(folder / "launched.toml", changed(DECODER, train={"sharding": None}))
    (folder / "launched.json").write_text(json.dumps([[str(path), []]]))
    command = [*launcher, str(Path(__file__).with_name("sharded_worker.py")), str(folder / "launched.json")]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (folder / "launched.held").read_text() == (folder / "two-decoder.held").read_text()
    one, two = weights(folder, "two-decoder"), weights(folder, "launched")
    assert all(torch.equal(one[key], two[key]) for key in one)
