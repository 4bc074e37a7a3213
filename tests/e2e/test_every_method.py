"""Every method of the package on a task: alone and over chains of tensors, and that each one teaches something."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from kdcli.data.reviews import LABELS, reviews
from kdcli.distill.resolve import resolve
from kdcli.distill.run import run_distill
from kdcli.distill.teacher import labelling_of
from kdcli.evaluation.score import evaluate_model
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.recipe.schema import Recipe, StudentSection
from kdcli.tasks.base import Task
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.heads import load_model
from kdcli.tasks.load import load_task
from kdcli.tasks.predict import predict

METHODS = ["kd", "hs", "minilm", "minilmv2", "tinybert", "distilbert", "theseus", "lgtm", "dbkd", "adkd", "makd"]
OPTIONS: dict[str, dict[str, Any]] = {"dbkd": {"copies": 2}}
SIZES: dict[str, Any] = {"layers": 4, "hidden_size": 32, "heads": 4, "intermediate_size": 64, "vocab_size": 1000}
LEARNING: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "minilmv2": {"relation_heads": 8},
    # So short a first stage leaves the second something to learn.
    "tinybert": {"shares": [0.1, 0.9], "final_learning_rate": 5e-3},
}
SLOW = ("lgtm", "makd")
CHAINS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "svd": {"factorization": "svd"},
    "mpo": {"factorization": "mpo", "length": 1},
}
# Its students are cut from what the teacher was before its fine-tuning.
TEACHERS: dict[str, dict[str, Any]] = {"dbkd": {"finetune": {"max_steps": 1, "batch_size": 8}}}
# Of the start that follows from the teacher alone, so that a student can be built again beside the trained one.
STUDENTS = {"makd": {"form": "low-rank", "budget": 0.5, "init": "svd", "ranks": "even"}}
CLASSIFIER = "sequence-classification"
TWISTS = {"but", "although", "even", "not", "never", "hardly", "far", "anything"}
QUIET = Console(quiet=True)


def distil(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a run in `folder`/run."""
    parsed = Recipe.model_validate({"name": "run", **recipe})
    return run_distill(parsed, recipe_path=folder / "recipe.toml", output=folder, console=QUIET).to_json()


def make_teacher(folder: Path, task: dict[str, Any], teacher: dict[str, Any]) -> Path:
    """Return the folder of a teacher that is fine-tuned on `task`."""
    recipe = {
        "task": task,
        "method": "kd",
        "teacher": teacher,
        "student": {"layers": 1},
        "train": {"max_steps": 1, "precision": "fp32"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_CACHE", str(folder / "cache"))
        record = distil(folder, recipe)
    return Path(record["teacher_path"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher that has been trained for four steps."""
    task = {"name": "reviews", "train_samples": 64, "validation_samples": 32}
    finetune = {"max_steps": 4, "learning_rate": 1e-3, "batch_size": 16}
    return make_teacher(tmp_path_factory.mktemp("teacher"), task, {"scratch": SIZES, "finetune": finetune})


@pytest.mark.parametrize("chains", CHAINS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_a_plain_student_that_has_learned_with_and_without_chains(
    method: str, chains: str, teacher: Path, tmp_path: Path
):
    recipe: dict[str, Any] = {
        "task": {"name": "reviews", "train_samples": 48, "validation_samples": 32},
        "method": {"name": method, **OPTIONS.get(method, {})},
        "teacher": {"model": str(teacher), **TEACHERS.get(method, {})},
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
    untrained = build_student(load_model(teacher, CLASSIFIER), resolved.student, seed=42).model
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


@pytest.fixture(scope="module")
def plain_words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A task of those `reviews` that neither negate nor contrast, with their true labels: fifty steps are enough."""
    folder = tmp_path_factory.mktemp("data")
    splits = reviews()
    for split, size in (("train", 800), ("validation", 250)):
        rows = zip(splits[split]["text"], splits[split]["truth"], strict=True)
        kept = [{"text": text, "label": LABELS[label]} for text, label in rows if not TWISTS & set(text.split())]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept[:size]))
    return {
        "name": "plain-words",
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "text": "text",
        "label": "label",
        "max_length": 40,
    }


def trained(folder: Path, task: dict[str, Any], steps: int) -> Path:
    """Return the folder of a teacher that has been trained for so many steps."""
    finetune = {"max_steps": steps, "learning_rate": 5e-3}
    return make_teacher(folder, task, {"scratch": SIZES, "finetune": finetune})


@pytest.fixture(scope="module")
def good_teacher(plain_words: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher that is nearly always right."""
    return trained(tmp_path_factory.mktemp("good"), plain_words, 80)


def ignorant(teacher: Path, section: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a student's section: one cut from `teacher`, less what stands between its blocks and its answer.

    As it is cut, a tiny student is as good as its teacher.
    """
    student = build_student(load_model(teacher, CLASSIFIER), StudentSection(**section), seed=0).model
    torch.manual_seed(0)
    for module in (student.bert.pooler.dense, student.classifier):
        module.reset_parameters()
    folder.mkdir()
    save_model(student, folder, load_tokenizer(teacher))
    return {"form": "checkpoint", "model": str(folder)}


def score_of(model: Any, tokenizer: Any, task: Task) -> tuple[float, float]:
    """Return accuracy and cross entropy on the validation rows."""
    rows = task.report["validation"]
    logits = predict(model, encode(rows, tokenizer, 40), Collator(tokenizer))["logits"]
    loss = torch.nn.functional.cross_entropy(torch.as_tensor(logits), torch.tensor(list(rows["label"])))
    return evaluate_model(model, tokenizer, task, max_length=40)["validation"]["accuracy"], float(loss)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS]
)
def test_in_fifty_steps_the_loss_falls_and_the_accuracy_rises(
    method: str, plain_words: dict[str, Any], good_teacher: Path, tmp_path: Path
):
    teacher, depth = good_teacher, {"form": "depth", "layers": 1}
    if method == "theseus":
        # Its student has the teacher's own head and learns from labels alone: more than this teacher knows.
        teacher, student = trained(tmp_path, plain_words, 38), depth
    else:
        student = ignorant(teacher, STUDENTS.get(method, depth), tmp_path / "student")
    recipe = {
        "task": plain_words,
        "method": {"name": method, **LEARNING.get(method, {})},
        "teacher": {"model": str(teacher)},
        "student": student,
        "train": {"max_steps": 50, "learning_rate": 5e-3, "log_every": 1, "precision": "fp32", "eval_every": 50},
    }
    parsed = Recipe.model_validate(recipe)
    resolved = resolve(parsed, tmp_path / "recipe.toml")
    task, tokenizer = load_task(parsed.task, parsed.evaluate, base=tmp_path), load_tokenizer(teacher)
    labelling = labelling_of(task.kind, task.label_names)
    untrained = build_student(load_model(teacher, CLASSIFIER), resolved.student, seed=42, labelling=labelling).model
    accuracy, loss = score_of(untrained, tokenizer, task)

    record = distil(tmp_path / "out", recipe)
    student_after = load_model(tmp_path / "out" / "run" / "student", CLASSIFIER)
    accuracy_after, loss_after = score_of(student_after, tokenizer, task)
    assert record["student"]["score"] == accuracy_after > accuracy + 0.1
    assert loss_after < loss
    if method == "theseus":
        # Its training loss is that of the teacher with ever more of the student inside.
        return
    assert record["teacher"]["score"] > 0.95 and accuracy_after > 0.9 > 0.6 > accuracy
    for stage in record["training"]:
        losses = [entry["loss"] for entry in stage["history"] if "loss" in entry]
        quarter = max(1, len(losses) // 4)
        assert fmean(losses[-quarter:]) < fmean(losses[:quarter]), stage["stage"]
