"""Runs on images: what a step computes, what a plan says, and what an interrupted run and two processes give."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from families import tiny, tokenizer
from image_rows import pictures, rows_of
from safetensors.torch import load_file
from stages import TWO_PROCESSES, Killed, distill, kill_after
from tiny_recipes import changed, run_recipe, write_recipe
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageClassification

from kdcli import load_model
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.processors import load_processor, new_image_processor
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.runs import Run

NAMES = {0: "a", 1: "b", 2: "c"}
ROWS, TEMPERATURE, ALPHA, RATE = 12, 2.0, 0.25, 1e-3
IMAGES = pictures(ROWS)
GOLD = [0, 0, 1, 2, 1, 0, 2, 2, 1, 0, 2, 1]
RECIPE: dict[str, Any] = {
    "seed": 5,
    "method": {"name": "kd", "temperature": TEMPERATURE, "alpha": ALPHA},
    "task": {
        "name": "pictures",
        "type": "image-classification",
        "train": "rows.parquet",
        "validation": "rows.parquet",
        "labels": list(NAMES.values()),
    },
    "teacher": {"model": "teacher", "finetune": False},
    "student": {"form": "depth", "layers": 1, "select": "first"},
    "train": {
        "max_steps": 2,
        "batch_size": ROWS,
        "learning_rate": RATE,
        "scheduler": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1e6,
        "precision": "fp32",
        "device": "cpu",
    },
}


def write_world(folder: Path, *without: str, **changes: Any) -> Path:
    """Write rows, a teacher of two blocks and a recipe, and return that; ROWS images of several sizes."""
    rows = rows_of(IMAGES, GOLD).remove_columns("index")
    pq.write_table(rows.data.table, folder / "rows.parquet")
    teacher = tiny("vit", labels=3, id2label=NAMES, label2id={name: number for number, name in NAMES.items()})
    (folder / "teacher").mkdir(exist_ok=True)
    save_model(teacher, folder / "teacher", new_image_processor(16, 16))
    return write_recipe(folder / "recipe.toml", changed(RECIPE, *without, **changes))


def student_of(folder: Path, name: str = "recipe") -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / name / "student" / "model.safetensors")


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two models' weights, which have the same names.

    A bias of keys shifts all scores of a query alike: its gradient is rounding, which AdamW makes a step of.
    """
    assert first.keys() == second.keys()
    compared = [name for name in first if not name.endswith(("key.bias", "k_proj.bias"))]
    return max(float((first[name] - second[name]).abs().max()) for name in compared)


def test_two_steps_are_those_of_hinton_by_hand_in_plain_transformers(tmp_path: Path):
    record = run_recipe(write_world(tmp_path))
    teacher = AutoModelForImageClassification.from_pretrained(tmp_path / "teacher").eval()
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "teacher")
    student.vit.layers = student.vit.layers[:1]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "teacher")
    pixels, gold = processor(IMAGES, return_tensors="pt")["pixel_values"], torch.tensor(GOLD)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    with torch.no_grad():
        soft = (teacher(pixels).logits / TEMPERATURE).softmax(-1)
    steps = []
    for _ in range(2):
        logits = student(pixels).logits
        output = TEMPERATURE**2 * functional.kl_div((logits / TEMPERATURE).log_softmax(-1), soft, reduction="batchmean")
        task = functional.cross_entropy(logits, gold)
        steps.append({"output": output.item(), "task": task.item()})
        optimizer.zero_grad()
        (ALPHA * output + (1 - ALPHA) * task).backward()
        optimizer.step()
    history = [entry for entry in record["training"][0]["history"] if "output" in entry]
    for entry, own in zip(history, steps, strict=True):
        assert {name: entry[name] for name in own} == pytest.approx(own, rel=1e-4)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "runs" / "recipe" / "student").eval()
    own = load_model(tmp_path / "runs" / "recipe" / "student")
    assert differ(own.state_dict(), student.state_dict()) < 2e-6
    reader = load_processor(tmp_path / "runs" / "recipe" / "student")
    again = reader(IMAGES, return_tensors="pt")["pixel_values"]
    assert torch.equal(again, pixels) and torch.equal(plain(again).logits, own(again).logits)


def test_a_plan_says_what_the_run_does(tmp_path: Path):
    scratch = {"family": "vit", "layers": 3, "hidden_size": 16, "heads": 2, "intermediate_size": 32}
    scratch |= {"image_size": 12, "patch_size": 4}
    teacher = {"model": None, "scratch": scratch, "finetune": {"max_steps": 1, "batch_size": 4}}
    path = write_world(tmp_path, teacher=teacher, train={"max_steps": 1, "batch_size": 4}, student={"layers": 2})
    plan = make_plan(prepare(load_recipe(path, []), path))
    assert not (tmp_path / "runs").exists()
    record = run_recipe(path)
    assert plan.teacher.parameters == record["teacher"]["parameters"]
    assert plan.student.parameters == record["student"]["parameters"]
    assert plan.task.sizes["train"] == record["task"]["sizes"]["train"] == ROWS
    assert [stage.steps for stage in plan.stages] == [1] == [stage["steps"] for stage in record["training"]]
    # Nine patches and the class token of each image.
    assert plan.memory.tokens == 4 * 10
    own = load_model(tmp_path / "runs" / "recipe" / "student")
    assert shape_of(own.config).image == 12 and shape_of(own.config).patch == 4
    reader = load_processor(tmp_path / "runs" / "recipe" / "student")
    pixels = reader(IMAGES[0], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 12, 12) and -1 <= float(pixels.min()) < float(pixels.max()) <= 1


AUGMENTED = {"flip": True, "crop": 2, "mixup": 0.4}
SHORT = {"max_steps": 4, "batch_size": 4, "eval_every": 1, "scheduler": "linear"}


@pytest.mark.parametrize(
    "task", [pytest.param({}, id="plain", marks=pytest.mark.slow), pytest.param(AUGMENTED, id="augmented")]
)
def test_an_interrupted_run_goes_on_to_the_same_student(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_world(tmp_path, task=task, train=SHORT)
    run_recipe(path, "name=whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run_recipe(path, "name=other")
    assert not (tmp_path / "runs" / "other" / "student").exists()
    run_recipe(path, "name=other", resume=True)
    first, second = student_of(tmp_path, "whole"), student_of(tmp_path, "other")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["minilm", pytest.param("hs", marks=pytest.mark.slow)])
def test_kept_states_of_images_give_the_weights_of_a_teacher_that_runs(method: str, tmp_path: Path):
    path = write_world(tmp_path, "method", method={"name": method}, train={"batch_size": 5})
    run_recipe(path, "name=runs")
    run_recipe(path, "name=kept", 'teacher.cache="all"')
    assert differ(student_of(tmp_path, "runs"), student_of(tmp_path, "kept")) < 1e-6
    prepared = prepare(load_recipe(path, ['teacher.cache="all"']), path)
    [size] = prepared.state_bytes.values()
    [states] = [follower.states for follower in prepared.followers]
    assert states is not None and size == ROWS * 17 * states.layout.token_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"form": "low-rank", "layers": None, "select": None, "budget": 0.6, "init": "both"}},
        {"student": {"form": "low-rank", "layers": None, "select": None, "budget": 0.6, "ranks": "spread"}},
        {"student": {"form": "width", "layers": None, "select": None, "hidden_size": 16, "heads": 2}},
        {"overparam": {"matrices": 2, "select": "static"}},
        {"overparam": {"matrices": 2, "select": "dynamic"}, "train": {"max_steps": 4}},
        {"assistant": {"form": "depth", "layers": 1}},
        {"train": {"gradient_checkpointing": True}},
        {"teacher": {"finetune": {"max_steps": 1}}},
        {"student": {"form": "checkpoint", "model": "teacher", "layers": 1, "select": None}},
    ],
    ids=lambda changes: "-".join(
        str(value.get("select") or value.get("init") or name) for name, value in changes.items()
    ),
)
def test_forms_of_students_and_teachers_train_to_a_folder_that_loads(changes: Any, tmp_path: Path):
    record = run_recipe(write_world(tmp_path, **changes))
    own = load_model(tmp_path / "runs" / "recipe" / "student")
    assert sum(parameter.numel() for parameter in own.parameters()) == record["student"]["parameters"]
    pixels = load_processor(tmp_path / "runs" / "recipe" / "student")(IMAGES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        answers = own.eval()(pixels).logits.argmax(-1)
    accuracy = float((answers == torch.tensor(GOLD)).float().mean())
    [scores] = record["student"]["metrics"].values()
    assert scores["accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_the_student_of_one(sharding: str, tmp_path: Path):
    write_world(tmp_path, "method", method={"name": "minilm"}, train={"batch_size": 4, "sharding": sharding})
    _, one = distill(tmp_path, "one")
    _, two = distill(tmp_path, "two", *TWO_PROCESSES)
    # A step moves weights by 1e-3.
    assert differ(one, two) < 1e-5
    assert Run(tmp_path / "runs" / "two").document["student"]["metrics"]


def test_what_a_model_does_not_read_is_refused(tmp_path: Path):
    path = write_world(tmp_path)
    words = tmp_path / "words"
    words.mkdir()
    save_model(tiny("bert"), words, tokenizer())
    bare = tmp_path / "bare"
    bare.mkdir()
    save_model(tiny("vit", labels=3), bare)

    def refused(*overrides: str) -> InputError:
        with pytest.raises(InputError) as caught:
            prepare(load_recipe(path, list(overrides)), path)
        return caught.value

    assert "classifier of texts" in refused("teacher.model=words").message
    assert "of the family BERT" in refused("teacher={model='words'}").message
    assert "reads by an image processor" in refused("teacher.tokenizer=words").message
    assert "preprocessor_config.json" in refused("teacher.model=bare").message
    assert "classifier of images" in refused("task={name='reviews'}").message
    scratch = "teacher={{scratch={{family='{}', {}}}}}"
    assert refused(scratch.format("vit", "vocab_size=300")).where.endswith("teacher.scratch.vocab_size")
    assert "read texts" in refused(scratch.format("bert", "patch_size=4"), "task={name='reviews'}").message
    assert "does not divide" in refused(scratch.format("vit", "image_size=32, patch_size=5")).message
    assert "BERT" in refused(scratch.format("bert", "layers=2")).message
    finetune = "finetune=[{task={name='pictures', type='image-classification', train='rows.parquet'}}]"
    text = "task={name='t', type='text', data='words.csv', text='text'}"
    (tmp_path / "words.csv").write_text("text\n" + "a fine film\n" * 40, encoding="utf-8")
    error = refused(text, "teacher.model=words", "method={name='minilm'}", "student={form='depth', layers=1}", finetune)
    assert "classifying images" in error.message and error.where.endswith("finetune[0].task.type")
