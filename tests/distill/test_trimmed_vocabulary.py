"""`[student.vocabulary]`: all that follows the teacher has fewer pieces, and learns what it would have learnt."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import FOLDER, changed, run_recipe, tiny_recipe, write_recipe
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from kdcli.data.reviews import LABELS, reviews
from kdcli.distill import run as pipeline
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.tasks.base import Task
from kdcli.tasks.heads import load_model
from kdcli.tasks.load import load_task
from kdcli.training.trainer import DistillationTrainer

BASE = tiny_recipe(
    "teacher",
    teacher=FOLDER,
    task={"max_length": 24, "train_samples": 16},
    student={"vocabulary": {}},
    train={"max_steps": 1},
)
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
PIECES = 190
"""Of the teachers' tokenizer."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a teacher of 220 rows, one with a masked language model, and a headless model."""
    masked = AutoModelForMaskedLM.from_config(tiny("bert", layers=3).config).eval()
    for name, model in (
        ("teacher", tiny("bert", layers=3, **NAMES)),
        ("masked", masked),
        ("headless", tiny("bert", layers=2).base_model),
    ):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name, tokenizer())
    return tmp_path


def plan_of(path: Path, *overrides: str) -> Any:
    return make_plan(prepare(load_recipe(path, list(overrides)), path))


def task_of(path: Path) -> Task:
    recipe = load_recipe(path, [])
    return load_task(recipe.task, recipe.evaluate, base=path.parent)


@pytest.mark.slow
def test_a_student_of_the_pieces_of_its_training_text(folder: Path):
    path = write_recipe(folder / "recipe.toml", changed(BASE, export={"onnx": True}))
    record = run_recipe(path)
    student = Path(record["paths"]["student"])
    words, full = AutoTokenizer.from_pretrained(student), AutoTokenizer.from_pretrained(folder / "teacher")
    assert len(full) == PIECES and len(words) == record["vocabulary"]["pieces"][1] < PIECES
    # Both cut every training text alike, by the library alone.
    task = task_of(path)
    for text in task.kind.texts(task.train):
        assert words.convert_ids_to_tokens(words(text)["input_ids"]) == full.convert_ids_to_tokens(
            full(text)["input_ids"]
        )
    model = AutoModelForSequenceClassification.from_pretrained(student)
    assert model.config.vocab_size == len(words) == model.get_input_embeddings().num_embeddings
    # Its score is that of what was written, read by its own tokenizer; the graph gives the same.
    right = 0
    for row in task.report["validation"]:
        with torch.inference_mode():
            found = model(**words(row["text"], truncation=True, max_length=24, return_tensors="pt")).logits
        right += int(found.argmax()) == row["label"]
    assert record["student"]["metrics"]["validation"]["accuracy"] == right / len(task.report["validation"])
    assert record["export"]["parity"]["max_abs_difference"] <= 1e-4
    assert len(AutoTokenizer.from_pretrained(record["paths"]["onnx"])) == len(words)
    # The teacher is scored with all its pieces, and counted with all its rows.
    plain = run_recipe(write_recipe(folder / "plain.toml", changed(BASE, student={"vocabulary": None})))
    assert plain["teacher"] == record["teacher"] and plain["hashes"]["teacher"] == record["hashes"]["teacher"]
    assert plain["student"]["parameters"] - record["student"]["parameters"] == 32 * (220 - len(words))
    plan = plan_of(path)
    assert plan.student.parameters == record["student"]["parameters"]
    assert plan.vocabulary.pieces == (PIECES, len(words))
    assert plan.vocabulary.megabytes == (0.028, round(len(words) * 128 / 1e6, 3))
    assert any(note.startswith("vocabulary: ") and "pieces stay" in note for note in plan.task.notes)
    card = (student / "README.md").read_text()
    assert f"vocabulary: {len(words)} of the teacher's {PIECES} pieces" in card


def test_it_is_the_student_that_would_have_been_trimmed_at_the_end(folder: Path):
    # Rows that no text uses get no gradient: with no decay, they and all the others end as they would.
    still = {"max_steps": 6, "weight_decay": 0.0, "learning_rate": 1e-3}
    found = []
    for name, vocabulary in (("trimmed", {}), ("whole", None)):
        document = changed(BASE, student={"vocabulary": vocabulary}, train=still)
        record = run_recipe(write_recipe(folder / f"{name}.toml", document))
        found.append(load_file(Path(record["paths"]["student"]) / "model.safetensors"))
    full, words = tokenizer(), load_tokenizer(folder / "runs" / "trimmed" / "student")
    kept = [full.get_vocab()[piece] for piece in words.convert_ids_to_tokens(list(range(len(words))))]
    for name, tensor in found[0].items():
        other = found[1][name]
        other = other[kept] if tensor.shape != other.shape else other
        assert torch.allclose(tensor, other, atol=1e-5), name


TEXT = {"name": "corpus", "type": "text", "data": "text.txt", "max_length": 16}
OTHERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "factors of the embeddings": (
        [],
        {"student": {"form": "low-rank", "layers": None, "embedding_rank": 8, "ranks": "even"}},
    ),
    "energy": ([], {"student": {"form": "low-rank", "layers": None, "energy": 0.5}}),
    "chains": ([], {"overparam": {"length": 1}}),
    "projections": (
        [],
        {"student": {"form": "width", "hidden_size": 16, "init": "projections"}, "method": {"name": "hs"}},
    ),
    "assistant": ([], {"assistant": {"form": "depth", "layers": 2}}),
    "checkpoint": ([], {"student": {"form": "checkpoint", "model": "headless", "layers": None}}),
    "theseus": ([], {"method": {"name": "theseus"}, "train": {"max_steps": 2}}),
    "lgtm": ([], {"method": {"name": "lgtm"}}),
    "a teacher that is fine-tuned first": (
        [],
        {"teacher": {"model": "headless", "finetune": {"max_steps": 1}}, "method": {"name": "dbkd", "copies": 2}},
    ),
    "a teacher of answers": (
        ["teacher"],
        {
            "teacher": {"black_box": True},
            "method": {"name": "dbkd", "copies": 2, "black_box": {"callable": "decider:decide"}},
            "student": {"form": "checkpoint", "model": "headless", "layers": None},
        },
    ),
    "plain text, predicted": (
        ["task"],
        {
            "task": TEXT,
            "method": {"name": "distilbert"},
            "teacher": {"model": "masked", "finetune": None},
            "finetune": [
                {
                    "task": {"name": "reviews", "train_samples": 16, "validation_samples": 8},
                    "max_steps": 1,
                    "seeds": 1,
                    "against": ["teacher", "scratch"],
                }
            ],
        },
    ),
    "questions": (
        ["task"],
        {
            "task": {"name": "own", "type": "question-answering", "data": "questions.jsonl", "max_length": 32},
            "teacher": {"model": "headless", "finetune": {"max_steps": 1}},
        },
    ),
    "tags": (
        ["task"],
        {
            "task": {"name": "own", "type": "token-classification", "data": "tags.jsonl", "max_length": 16},
            "teacher": {"model": "headless", "finetune": {"max_steps": 1}},
        },
    ),
    "embeddings": (
        ["task"],
        {
            "task": {"name": "own", "type": "sentence-embedding", "data": "sentences.csv", "max_length": 16},
            "teacher": {"model": "headless", "finetune": None},
        },
    ),
    "parts": (
        ["task"],
        {
            "task": {
                "name": "own",
                "type": "text",
                "max_length": 16,
                "part": [{"name": "one", "data": "text.txt"}, {"name": "other", "data": "more.txt"}],
            },
            "method": {"name": "minilmv2"},
            "teacher": {"model": "headless", "finetune": None},
        },
    ),
    "plain text": (
        ["task"],
        {"task": TEXT, "method": {"name": "minilmv2"}, "teacher": {"model": "headless", "finetune": None}},
    ),
}


def write_rows(folder: Path) -> None:
    """Write files of questions, of tagged words and of sentences."""
    texts = reviews()["train"]["text"][:20]
    questions = [{"question": "what is it?", "context": text, "answer": text.split()[1]} for text in texts]
    questions = [row for row in questions if row["context"].count(row["answer"]) == 1]
    words = [{"words": text.split(), "tags": ["B-X", *["O"] * (len(text.split()) - 1)]} for text in texts]
    for name, rows in (("questions", questions), ("tags", words)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "sentences.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in texts), encoding="utf-8")


USUAL = ("factors of the embeddings", "checkpoint", "a teacher of answers", "plain text, predicted")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in OTHERS])
def test_every_form_and_method_works_with_fewer_pieces(name: str, folder: Path):
    (folder / "decider.py").write_text("def decide(texts):\n    return ['positive' for text in texts]\n")
    (folder / "text.txt").write_text("\n\n".join(reviews()["train"]["text"][:60]), encoding="utf-8")
    (folder / "more.txt").write_text("\n\n".join(reviews()["train"]["text"][60:90]), encoding="utf-8")
    write_rows(folder)
    without, changes = OTHERS[name]
    path = write_recipe(folder / "recipe.toml", changed(BASE, *without, **changes))
    plan = plan_of(path)
    record = run_recipe(path)
    student = Path(record["paths"]["student"])
    words = AutoTokenizer.from_pretrained(student)
    model = load_model(student)
    assert len(words) == model.config.vocab_size == record["vocabulary"]["pieces"][1] < PIECES
    assert plan.student.parameters == record["student"]["parameters"]
    if record.get("finetune"):
        tuned = folder / "runs" / "recipe" / "finetune" / "reviews"
        assert len(AutoTokenizer.from_pretrained(tuned)) == load_model(tuned).config.vocab_size == len(words)


def test_text_of_ones_own_chooses_the_pieces(folder: Path):
    (folder / "words.txt").write_text("a good film\nno bad film at all\n" * 20, encoding="utf-8")
    changes = {"student": {"vocabulary": {"text": ["words.txt"], "min_count": 2}}}
    path = write_recipe(folder / "recipe.toml", changed(BASE, **changes))
    prepared = prepare(load_recipe(path, []), path)
    assert {"film", "a"} <= set(prepared.processor.get_vocab()) < set(tokenizer().get_vocab())
    notes = " ".join(prepared.notes)
    assert "pieces stay, from 40 texts" in notes
    # What training loses of its own text is told.
    assert "of the task's training text, " in notes
    record = run_recipe(path)
    assert record["vocabulary"]["held_out"]["changed_words"] > 0
    # The recipe that a run keeps says where the file is.
    kept = load_recipe(Path(record["paths"]["run"]) / "recipe.toml", [])
    assert kept.student.vocabulary.text == [str(folder / "words.txt")]


def test_a_run_that_was_stopped_goes_on_with_the_same_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Stopped(Exception):
        pass

    def stop(*arguments: Any, **options: Any) -> None:
        raise Stopped

    path = write_recipe(folder / "recipe.toml", BASE)
    whole = run_recipe(path, output=folder / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pipeline, "score_student", stop)
        run_recipe(path, output=folder / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", stop)
        parts = run_recipe(path, output=folder / "parts", resume=True)
    assert parts["hashes"] == whole["hashes"] and parts["vocabulary"] == whole["vocabulary"]
    forced = run_recipe(path, output=folder / "parts", force=True)
    assert forced["hashes"] == whole["hashes"]


def test_rows_set_aside_for_thresholds_are_read_too(folder: Path):
    rows = [{"text": f"film {letter}", "tags": ["a"] if letter < "m" else ["b"]} for letter in "abcdefghijklmnopqrst"]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    task = {"name": "own", "type": "multi-label", "data": "rows.jsonl", "text": "text", "label": "tags"}
    (folder / "labels").mkdir()
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    save_model(tiny("bert", problem_type="multi_label_classification", **names), folder / "labels", tokenizer())
    document = changed(BASE, "task", task=task, teacher={"model": "labels"})
    path = write_recipe(folder / "recipe.toml", document)
    prepared = prepare(load_recipe(path, []), path)
    assert prepared.task.calibration is not None
    own = {text for part in (prepared.task.train, prepared.task.calibration) for text in part["text"]}
    words = prepared.processor
    assert all(words.tokenize(text) == tokenizer().tokenize(text) for text in own)
    assert prepared.trimming.texts == len(prepared.task.train) + len(prepared.task.calibration)


def test_copies_of_rows_are_told(folder: Path):
    output = StringIO()
    augment = {"augment": {"model": "masked", "copies": 1}}
    path = write_recipe(folder / "recipe.toml", changed(BASE, task=augment))
    run_recipe(path, console=Console(file=output, width=400))
    assert "vocabulary: of the training text with its copies, " in output.getvalue()


def test_pieces_that_the_teacher_lacks_are_refused(folder: Path):
    path = write_recipe(folder / "recipe.toml", BASE)
    with pytest.raises(InputError, match="fewer than the") as caught:
        prepare(load_recipe(path, ["student.vocabulary.keep=6"]), path)
    assert caught.value.where == "student.vocabulary.keep"
