"""The teacher: made once, kept under a name that says what shaped it, its classes in the task's order."""

import io
import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe
from training.stages import Killed, kill_after
from transformers import BertForMaskedLM, BertModel, PreTrainedModel

from kdcli.data.reviews import reviews
from kdcli.distill.teacher import Teacher, make_teacher, start_teacher
from kdcli.errors import InputError
from kdcli.models.hashing import hash_of_weights
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer
from kdcli.recipe.schema import EvaluateSection, Recipe, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.heads import head_named, load_model
from kdcli.tasks.load import load_task

WORDS = tokenizer()
CLASSIFIER = "sequence-classification"
PROBE = torch.randint(5, 190, (4, 9), generator=torch.Generator().manual_seed(0))


@cache
def body(seed: int = 0, **extra: Any) -> PreTrainedModel:
    return tiny("bert", layers=1, seed=seed, **extra).base_model


def keep(folder: Path, model: PreTrainedModel, words: Any = WORDS) -> Path:
    """Write a model folder and return it."""
    folder.mkdir()
    save_model(model, folder, words)
    return folder


def recipe_of(**tables: Any) -> Recipe:
    """Return a recipe with a base model in `base`, one training step and 24 rows; tables are merged into it."""
    document = tiny_recipe(
        *("teacher", "student", "train"),
        task={"train_samples": 24, "validation_samples": 20, "max_length": 24},
        teacher={"model": "base", "finetune": {"max_steps": 1, "batch_size": 8, "learning_rate": 1e-3}},
        train={"precision": "fp32", "device": "cpu"},
    )
    return Recipe.model_validate(changed(document, **tables))


@cache
def task_of(task: str, evaluate: str, base: Path | None) -> Task:
    sections = TaskSection.model_validate_json(task), EvaluateSection.model_validate_json(evaluate)
    return load_task(*sections, base=base or Path())


class Made:
    """A teacher, and what was said while it was made."""

    def __init__(self, teacher: Teacher, said: str) -> None:
        self.teacher = teacher
        self.said = said

    @property
    def reused(self) -> bool:
        return "fine-tuned before" in self.said

    @property
    def weights(self) -> str:
        return hash_of_weights(self.teacher.model)

    def logits(self, ids: torch.Tensor = PROBE) -> torch.Tensor:
        """Return what the model says as it stands: in training mode it would say something else every time."""
        with torch.no_grad():
            return self.teacher.model(ids).logits


def make(folder: Path, recipe: Recipe | None = None, *, head: str = CLASSIFIER, **options: Any) -> Made:
    recipe = recipe or recipe_of()
    said = io.StringIO()
    sections = [section.model_dump_json(exclude_unset=True) for section in (recipe.task, recipe.evaluate)]
    # The built-in task takes longer to make up than such a teacher to train.
    task = task_of(*sections, folder if recipe.task.data else None)
    teacher = make_teacher(
        start_teacher(recipe, task, head_named(head), base=folder, world=1),
        recipe,
        task,
        head_named(head),
        console=Console(file=said, width=200),
        **{"refresh": False, "resume": False, "work": folder / "work", **options},
    )
    return Made(teacher, said.getvalue())


def teachers(own_cache: Path) -> list[Path]:
    return sorted((own_cache / "teachers").glob("*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model without a head in `base`."""
    keep(tmp_path / "base", body())
    return tmp_path


def test_a_tuned_teacher_is_kept_and_read_back_as_it_was(folder: Path, own_cache: Path):
    first = make(folder)
    [kept] = teachers(own_cache)
    assert not first.reused and first.teacher.path == kept
    assert first.teacher.training["steps"] == 1
    assert not (folder / "work").exists()
    second = make(folder)
    assert second.reused and str(kept) in second.said and second.teacher.path == kept
    assert second.weights == first.weights
    assert torch.equal(second.logits(), first.logits())
    assert second.teacher.model.config.id2label == first.teacher.model.config.id2label == {0: "negative", 1: "positive"}
    text = "the film was dull"
    assert second.teacher.processor(text)["input_ids"] == first.teacher.processor(text)["input_ids"]
    assert not torch.equal(
        load_file(kept / "model.safetensors")["bert.pooler.dense.weight"], body().pooler.dense.weight
    )
    note = json.loads((kept / "kdcli.json").read_text())
    assert note["identity"]["seed"] == 42 and note["training"]["steps"] == 1


def curve(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads in a folder: (step, value) by the name of the quantity."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_teachers_curve_is_told_whether_it_was_trained_now_or_before(folder: Path, own_cache: Path):
    recipe = recipe_of(teacher={"finetune": {"max_steps": 21, "batch_size": 8, "learning_rate": 1e-3}})
    first = make(folder, recipe, log=folder / "first")
    again = make(folder, recipe, log=folder / "again")
    assert again.reused and not first.reused
    history = first.teacher.training["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 22))
    assert again.teacher.training == first.teacher.training
    written, read = curve(folder / "first"), curve(folder / "again")
    assert {"train/loss", "train/task", "train/learning_rate"} <= set(read)
    assert [step for step, _ in read["train/task"]] == list(range(1, 22))
    # While it runs, the library tells the epoch once more at the end.
    for tag in set(read) - {"train/epoch"}:
        assert read[tag] == written[tag]
    # A run that goes on does not tell it twice.
    make(folder, recipe, log=folder / "again")
    assert len(list((folder / "again").iterdir())) == 1


CHANGES = {
    "another seed": {"seed": 1},
    "a seed of its own": {"teacher": {"seed": 7}},
    "fewer rows": {"task": {"train_samples": 16}},
    "other rows": {"task": {"split_seed": 3}},
    "shorter texts": {"task": {"max_length": 16}},
    "another rate": {"teacher": {"finetune": {"max_steps": 1, "batch_size": 8, "learning_rate": 2e-3}}},
    "more steps": {"teacher": {"finetune": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}}},
    "bigger batches": {"teacher": {"finetune": {"max_steps": 1, "batch_size": 16, "learning_rate": 1e-3}}},
    "decay": {"teacher": {"finetune": {"max_steps": 1, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.5}}},
    "another precision": {"train": {"precision": "bf16"}},
    "another order of the rows": {"train": {"group_by_length": False}},
    "another base": {"teacher": {"model": "other"}},
    "other heads": {"teacher": {"model": "heads"}},
    "another dropout": {"teacher": {"model": "dropout"}},
    "another tokenizer": {"teacher": {"tokenizer": "words"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_shapes_a_teacher_is_in_its_name(folder: Path, own_cache: Path, change: str):
    if change == "another base":
        keep(folder / "other", body(seed=1))
    if change == "other heads":
        keep(folder / "heads", body(num_attention_heads=2))
    if change == "another dropout":
        keep(folder / "dropout", body(hidden_dropout_prob=0.5))
    if change == "another tokenizer":
        train_tokenizer(reviews()["train"]["text"][600:700], 120).save_pretrained(folder / "words")
    plain = make(folder)
    changed = make(folder, recipe_of(**CHANGES[change]))
    assert not changed.reused
    assert len(teachers(own_cache)) == 2
    assert changed.weights != plain.weights or not torch.equal(changed.logits(), plain.logits())


def test_what_does_not_shape_a_teacher_is_not_in_its_name(folder: Path):
    first = make(folder)
    (folder / "elsewhere").mkdir()
    shutil.copytree(folder / "base", folder / "elsewhere" / "copy")
    others = {
        "method": {"name": "minilm"},
        "student": {"form": "depth", "layers": 1},
        "overparam": {"length": 1},
        "train": {"batch_size": 64, "learning_rate": 1.0, "log_every": 3, "scheduler": "cosine", "eval_every": 2},
        "evaluate": {"batch_size": 5, "protocol": "half-dev"},
        "task": {"metrics": ["f1"], "validation_samples": 40},
        "teacher": {"model": str(folder / "elsewhere" / "copy"), "seed": 42},
        "name": "other",
    }
    for name, value in others.items():
        made = make(folder, recipe_of(**{name: value}))
        assert made.reused and made.weights == first.weights, name


def test_a_students_seed_is_not_in_the_name_of_a_teacher_with_its_own(folder: Path):
    first = make(folder, recipe_of(seed=1, teacher={"seed": 7}))
    second = make(folder, recipe_of(seed=2, teacher={"seed": 7}))
    assert second.reused and second.weights == first.weights


SCRATCH = {"layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 32, "vocab_size": 120}


def scratch(seed: int = 42, **sizes: int) -> Recipe:
    return recipe_of(seed=seed, teacher={"model": None, "scratch": {**SCRATCH, **sizes}})


def test_a_teacher_from_scratch_is_kept_under_its_shape_and_seed(tmp_path: Path, own_cache: Path):
    first = make(tmp_path, scratch())
    assert make(tmp_path, scratch()).reused
    assert torch.equal(make(tmp_path, scratch()).logits(PROBE % 100), first.logits(PROBE % 100))
    # Heads share tensors whose shape does not depend on their number.
    for recipe in (scratch(heads=4), scratch(vocab_size=100), scratch(seed=1)):
        assert not make(tmp_path, recipe).reused
    assert len(teachers(own_cache)) == 4


def test_refresh_makes_it_again_and_the_same(folder: Path, own_cache: Path):
    first = make(folder)
    [kept] = teachers(own_cache)
    note = json.loads((kept / "kdcli.json").read_text())
    (kept / "kdcli.json").write_text(json.dumps({**note, "version": "old"}))
    again = make(folder, refresh=True)
    assert not again.reused and again.weights == first.weights
    assert teachers(own_cache) == [kept]
    assert json.loads((kept / "kdcli.json").read_text())["version"] != "old"


@pytest.mark.parametrize(
    "damage",
    ["no note", "half a note", "no weights", "half the weights", "no configuration", "no tokenizer", "strange weights"],
)
def test_a_torn_teacher_is_made_again(folder: Path, own_cache: Path, damage: str):
    first = make(folder)
    [kept] = teachers(own_cache)
    weights = kept / "model.safetensors"
    if damage == "no note":
        (kept / "kdcli.json").unlink()
    elif damage == "half a note":
        (kept / "kdcli.json").write_text('{"identity": ')
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "no configuration":
        (kept / "config.json").unlink()
    elif damage == "no tokenizer":
        (kept / "tokenizer.json").unlink()
    else:
        shutil.copy(keep(folder / "wide", tiny("bert", hidden=16).base_model) / "model.safetensors", weights)
    again = make(folder)
    assert not again.reused and again.weights == first.weights
    assert teachers(own_cache) == [kept]
    assert make(folder).reused


def test_a_cache_that_cannot_be_written_does_not_lose_the_teacher(folder: Path, own_cache: Path):
    expected = make(folder)
    shutil.rmtree(own_cache / "teachers")
    (own_cache / "teachers").write_text("in the way")
    made = make(folder)
    assert made.weights == expected.weights and made.teacher.path is None
    assert "cannot" in made.said
    assert torch.equal(made.logits(), expected.logits())


def test_a_stopped_fine_tuning_goes_on_to_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of(teacher={"finetune": {"epochs": 2.0, "batch_size": 8, "learning_rate": 1e-3}})
    whole = make(folder, recipe)
    assert whole.teacher.training["steps"] == 6

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 3)
        make(folder, recipe, refresh=True)
    assert [path.name for path in (folder / "work").iterdir()] == ["checkpoint-3"]
    resumed = make(folder, recipe, refresh=True, resume=True)
    assert resumed.weights == whole.weights
    assert resumed.teacher.training["steps"] == 6


def classifier(folder: Path, *names: str, seed: int = 0, name: str = "tuned") -> PreTrainedModel:
    model = tiny("bert", layers=1, seed=seed, labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {label: number for number, label in enumerate(names)}
    keep(folder / name, model)
    return model


def test_classes_in_another_order_are_put_in_the_tasks_by_their_names(tmp_path: Path, own_cache: Path):
    model = classifier(tmp_path, "POSITIVE", "Negative")
    made = make(tmp_path, recipe_of(teacher={"model": "tuned", "finetune": None}))
    with torch.no_grad():
        before = model(PROBE).logits
    torch.testing.assert_close(made.logits(), before[:, [1, 0]], rtol=0, atol=1e-6)
    assert made.teacher.model.config.id2label == {0: "negative", 1: "positive"}
    assert made.teacher.model.config.label2id == {"negative": 0, "positive": 1}
    assert made.teacher.path == tmp_path / "tuned" and not teachers(own_cache)
    assert torch.equal(load_model(tmp_path / "tuned").classifier.weight, model.classifier.weight)


def test_labels_name_the_classes_of_a_model_that_does_not(tmp_path: Path):
    model = classifier(tmp_path, "LABEL_0", "LABEL_1")
    with torch.no_grad():
        before = model(PROBE).logits
    silent = make(tmp_path, recipe_of(teacher={"model": "tuned", "finetune": None}))
    named = make(tmp_path, recipe_of(teacher={"model": "tuned", "finetune": None, "labels": ["positive", "negative"]}))
    torch.testing.assert_close(silent.logits(), before)
    torch.testing.assert_close(named.logits(), before[:, [1, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["negative"], "1 name, but the model has 2 classes"), (["good", "bad"], "are not the task's labels")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[str], words: str):
    classifier(tmp_path, "LABEL_0", "LABEL_1")
    with pytest.raises(InputError, match=words) as caught:
        make(tmp_path, recipe_of(teacher={"model": "tuned", "finetune": None, "labels": labels}))
    assert caught.value.where == "teacher.labels"


@pytest.mark.parametrize("kind", ["classification", "text"])
def test_a_model_without_the_head_may_not_go_untrained(folder: Path, kind: str):
    (folder / "words.txt").write_text("\n\n".join(reviews()["train"]["text"][:60]))
    task = {"type": "text", "data": "words.txt", "validation_samples": None} if kind == "text" else {}
    recipe = recipe_of(task=task, teacher={"finetune": False})
    with pytest.raises(InputError, match=r"no trained head for .*, and teacher\.finetune = false") as caught:
        make(folder, recipe, head="masked-lm" if kind == "text" else CLASSIFIER)
    assert caught.value.where == "teacher.model"
    assert ("masked tokens" if kind == "text" else "classifying texts") in caught.value.message


def test_a_black_box_lends_the_students_start_and_is_not_trained(tmp_path: Path, own_cache: Path):
    keep(tmp_path / "base", body())
    recipe = recipe_of(
        teacher={"model": None, "finetune": None, "black_box": True}, student={"form": "checkpoint", "model": "base"}
    )
    made = make(tmp_path, recipe)
    assert not made.teacher.known and made.teacher.path is None
    assert torch.equal(made.teacher.model.bert.pooler.dense.weight, body().pooler.dense.weight)
    assert made.said == "" and not teachers(own_cache)


def text_recipe(folder: Path, **task: Any) -> Recipe:
    (folder / "words.txt").write_text("\n\n".join(reviews()["train"]["text"][:60]))
    changes = {"type": "text", "data": "words.txt", "train_samples": None, "validation_samples": None, **task}
    return recipe_of(task=changes)


def test_how_tokens_are_masked_is_in_the_name_of_a_language_model(folder: Path, own_cache: Path):
    first = make(folder, text_recipe(folder), head="masked-lm")
    assert isinstance(first.teacher.model, BertForMaskedLM)
    again = make(folder, text_recipe(folder), head="masked-lm")
    assert again.reused and torch.equal(again.logits(), first.logits())
    for change in ({"mask_probability": 0.3}, {"mask_smoothing": 0.7}):
        other = make(folder, text_recipe(folder, **change), head="masked-lm")
        assert not other.reused and other.weights != first.weights
    assert len(teachers(own_cache)) == 3


def test_a_body_is_taken_as_it_is_where_no_predictions_are_compared(folder: Path, own_cache: Path):
    recipe = text_recipe(folder).model_copy(update={"teacher": recipe_of(teacher={"finetune": None}).teacher})
    made = make(folder, recipe, head="base")
    assert type(made.teacher.model) is BertModel and made.weights == hash_of_weights(body())
    assert made.said == "" and not teachers(own_cache)


def test_a_teacher_at_chance_is_told_loudly_and_a_good_one_is_not(folder: Path):
    texts = [f"{word} {filler}" for filler in reviews()["train"]["text"][:20] for word in ("gripping", "dull")]
    rows = "\n".join(f'"{text}",{label}' for text, label in zip(texts, ["good", "bad"] * 20, strict=True))
    (folder / "rows.csv").write_text(f"text,label\n{rows}\n")
    path = folder / "own.toml"

    own = {"name": "own", "data": "rows.csv", "text": "text", "validation_fraction": 0.4}
    chance = tiny_recipe("task", "teacher", task=own, train={"max_steps": 1})

    def distil(name: str, model: str, **tuned: Any) -> tuple[str, float, Any]:
        write_recipe(path, changed(chance, teacher={"model": model, **tuned}))
        said = io.StringIO()
        console = Console(file=said, width=300)
        run = run_recipe(path, f"name={name}", console=console)
        return said.getvalue(), run["teacher"]["score"], run["teacher_training"]

    said, score, training = distil("good", "base", finetune={"epochs": 20.0, "batch_size": 8, "learning_rate": 3e-3})
    assert len([entry for entry in training["history"] if "task" in entry]) >= 20
    assert curve(folder / "runs" / "good" / "log" / "teacher")["train/task"]
    assert score > 0.9 and "WARNING" not in said
    [kept] = (Path(os.environ["KDCLI_CACHE"]) / "teachers").iterdir()
    # The same model with its classes named the wrong way round is as wrong as it was right.
    swapped = Path(shutil.copytree(kept, folder / "turned"))
    config = json.loads((swapped / "config.json").read_text())
    config |= {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (swapped / "config.json").write_text(json.dumps(config))
    said, wrong, training = distil("swapped", str(swapped))
    assert training is None
    assert wrong == pytest.approx(1 - score)
    assert "WARNING" in said and "no better than chance (0.5000)" in said and "id2label" in said
