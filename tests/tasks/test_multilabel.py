"""Several labels a text: how they are written, what is learnt from them, which are answered, and how that is scored."""

import json
import tomllib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from families import tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    precision_recall_curve,
)
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.evaluation.score import evaluate_model
from kdcli.methods import registry as methods
from kdcli.models.classes import class_names_of
from kdcli.models.save import save_model
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Owner, Task
from kdcli.tasks.heads import load_model
from kdcli.tasks.load import load_rows, load_task
from kdcli.tasks.multilabel import KIND, THRESHOLDS, Answers, best_threshold, thresholds

NAMES = ["anger", "joy", "fear"]
LABELS = [["joy"], [], ["anger", "fear"], ["joy", "fear"], ["fear"], ["anger"]]
TABLE = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]]
TEXTS = [f"text {number}" for number in range(len(LABELS))]
WORDS = tokenizer()


def lines(path: Path, labels: list, **columns: list) -> str:
    """Write rows as JSON lines, and return the file's name."""
    table: dict[str, list] = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, **columns}
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def load(base: Path, file: str, **fields: Any) -> Task:
    section = TaskSection(name="own", train=file, validation=file, **{"text": "text", **fields})  # type: ignore[arg-type]
    return load_task(section, EvaluateSection(), base=base)


def table_of(task: Task) -> list[list[float]]:
    """Return the labels of all rows by their text; training rows that are set aside are among the selection's."""
    rows = dict(zip(task.selection["text"], task.selection["label"], strict=True))
    return [rows[text] for text in TEXTS]


# How labels are written


def test_every_way_to_write_labels_says_the_same(tmp_path: Path):
    numbers = [[NAMES.index(name) for name in row] for row in LABELS]
    flags = {name: [row[i] for row in TABLE] for i, name in enumerate(NAMES)}
    cells = ["|".join(row) for row in LABELS]
    columns = "".join(f"{text},{','.join(map(str, row))}\n" for text, row in zip(TEXTS, TABLE, strict=True))
    (tmp_path / "flags.csv").write_text(f"text,{','.join(NAMES)}\n{columns}")
    rows = "".join(f"{text},{cell}\n" for text, cell in zip(TEXTS, cells, strict=True))
    (tmp_path / "cells.csv").write_text(f"text,label\n{rows}")
    ways: list[tuple[str, dict[str, Any]]] = [
        (lines(tmp_path / "lists.jsonl", LABELS), {"labels": NAMES}),
        (lines(tmp_path / "numbers.jsonl", numbers), {"labels": NAMES}),
        (lines(tmp_path / "none.jsonl", [row or None for row in LABELS]), {"labels": NAMES}),
        (lines(tmp_path / "flags.jsonl", [0] * 6, **flags), {"label": NAMES, "type": "multi-label"}),
        ("flags.csv", {"label": NAMES, "type": "multi-label"}),
        ("cells.csv", {"labels": NAMES, "label_separator": "|", "type": "multi-label"}),
    ]
    tasks = [load(tmp_path, file, **fields) for file, fields in ways]
    for task in tasks:
        assert task.kind is KIND and task.label_names == tuple(NAMES) and table_of(task) == TABLE
        assert task.metrics == ("f1_micro", "f1_macro", "exact_match")
    assert len({task.description["fingerprint"] for task in tasks}) == 1
    assert load(tmp_path, "lists.jsonl").label_names == ("anger", "fear", "joy")


def test_rows_that_are_scored_may_all_be_without_a_label(tmp_path: Path):
    files = {"train": lines(tmp_path / "train.jsonl", LABELS), "validation": lines(tmp_path / "held.jsonl", [[]] * 6)}
    section = TaskSection(name="own", text="text", labels=NAMES, type="multi-label", **files)  # type: ignore[call-arg]
    assert load_task(section, EvaluateSection(), base=tmp_path).selection["label"][:] == [[0, 0, 0]] * 6


def test_names_of_a_set_of_the_hub_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=NAMES))})
    for split, labels in (("train", [[1], [], [0, 2]] * 10), ("validation", [[2]] * 5), ("test", [[]] * 5)):
        rows = Dataset.from_dict({"text": [f"{i}" for i in range(len(labels))], "label": labels}, features)
        rows.to_parquet(tmp_path / "set" / f"{split}.parquet")
    section = TaskSection(name="own", hub="set", text="text", labels=NAMES)  # type: ignore[call-arg]
    monkeypatch.chdir(tmp_path)
    task = load_task(section, EvaluateSection(), base=tmp_path)
    # No row of the test split has a label: it is one without answers.
    assert list(task.report) == ["validation"] and task.selection["label"][:] == [[0, 0, 1]] * 5


@pytest.mark.parametrize(
    ("labels", "fields", "words"),
    [
        (["a", "b"] * 3, {"type": "multi-label"}, r"the labels of row 1 are 'a', not a list"),
        ([["a"], ["b", ["c"]]] * 3, {}, r"row 2 has \['c'\] among its labels"),
        ([["a"], ["b", True]] * 3, {}, "row 2 has True among its labels"),
        ([["a"], ["b", " b"]] * 3, {}, "row 2 has the label 'b' twice"),
        (
            ["['a', 'b']", "['a']"] * 3,
            {"label_separator": ",", "type": "multi-label"},
            "row 1 are the text .*, not a list",
        ),
        ([[0], [1, 2]] * 3, {"labels": ["a", "b"]}, "row 2 has the label '2', which is not in task.labels"),
        ([["a"], [], ["b", "c"]] * 3, {"labels": ["a", "b"]}, r"row 3 has the label 'c', which is not in task.labels"),
        ([[]] * 6, {"type": "multi-label"}, "no row has a label"),
        ([["a"], []] * 3, {}, "one class only"),
        ([0] * 6, {"type": "multi-label", "label": ["text", "label"]}, "row 1 has 'text 0' in 'text', not 0 or 1"),
    ],
)
def test_what_is_no_label_is_told_with_its_row(labels: list, fields: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(InputError, match=words):
        load(tmp_path, lines(tmp_path / "rows.jsonl", labels), **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": ["a", "b"], "labels": ["a", "b"]}, "leaves no place for labels"),
        ({"label": ["a"]}, "two or more columns"),
        ({"label": ["a", "b"], "type": "classification"}, 'hint: type = "multi-label" takes it'),
        ({"label": ["a", "a"]}, "two or more columns, each once"),
    ],
)
def test_fields_that_say_two_things_are_refused(fields: dict[str, Any], words: str, tmp_path: Path, capsys: Any):
    task = {"name": "own", "data": "rows.csv", "text": "text", "type": "multi-label", **fields}
    path = write_recipe(tmp_path / "recipe.toml", changed(tiny_recipe("task"), task=task))
    assert run(["distill", str(path), "--dry-run"]) == 2 and words in capsys.readouterr().err


# What is answered


def answers_of(probabilities: np.ndarray, chosen: np.ndarray) -> Answers:
    return Answers(probabilities, chosen)


def rows_of(truth: np.ndarray) -> Dataset:
    return Dataset.from_dict({"label": truth.astype(float).tolist()})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 5))
def test_scores_are_those_of_scikit_learn(seed: int, rows: int, labels: int):
    random = np.random.default_rng(seed)
    truth, chosen = random.random((2, rows, labels)) < 0.4
    probabilities = random.random((rows, labels))
    found = KIND.score(answers_of(probabilities, chosen), rows_of(truth), [""] * labels, KIND.metrics)
    hits, wrong, missed = (chosen & truth).sum(), (chosen & ~truth).sum(), (~chosen & truth).sum()
    assert found["f1_micro"] == pytest.approx(2 * hits / max(2 * hits + wrong + missed, 1))
    assert found["f1_macro"] == pytest.approx(f1_score(truth, chosen, average="macro", zero_division=0))
    assert found["exact_match"] == pytest.approx(accuracy_score(truth, chosen))
    assert found["lrap"] == pytest.approx(label_ranking_average_precision_score(truth, probabilities))
    # The share of pairs of a row with the label and one without it that stand in the right order.
    ranked = zip(truth.T, probabilities.T, strict=True)
    areas = [np.mean(p[y][:, None] > p[~y]) for y, p in ranked if y.any() and not y.all()]
    assert found["auroc_macro"] == pytest.approx(np.mean(areas) if areas else 0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 4))
def test_no_threshold_has_a_better_f1(seed: int, rows: int, steps: int):
    random = np.random.default_rng(seed)
    # Coarse steps: many probabilities are equal.
    probabilities, truth = np.round(random.random(rows), steps % 2 + 1), random.random(rows) < 0.4
    if not truth.any():
        truth[0] = True
    threshold = best_threshold(probabilities, truth)
    precision, recall, _ = precision_recall_curve(truth, probabilities)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert f1_score(truth, probabilities >= threshold) == pytest.approx(best)
    assert threshold not in probabilities or threshold in (0.0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_thresholds_of_the_labels_are_no_worse_than_one_for_all(seed: int):
    random = np.random.default_rng(seed)
    truth = random.random((200, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.0]
    truth[:3, 5] = True
    # Each label is confident in another way.
    probabilities = np.clip(0.3 * truth + 0.4 * random.random(truth.shape), 0, 1) ** [0.5, 1, 2, 3, 1, 1]
    own, common = thresholds(probabilities, truth), best_threshold(probabilities.ravel(), truth.ravel())
    scores = [f1_score(truth, probabilities >= at, average="micro") for at in (own, common, 0.5)]
    assert scores[0] > scores[1] > scores[2]
    # Three rows are too few for a threshold of its own.
    assert own[5] == common and all(threshold != common for threshold in own[:4])


def test_chance_is_the_best_of_all_answers_that_are_the_same_everywhere():
    truth = np.random.default_rng(0).random((40, 4)) < [0.6, 0.3, 0.2, 0.1]
    every = [np.array([bool(number & 1 << i) for i in range(4)]) for number in range(16)]
    for metric in ("f1_micro", "exact_match", "f1_macro"):
        same = (answers_of(np.tile(truth.mean(0), (40, 1)), np.tile(chosen, (40, 1))) for chosen in every)
        best = max(KIND.score(answer, rows_of(truth), NAMES, [metric])[metric] for answer in same)
        assert KIND.chance([rows_of(truth)], NAMES, metric) <= best + 1e-12
        assert metric == "exact_match" or KIND.chance([rows_of(truth)], NAMES, metric) == pytest.approx(best)


def test_a_model_is_put_into_the_order_of_the_task_with_its_thresholds():
    model = tiny(
        "bert", labels=3, id2label={0: "Fear", 1: "anger", 2: "joy"}, problem_type="multi_label_classification"
    )
    setattr(model.config, THRESHOLDS, [0.1, 0.2, 0.3])
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = KIND.align(model, NAMES, Owner())(ids).logits
    torch.testing.assert_close(after, before[:, [1, 2, 0]])
    assert getattr(model.config, THRESHOLDS) == [0.2, 0.3, 0.1]


def test_classifiers_of_one_label_are_refused_and_one_that_does_not_say_is_told():
    settings: dict[str, Any] = {"labels": 3, "id2label": dict(enumerate(NAMES))}
    with pytest.raises(InputError, match="is a single-label classifier, and the task needs a multi-label classifier"):
        KIND.align(tiny("bert", problem_type="single_label_classification", **settings), NAMES, Owner())
    owner = Owner()
    KIND.align(tiny("bert", **settings), NAMES, owner)
    assert "taken as a multi-label classifier" in owner.notes[0]


# From a recipe to a score

MOODS = {"fine": "joy", "awful": "anger", "dark": "fear"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows whose words say their labels, and a run on them."""
    folder = tmp_path_factory.mktemp("moods")
    random = np.random.default_rng(0)
    for name, size in (("train", 240), ("held", 60), ("test", 40)):
        picked = [[word for word in MOODS if random.random() < 0.4] for _ in range(size)]
        texts = [" ".join(["the film was", *random.permutation([*words, "and", "so"])]) for words in picked]
        lines(folder / f"{name}.jsonl", [[MOODS[word] for word in words] for words in picked], text=texts)
    recipe = tiny_recipe(
        "task",
        task={"name": "moods", "text": "text", "train": "train.jsonl", "validation": "held.jsonl", "test": "test.jsonl",
              "max_length": 16},
        teacher={"finetune": {"max_steps": 120, "learning_rate": 1e-2}},
        train={"max_steps": 60, "learning_rate": 1e-2, "eval_every": 30},
    )  # fmt: skip
    document = run_recipe(write_recipe(folder / "recipe.toml", recipe))
    (folder / "run.json").write_text(json.dumps(document))
    return folder


def record(world: Path) -> dict[str, Any]:
    return json.loads((world / "run.json").read_text())


def task_of(world: Path, **changes: Any) -> Task:
    files = {"train": "train.jsonl", "validation": "held.jsonl", "test": "test.jsonl"}
    section = TaskSection(name="moods", text="text", max_length=16, **{**files, **changes})  # type: ignore[call-arg]
    return load_task(section, EvaluateSection(), base=world)


def test_a_student_learns_several_labels_and_keeps_its_thresholds(world: Path):
    run_of, student = record(world), load_model(world / "runs" / "recipe" / "student")
    assert run_of["task"]["kind"] == "multi-label" and run_of["primary"] == "f1_micro"
    assert run_of["task"]["sizes"] == {"train": 216, "calibration": 24, "selection": 60, "report-test": 40}
    assert min(run_of[side]["score"] for side in ("teacher", "student")) > 0.75
    assert student.config.problem_type == "multi_label_classification"
    assert list(student.config.id2label.values()) == ["anger", "fear", "joy"]
    assert len(getattr(student.config, THRESHOLDS)) == 3
    teacher = load_model(run_of["teacher_path"])
    assert getattr(teacher.config, THRESHOLDS) != getattr(student.config, THRESHOLDS)


def test_thresholds_come_from_training_rows_that_nothing_else_sees(world: Path):
    task, student = task_of(world), load_model(world / "runs" / "recipe" / "student")
    assert task.calibration is not None
    own, rows = getattr(student.config, THRESHOLDS), Path(world / "train.jsonl").read_text().splitlines()
    apart = [*task.train["text"], *task.calibration["text"]]
    assert sorted(apart) == sorted(json.loads(row)["text"] for row in rows)
    found = KIND.calibrate(student, task.calibration, load_words(world), max_length=16, ask=ask)
    assert found == {THRESHOLDS: pytest.approx(own)}


def test_a_teacher_that_is_used_as_it_is_gets_thresholds_like_its_student(world: Path, tmp_path: Path, capsys: Any):
    own, words = record(world), load_words(world)
    teacher = load_model(own["teacher_path"])
    thresholds = getattr(teacher.config, THRESHOLDS)
    delattr(teacher.config, THRESHOLDS)
    (tmp_path / "teacher").mkdir()
    save_model(teacher, tmp_path / "teacher", words)
    files = {
        name: str(world / f"{file}.jsonl")
        for name, file in (("train", "train"), ("validation", "held"), ("test", "test"))
    }
    recipe = tiny_recipe(
        *("task", "teacher"),
        task={"name": "moods", "text": "text", "max_length": 16, **files},
        teacher={"model": "teacher"},
        train={"max_steps": 1},
    )
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    assert document["teacher_settings"] == {THRESHOLDS: pytest.approx(thresholds)}
    assert document["teacher"]["metrics"] == own["teacher"]["metrics"]
    assert THRESHOLDS not in (tmp_path / "teacher" / "config.json").read_text()
    capsys.readouterr()
    for more in ([], ["--data", files["test"], "--text", "text"]):
        assert run(["eval", str(tmp_path / "runs" / "recipe"), *more, "--fail-under-retention", "0.01", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["retention"] == pytest.approx(document["retention"])


def load_words(world: Path) -> Any:
    from kdcli.models.load import load_tokenizer

    return load_tokenizer(world / "runs" / "recipe" / "student")


def ask(*arguments: Any, **options: Any) -> Any:
    from kdcli.tasks.predict import predict

    return predict(*arguments, **options)


def test_eval_scores_what_the_run_scored_and_a_model_without_thresholds_by_one_half(world: Path, capsys: Any):
    student, expected = world / "runs" / "recipe" / "student", record(world)["student"]["metrics"]["test"]
    assert run(["eval", str(world / "runs" / "recipe"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["test"] == pytest.approx(expected)
    data = ["--data", str(world / "test.jsonl"), "--text", "text", "--json"]
    assert run(["eval", str(student), *data]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["rows"] == pytest.approx(expected)
    model, task = load_model(student), task_of(world)
    delattr(model.config, THRESHOLDS)
    [features] = [KIND.encode(rows, load_words(world), 16) for rows in task.report.values()]
    logits = ask(model, features, KIND.collator(load_words(world)))["logits"]
    chosen, truth = logits > 0, np.array(task.report["test"]["label"]) > 0.5
    found = evaluate_model(model, load_words(world), task, max_length=16)["test"]
    assert found["f1_micro"] == pytest.approx(f1_score(truth, chosen, average="micro"))
    # Ranks need no thresholds.
    assert average_precision_score(truth, logits, average="micro") > 0.8


@pytest.mark.slow
def test_the_exported_graph_answers_by_the_same_thresholds(world: Path, capsys: Any):
    run_folder = str(world / "runs" / "recipe")
    assert run(["export", run_folder, "--no-latency", "--out", str(world / "served")]) == 0
    capsys.readouterr()
    assert run(["eval", str(world / "served"), "--data", str(world / "test.jsonl"), "--text", "text", "--json"]) == 0
    expected = record(world)["student"]["metrics"]["test"]
    assert json.loads(capsys.readouterr().out)["metrics"]["rows"] == pytest.approx(expected)


def test_rows_for_a_finished_model_have_its_labels_in_its_order(tmp_path: Path):
    file = lines(tmp_path / "rows.jsonl", LABELS)
    model = tiny("bert", labels=3, id2label=dict(enumerate(["Joy", "fear", "anger"])))
    section = TaskSection(name="rows", data=str(tmp_path / file), text="text")  # type: ignore[call-arg]
    task = load_rows(section, KIND, model.config)
    assert task.label_names == ("Joy", "fear", "anger") and task.calibration is None
    assert task.report["rows"]["label"][:] == [[row[1], row[2], row[0]] for row in TABLE]
    flags = lines(
        tmp_path / "flags.jsonl", [0] * 6, **{name: [row[i] for row in TABLE] for i, name in enumerate(NAMES)}
    )
    section = TaskSection(name="rows", data=str(tmp_path / flags), text="text", label=NAMES)  # type: ignore[call-arg]
    assert load_rows(section, KIND, model.config).report["rows"]["label"][:] == task.report["rows"]["label"][:]


def test_methods_that_need_one_class_are_refused_with_the_reason(world: Path, capsys: Any):
    assert run(["distill", str(world / "recipe.toml"), "--dry-run", "--set", "method=dbkd"]) == 2
    assert "it needs one class out of several; moods is a multi-label task" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in methods.names() if methods.get(name).needs <= KIND.provides])
def test_every_method_that_needs_no_more_distils_several_labels(method: str, world: Path, tmp_path: Path):
    (tmp_path / "teacher").mkdir()
    model = tiny("bert", layers=2, labels=3, id2label={0: "joy", 1: "fear", 2: "anger"})
    model.config.problem_type = "multi_label_classification"
    save_model(model, tmp_path / "teacher", WORDS)
    recipe = tiny_recipe(
        *("task", "teacher", "student"),
        method=method,
        task={"name": "moods", "text": "text", "train": str(world / "train.jsonl"), "max_length": 16},
        teacher={"model": "teacher"},
        train={"max_steps": 1},
    )  # fmt: skip
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    assert set(document["student"]["metrics"]["validation"]) == {"f1_micro", "f1_macro", "exact_match"}


def test_half_of_the_validation_rows_is_reported_and_other_rows_choose_thresholds(world: Path):
    section = TaskSection(name="moods", text="text", train="train.jsonl", validation="held.jsonl")  # type: ignore[call-arg]
    task = load_task(section, EvaluateSection(protocol="half-dev"), base=world)
    assert task.calibration is not None and len(task.calibration) == 24
    assert (len(task.selection), len(task.report["validation"])) == (30, 30)


@pytest.mark.parametrize(
    ("labels", "problem", "words"),
    [
        (["joy", "anger", "sorrow"], "multi", "other (joy, anger, sorrow) are not the task's labels"),
        (NAMES, "single", "other is a single-label classifier, and the task needs a multi-label classifier"),
        (None, "multi", "not enough for kd as it is set up"),
    ],
)
def test_students_and_teachers_that_do_not_fit_are_refused(
    labels: list[str] | None, problem: str, words: str, world: Path, tmp_path: Path, capsys: Any
):
    models = {"teacher": (NAMES, "multi"), "other": (labels or NAMES, problem)}
    for name, (names, kind) in models.items():
        (tmp_path / name).mkdir()
        settings: Any = {"id2label": dict(enumerate(names)), "problem_type": f"{kind}_label_classification"}
        save_model(tiny("bert", labels=3, **settings), tmp_path / name, WORDS)
    files = {"train": str(world / "train.jsonl"), "validation": str(world / "held.jsonl")}
    recipe = tiny_recipe(
        *("task", "teacher", "student"),
        task={"name": "moods", "text": "text", **files},
        teacher={"model": "teacher"} if labels else {"black_box": True},
        student={"form": "checkpoint", "model": "other"},
    )
    assert run(["distill", str(write_recipe(tmp_path / "recipe.toml", recipe)), "--dry-run"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_copies_keep_their_labels_and_variants_are_compared(world: Path, tmp_path: Path, capsys: Any):
    recipe = tomllib.loads((world / "recipe.toml").read_text())
    files = {name: str(world / recipe["task"][name]) for name in ("train", "validation", "test")}
    (tmp_path / "words.txt").write_text("the film was fine and so dark .\n\nthe film was awful and so fine .\n" * 20)
    augment = {"model": record(world)["teacher_path"], "text": "words.txt", "finetune": {"max_steps": 2}, "copies": 2}
    changes = {"task": {**files, "augment": augment}, "train": {"max_steps": 2}}
    write_recipe(tmp_path / "recipe.toml", changed(recipe, **changes))
    document = run_recipe(tmp_path / "recipe.toml")
    assert document["task"]["augment"]["added"] > 100
    assert len(document["teacher_settings"] or getattr(load_model(document["teacher_path"]).config, THRESHOLDS)) == 3
    compared = ["compare", str(tmp_path / "recipe.toml"), "--seeds", "1", "--variant", "method.alpha=0.9", "--json"]
    assert run([*compared, "--output", str(tmp_path / "compared")]) == 0
    [task] = json.loads(capsys.readouterr().out)["tasks"]
    assert task["metric"] == "f1_micro" and [len(row["scores"]) for row in task["rows"]] == [1, 1]


@pytest.mark.slow
@pytest.mark.data
def test_emotions_of_real_texts(data_dir: Path, encoder: Path, tmp_path: Path, capsys: Any):
    folder = data_dir / "go_emotions"
    names = json.loads((folder / "labels.json").read_text())
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    sizes = {"train_samples": 800, "validation_samples": 60, "test_samples": 200, "max_length": 32}
    recipe = tiny_recipe(
        *("task", "teacher"),
        task={"name": "emotions", **files, "text": "text", "label": "labels", "labels": names, **sizes},
        teacher={"model": str(encoder), "finetune": {"max_steps": 4, "learning_rate": 1e-4}},
        train={"max_steps": 2},
    )
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    assert document["task"]["kind"] == "multi-label" and document["task"]["labels"] == names
    assert document["task"]["sizes"] == {"train": 720, "calibration": 80, "selection": 60, "report-test": 200}
    student = load_model(tmp_path / "runs" / "recipe" / "student")
    assert class_names_of(student.config) == names and len(getattr(student.config, THRESHOLDS)) == 28
    assert run(["eval", str(tmp_path / "runs" / "recipe"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == document["student"]["metrics"]
