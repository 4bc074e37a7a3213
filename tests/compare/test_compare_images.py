"""Methods compared on images: from recipes to the report, and what `eval` says of the runs."""

import json
from pathlib import Path

import pytest
from tiny_recipes import write_recipe

from kdcli.cli.app import run

SIZES = {"layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32}
SCRATCH = {"family": "vit", "image_size": 16, "patch_size": 8, **SIZES}


@pytest.mark.slow
def test_methods_are_compared_on_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = []
    for name, method in (("kd", "kd"), ("decisions", {"name": "dbkd", "copies": 2})):
        recipe = {
            "method": method,
            "task": {"name": "shapes", "train_samples": 40, "validation_samples": 20},
            "teacher": {"scratch": SCRATCH, "finetune": {"max_steps": 2}},
            "student": {"form": "depth", "layers": 1},
            "train": {"max_steps": 2, "batch_size": 8, "precision": "fp32", "device": "cpu"},
        }
        paths.append(str(write_recipe(tmp_path / f"{name}.toml", recipe)))
    output = tmp_path / "made"
    assert run(["compare", *paths, "--seeds", "2", "--output", str(output), "--json"]) == 0
    [task] = json.loads(capsys.readouterr().out)["tasks"]
    assert task["metric"] == "accuracy" and task["baseline"] == "kd"
    assert [(row["name"], list(row["scores"])) for row in task["rows"]] == [
        (name, ["42", "43"]) for name in ("kd", "decisions")
    ]
    report = (output / "comparison.md").read_text(encoding="utf-8")
    assert "## shapes (accuracy)" in report and "| decisions |" in report
    assert (output / "comparison.svg").stat().st_size > 1000
    for made in (output / "runs").iterdir():
        own = json.loads((made / "run.json").read_text())["student"]
        assert run(["eval", str(made), "--json"]) == 0
        scored = json.loads(capsys.readouterr().out)
        assert scored["metrics"] == own["metrics"] and scored["by_class"] == own["by_class"]
        assert set(scored["metrics"]["validation"]) == {"accuracy", "top5_accuracy", "f1"}
        assert run(["eval", str(made), "--task", "shapes", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["metrics"] == own["metrics"]
