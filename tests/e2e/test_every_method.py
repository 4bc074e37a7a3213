"""Every method of the package on a task: alone and over chains of tensors, and that each one teaches something."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from kdcli.models.forms import build_student
from kdcli.models.load import load_model
from kdcli.pipeline import run_distill
from kdcli.recipe.schema import Recipe
from kdcli.resolve import resolve

METHODS = ["kd", "hs", "minilm", "minilmv2", "tinybert", "distilbert", "theseus", "lgtm", "dbkd", "adkd", "makd"]
OPTIONS: dict[str, dict[str, Any]] = {"dbkd": {"copies": 2}}
CHAINS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "svd": {"factorization": "svd"},
    "mpo": {"factorization": "mpo", "length": 1},
}
STUDENTS = {"makd": {"form": "low-rank", "budget": 0.5}}
QUIET = Console(quiet=True)


def distil(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run in `folder`/run."""
    parsed = Recipe.model_validate({"name": "run", **recipe})
    return run_distill(parsed, recipe_path=folder / "recipe.toml", output=folder, console=QUIET).record


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier with 4 blocks of width 32, trained for four steps."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_CACHE", str(folder / "cache"))
        record = distil(
            folder,
            {
                "task": {"name": "reviews", "train_samples": 64, "validation_samples": 32},
                "method": "kd",
                "teacher": {
                    "scratch": {
                        "layers": 4,
                        "hidden_size": 32,
                        "heads": 4,
                        "intermediate_size": 64,
                        "vocab_size": 300,
                    },
                    "finetune": {"max_steps": 4, "learning_rate": 1e-3, "batch_size": 16},
                },
                "student": {"layers": 1},
                "train": {"max_steps": 1, "precision": "fp32"},
            },
        )
    return Path(record["teacher_path"])


@pytest.mark.parametrize("chains", CHAINS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_a_plain_student_that_has_learned_with_and_without_chains(
    method: str, chains: str, teacher: Path, tmp_path: Path
):
    recipe: dict[str, Any] = {
        "task": {"name": "reviews", "train_samples": 48, "validation_samples": 32},
        "method": {"name": method, **OPTIONS.get(method, {})},
        "teacher": {"model": str(teacher)},
        "student": STUDENTS.get(method, {"layers": 2}),
        "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1, "precision": "fp32"},
    }
    if CHAINS[chains] is not None:
        recipe["overparam"] = CHAINS[chains]
    record = distil(tmp_path, recipe)
    assert record["status"] == "done"

    stages = [(stage["stage"], stage["steps"]) for stage in record["training"]]
    if method == "tinybert":
        assert stages == [("intermediate", 3), ("prediction", 1)]
    else:
        assert [steps for _, steps in stages] == [4]
    for stage in record["training"]:
        assert len([entry for entry in stage["history"] if "loss" in entry]) == stage["steps"]
        for entry in stage["history"]:
            assert all(math.isfinite(value) for value in entry.values()), entry

    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    resolved = resolve(Recipe.model_validate(recipe), tmp_path / "recipe.toml")
    untrained = build_student(load_model(teacher, task="sequence-classification"), resolved.student, seed=42).model
    before = untrained.state_dict()
    assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in before.items()}
    matrices = [key for key in before if ".layer." in key and key.endswith("weight") and before[key].ndim > 1]
    assert len(matrices) == (24 * 2 if method == "makd" else 12)
    if chains == "plain":
        assert record["contraction"] is None
    else:
        assert len(record["contraction"]["matrices"]) == len(record["overparam"]["matrices"]) == len(matrices)
        assert record["contraction"]["max_abs_difference"] < 1e-4
    # Far more than rounding: what trained is what was saved.
    still = [key for key in matrices if torch.allclose(saved[key], before[key], rtol=0, atol=1e-5)]
    assert not still
