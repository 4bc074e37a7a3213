"""The whole way on a tiny task: recipe in, student, report and ONNX file out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import changed, tiny_recipe, write_recipe
from transformers import AutoModelForSequenceClassification

import kdcli as package
from kdcli.cli.app import run
from kdcli.errors import InputError

RECIPE = tiny_recipe(
    "student",
    method="makd",
    task={"train_samples": 96, "validation_samples": 50},
    student={"budget": 0.5},
    train={"max_steps": 4, "eval_every": 2, "log_every": 2},
)
SMALL = ("--runs", "1", "--batch-sizes", "1", "--sequence-lengths", "16")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "tiny.toml", RECIPE)
    return tmp_path


def kdcli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """Run a command, and return its document and what it wrote on stderr."""
    assert run([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_distill_eval_export_in_a_row(folder: Path, capsys: pytest.CaptureFixture[str]):
    over = ("--set", "overparam.length=1")
    plan, _ = kdcli(capsys, "distill", "tiny.toml", "--dry-run", *over)
    assert plan["overparam"]["matched"] == plan["overparam"]["matrices"] > 0
    assert plan["student"]["parameters"] < plan["teacher"]["parameters"]
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.toml"]

    document, _ = kdcli(capsys, "distill", "tiny.toml", *over)
    assert document["status"] == "done"
    # What each matrix gets follows from training rows, which a plan does not look at.
    assert document["student"]["parameters"] == pytest.approx(plan["student"]["parameters"], rel=0.02)
    place = folder / "runs" / "tiny"
    for name in ("run.json", "recipe.toml", "student/model.safetensors", "student/config.json", "student/README.md"):
        assert (place / name).is_file(), name
    before = (place / "run.json").read_bytes()
    assert json.loads(before)["student"] == document["student"]

    scores, _ = kdcli(capsys, "eval", "--task", "reviews")
    assert json.dumps(document["student"]["metrics"]) in json.dumps(scores)
    export, _ = kdcli(capsys, "export", "--onnx", *SMALL)
    assert (place / "onnx" / "model.onnx").is_file()
    assert export["parity"]["max_abs_difference"] < 1e-4
    onnx_scores, _ = kdcli(capsys, "eval", str(place / "onnx"), "--task", "reviews")
    assert json.dumps(document["student"]["metrics"]) in json.dumps(onnx_scores)

    before = (place / "run.json").read_bytes()
    assert run(["distill", "tiny.toml", *over]) == 2
    assert "--force" in capsys.readouterr().err
    assert (place / "run.json").read_bytes() == before


def test_a_contracted_depth_student_is_a_plain_model(folder: Path, capsys: pytest.CaptureFixture[str]):
    depth = changed(RECIPE, "student", method="kd", student={"layers": 1}, overparam={"length": 2})
    document, _ = kdcli(capsys, "distill", str(write_recipe(folder / "tiny.toml", depth)))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "runs" / "tiny" / "student")
    assert sum(p.numel() for p in model.parameters()) == document["student"]["parameters"]
    assert document["contraction"]["max_abs_difference"] < 1e-4
    assert not [key for key in model.state_dict() if "parametrizations" in key]


def test_the_same_seed_gives_the_same_student_and_the_teacher_is_trained_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    names = {"one": [], "again": ["--refresh"], "reused": []}
    records, words = {}, {}
    for name, options in names.items():
        records[name], words[name] = kdcli(capsys, "distill", "tiny.toml", "--set", f"name={name}", *options)
    assert [name for name, said in words.items() if "fine-tuned before" in said] == ["reused"]
    weights = [load_file(folder / "runs" / name / "student" / "model.safetensors") for name in names]
    assert records["one"]["hashes"] == records["again"]["hashes"] == records["reused"]["hashes"]
    assert all(torch.equal(weights[0][key], other[key]) for other in weights[1:] for key in weights[0])


def test_python_calls_the_pipeline_with_a_file_or_a_dictionary(folder: Path, capsys: pytest.CaptureFixture[str]):
    document = tiny_recipe(train={"max_steps": 1})
    first = package.distill(write_recipe(folder / "tiny.toml", document), overrides=["seed=7"])
    assert first.run.path.resolve() == folder / "runs" / "tiny" and first.record.seed == 7
    second = package.distill({**document, "name": "other", "seed": 7})
    assert second.run.path.resolve() == folder / "runs" / "other"
    assert second.result == first.result and second.result.student.score is not None
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"student\.layers: .*\n  train\.epoch: "):
        package.distill({**document, "student": {"layers": -1}, "train": {"epoch": 1}})
