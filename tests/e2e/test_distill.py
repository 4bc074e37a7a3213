"""The whole road on a tiny task: recipe in, student, report and ONNX file out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_recipes import changed, tiny_recipe, write_recipe
from transformers import AutoModelForSequenceClassification


def kdcli(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "kdcli", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


RECIPE = tiny_recipe(
    "student",
    method="makd",
    task={"train_samples": 320, "validation_samples": 100},
    teacher={"finetune": {"max_steps": 12, "learning_rate": 1e-3}},
    train={"max_steps": 12, "eval_every": 6, "log_every": 6},
)
HALF = changed(RECIPE, student={"budget": 0.5})
OVER = changed(HALF, overparam={"length": 1})


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    return write_recipe(folder / "tiny.toml", recipe)


def test_distill_eval_export_in_a_row(tmp_path: Path):
    recipe = written(tmp_path, OVER)
    document = json.loads(kdcli("distill", str(recipe), "--json", cwd=tmp_path).stdout)
    assert document["status"] == "done"
    assert document["student"]["parameters"] < document["teacher"]["parameters"]
    run = tmp_path / "runs" / "tiny"
    for name in (
        "run.json",
        "recipe.toml",
        "student/model.safetensors",
        "student/config.json",
        "student/README.md",
    ):
        assert (run / name).is_file(), name
    assert json.loads((run / "run.json").read_text())["student"] == document["student"]

    scores = json.loads(kdcli("eval", "--task", "reviews", "--json", cwd=tmp_path).stdout)
    assert json.dumps(document["student"]["metrics"]) in json.dumps(scores)

    export = json.loads(kdcli("export", "--onnx", "--runs", "2", "--json", cwd=tmp_path).stdout)
    assert (run / "onnx" / "model.onnx").is_file()
    assert export["parity"]["max_abs_difference"] < 1e-4
    onnx_scores = json.loads(kdcli("eval", str(run / "onnx"), "--task", "reviews", "--json", cwd=tmp_path).stdout)
    assert json.dumps(document["student"]["metrics"]) in json.dumps(onnx_scores)


def test_a_contracted_depth_student_is_a_plain_model(tmp_path: Path):
    recipe = written(tmp_path, changed(RECIPE, method="kd", student={"layers": 1}, overparam={"length": 2}))
    document = json.loads(kdcli("distill", str(recipe), "--json", cwd=tmp_path).stdout)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "tiny" / "student")
    assert sum(p.numel() for p in model.parameters()) == document["student"]["parameters"]
    assert document["contraction"]["max_abs_difference"] < 1e-4
    assert not [key for key in model.state_dict() if "parametrizations" in key]


def test_dry_run_trains_and_writes_nothing(tmp_path: Path):
    recipe = written(tmp_path, OVER)
    plan = json.loads(kdcli("distill", str(recipe), "--dry-run", "--json", cwd=tmp_path).stdout)
    assert plan["overparam"]["matched"] == plan["overparam"]["matrices"] > 0
    assert plan["student"]["parameters"] < plan["teacher"]["parameters"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.toml"]


def test_an_existing_run_is_not_overwritten_without_force(tmp_path: Path):
    recipe = written(tmp_path, RECIPE)
    kdcli("distill", str(recipe), cwd=tmp_path)
    before = (tmp_path / "runs" / "tiny" / "run.json").read_bytes()
    refused = kdcli("distill", str(recipe), cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "runs" / "tiny" / "run.json").read_bytes() == before


def test_the_same_seed_gives_the_same_student(tmp_path: Path, own_cache: Path):
    from safetensors.torch import load_file

    recipe = written(tmp_path, HALF)
    weights = []
    for name in ("one", "two"):
        kdcli("distill", str(recipe), "--refresh", "--set", f"name={name}", cwd=tmp_path)
        weights.append(load_file(tmp_path / "runs" / name / "student" / "model.safetensors"))
    hashes = [json.loads((tmp_path / "runs" / name / "run.json").read_text())["hashes"] for name in ("one", "two")]
    assert hashes[0] == hashes[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_teacher_is_trained_once_and_reused(tmp_path: Path):
    recipe = written(tmp_path, RECIPE)
    first = kdcli("distill", str(recipe), "--json", cwd=tmp_path)
    second = kdcli("distill", str(recipe), "--force", "--json", cwd=tmp_path)
    assert "fine-tuned before" not in first.stderr
    assert "fine-tuned before" in second.stderr
    assert json.loads(first.stdout)["hashes"]["teacher"] == json.loads(second.stdout)["hashes"]["teacher"]
