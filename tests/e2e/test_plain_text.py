"""Distilling on plain text: a general student, fine-tuned and scored by the same recipe."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe
from training.stages import Killed, kill_after
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

import kdcli
from kdcli.data.reviews import reviews
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.counts import count_parameters
from kdcli.models.heads import head_of
from kdcli.models.scratch import train_tokenizer
from kdcli.tasks.heads import heads

RECIPE = tiny_recipe(
    *("task", "student"),
    task={"name": "reviews-text", "type": "text", "data": "reviews.txt", "max_length": 32},
    method="METHOD",
    teacher={"finetune": {"max_steps": 20, "learning_rate": 2e-3}},
    train={"max_steps": 20, "learning_rate": 2e-3},
)
LATER = {
    "task": {"name": "reviews", "train_samples": 64, "validation_samples": 50},
    "max_steps": 4,
    "seeds": 2,
    "against": ["scratch", "teacher"],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "reviews.txt").write_text("\n\n".join(reviews()["train"]["text"][:600]), encoding="utf-8")
    return write_recipe(tmp_path / "text.toml", RECIPE)


@pytest.mark.parametrize("method", ["distilbert", pytest.param("kd", marks=pytest.mark.slow)])
def test_a_student_trained_to_predict_keeps_its_head_and_is_scored_on_tasks(method: str, recipe: Path):
    write_recipe(recipe, changed(RECIPE, student={"form": "depth", "layers": 1}, finetune=[LATER]))
    record = run_recipe(recipe, f"method={method}")
    assert record["loss"]["after"] < record["loss"]["before"]
    run = recipe.parent / "runs" / "text"
    model = AutoModelForMaskedLM.from_pretrained(run / "student")
    assert len(model.bert.encoder.layer) == 1 and record["student_head"] == "masked-lm"
    assert len(AutoTokenizer.from_pretrained(run / "student")) == model.config.vocab_size
    [scores] = record["finetune"]
    assert set(scores["scores"]) == {"student", "scratch", "teacher"}
    assert all(len(values) == 2 for values in scores["scores"].values())
    tuned = kdcli.load_model(run / "finetune" / "reviews")
    assert head_of(tuned, heads()).name == "sequence-classification" and len(tuned.bert.encoder.layer) == 1
    card = (run / "student" / "README.md").read_text()
    assert "AutoModelForMaskedLM" in card and "accuracy (reviews)" in card


@pytest.mark.parametrize("method", ["minilmv2", "hs"])
def test_a_student_without_a_trained_head_is_a_body(recipe: Path, method: str):
    size = ("student.form=width", "student.hidden_size=16", "student.layers=1")
    record = run_recipe(recipe, f"method={method}", *size)
    assert record["loss"]["after"] < record["loss"]["before"]
    student = recipe.parent / "runs" / "text" / "student"
    assert not any(key.startswith(("cls.", "bert.")) for key in load_file(student / "model.safetensors"))
    assert AutoModel.from_pretrained(student).config.hidden_size == 16
    assert record["student_head"] == "base"


def test_a_low_rank_over_parameterised_student_is_contracted_and_restored(recipe: Path):
    half = ("student.form=low-rank", "student.budget=0.5", "overparam.length=1")
    record = run_recipe(recipe, "method=od", *half, "train.max_steps=4")
    assert record["contraction"] is not None
    student = recipe.parent / "runs" / "text" / "student"
    model = kdcli.load_model(student, "masked-lm")
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        body = kdcli.load_model(student, "base")(ids).last_hidden_state
        assert torch.equal(model.base_model(ids).last_hidden_state, body)
    fresh = kdcli.load_model(student, "sequence-classification", new_head={"num_labels": 3})
    with torch.no_grad():
        assert torch.equal(fresh.base_model(ids).last_hidden_state, body)


def test_a_student_of_factors_predicts_through_those_of_its_table(recipe: Path):
    small = {"form": "low-rank", "budget": 0.5, "embedding_rank": 8}
    later = {**LATER, "max_steps": 1, "seeds": 1, "against": ["scratch"]}
    method = {"name": "makd", "schedule": "staged", "shares": [0.2, 0.2, 0.6]}
    write_recipe(recipe, changed(RECIPE, "method", method=method, student=small, finetune=[later]))
    record = run_recipe(recipe, "train.learning_rate=5e-3", "train.max_steps=10", "teacher.finetune.max_steps=2")
    assert [stage["stage"] for stage in record["training"]] == ["matrix", "layer", "model"]
    assert record["loss"]["after"] < record["loss"]["before"] and record["student_head"] == "masked-lm"
    run = recipe.parent / "runs" / "text"
    student = AutoModelForMaskedLM.from_pretrained(run / "student")
    rows, width = student.config.vocab_size, student.config.hidden_size
    held = {name: tensor.shape for name, tensor in load_file(run / "student" / "model.safetensors").items()}
    assert (rows, width) not in held.values() and held["bert.embeddings.word_embeddings.down.weight"] == (rows, 8)
    assert record["teacher"]["parameters"] - count_parameters(student) > rows * width - 8 * (rows + width)
    tuned = kdcli.load_model(run / "finetune" / "reviews")
    assert tuned.get_input_embeddings().rank == 8


def test_makd_needs_no_head_without_its_model_level(recipe: Path):
    body = AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=300, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64))  # fmt: skip
    folder = recipe.parent / "body"
    body.save_pretrained(folder)
    train_tokenizer(reviews()["train"]["text"][:300], 300).save_pretrained(folder)
    write_recipe(recipe, changed(RECIPE, "method", "teacher", method={"name": "makd", "weights": {"model": 0.0}},
        teacher={"model": "body", "finetune": False},
        student={"form": "low-rank", "rank": 4, "init": "svd"}))  # fmt: skip
    record = run_recipe(recipe, "train.max_steps=2")
    assert record["student_head"] == "base" and record["loss"]["after"] < record["loss"]["before"]
    with pytest.raises(InputError, match="no trained head for predicting masked tokens"):
        run_recipe(recipe, "method.weights.model=1.0", "name=other")


def test_an_assistant_comes_between_teacher_and_student(recipe: Path):
    width = {"hidden_size": 16, "heads": 2}
    sizes = {"student": {"form": "width", "layers": 1, **width}, "assistant": {"layers": 2, **width}}
    write_recipe(recipe, changed(RECIPE, **sizes, train={"max_steps": 4}))
    record = run_recipe(recipe, "method=minilm")
    assert record["assistant"]["form"] == "width"
    assert record["student"]["parameters"] < record["assistant"]["parameters"] < record["teacher"]["parameters"]
    # The student's blocks start as copies of the assistant's, which are of its own width.
    assert record["teacher_layers"] == [1]


def test_a_plan_counts_blocks_and_trains_nothing(recipe: Path):
    plan = make_plan(prepare(load_recipe(recipe, ["method=od"]), recipe)).to_json()
    sizes = plan["task"]["sizes"]
    assert plan["task"]["kind"] == "text" and sizes["train blocks"] > 100
    # One unit for both: the tenth of the documents that is held out is about a tenth of the blocks.
    assert set(sizes) == {"train blocks", "selection blocks"}
    assert 0.05 < sizes["selection blocks"] / sum(sizes.values()) < 0.2
    assert [path.name for path in recipe.parent.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_ends_the_same(recipe: Path):
    extra = ("method=od", "train.eval_every=5")
    whole = run_recipe(recipe, *extra, "name=whole")
    parts = (*extra, "name=parts")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 10, "checkpoints/1-")
        run_recipe(recipe, *parts)
    assert json.loads((recipe.parent / "runs" / "parts" / "run.json").read_text())["status"] == "failed"
    resumed = run_recipe(recipe, *parts, resume=True)
    assert resumed["hashes"]["student"] == whole["hashes"]["student"]
    # The weights that it goes on from are scored once.
    assert resumed["training"][0]["history"] == whole["training"][0]["history"]
