"""Extractive question answering: rows, predictions, answers and thresholds, and the way from a recipe to a score."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from families import NAMES, tiny, tokenizer
from test_windows import ROWS, WORDS, rows_of
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe
from torch.nn import functional
from training.stages import Killed, kill_after

from kdcli.cli.app import run
from kdcli.data.columns import Column, Columns
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.export.export import export_model
from kdcli.models.heads import with_new_head
from kdcli.models.save import save_model
from kdcli.objectives.gold import gold_loss
from kdcli.objectives.output import output_loss
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.heads import kind_of_model, load_model
from kdcli.tasks.load import load_task
from kdcli.tasks.predict import predict
from kdcli.tasks.question_answering import KIND, THRESHOLD, QuestionAnswering, SpanFields
from kdcli.training.teacher_cache import known_outputs

# Rows

TEXT = "Ann met Tom in Rome. Tom lives in Rome with Eva."
FLAT = {"question": ["who?", "where?", "why?"], "context": [TEXT, TEXT, TEXT]}
HUB = [
    {"text": ["Ann", "Ann met Tom"], "answer_start": [0, 0]},
    {"text": ["Rome", "in Rome"], "answer_start": [34, 31]},
    {"text": [], "answer_start": []},
]


def read(fields: dict[str, Any] | None = None, *, train: bool = True, **columns: list[Any]) -> Any:
    given: Columns = {name: Column.of(values) for name, values in columns.items()}
    labels = None if train else ()
    return KIND.read(given, SpanFields(**fields or {}), "rows", notes := [], labels)[0].to_pydict() | {"notes": notes}


def test_the_hubs_columns_are_read_with_all_reference_answers():
    rows = read(**FLAT, answers=HUB, id=["a", "b", "c"], title=["t"] * 3)
    assert rows["label"] == [["Ann", "Ann met Tom"], ["Rome", "in Rome"], []] and rows["start"] == [0, 34, -1]
    assert set(rows) == {"question", "context", "label", "start", "notes"} and rows["notes"] == []


@pytest.mark.parametrize(
    "columns",
    [
        {"answer": ["Ann", "Rome", ""], "answer_start": ["0", "34", ""]},
        {"answer": ["Ann", "Rome", None], "answer_start": [0, 34.0, None]},
        {"answer": [["Ann"], ["Rome"], []], "answer_start": [[0], [34], []]},
        {"answers": [["Ann"], "Rome", None], "answer_start": [0, 34, None]},
        {"answers": [[{"text": "Ann", "answer_start": 0}], [{"text": "Rome", "answer_start": 34}], []]},
        {"answers": [{"text": "Ann", "answer_start": 0}, {"text": ["Rome"], "answer_start": [34]}, {"text": [""]}]},
        {"answer": [" Ann ", "Rome with", ""]},
    ],
)
def test_flat_columns_say_the_same(columns: dict[str, list[Any]]):
    rows = read(**FLAT, **columns)
    assert rows["start"] == [0, 34, -1] and rows["label"][0] == ["Ann"] and rows["label"][2] == []


def test_columns_may_have_other_names():
    columns = {"q": FLAT["question"], "text": FLAT["context"], "a": ["Ann", "Eva", ""], "at": [0, 44, None]}
    fields = {"question": "q", "context": "text", "answer": "a", "answer_start": "at"}
    assert read(fields, **columns)["start"] == [0, 44, -1]


WRONG: dict[str, tuple[dict[str, list[Any]], str, str]] = {
    "several times": ({"answer": ["Ann", "Rome", ""]}, "row 2: its answer 'Rome' is 2 times", "a column answer_start"),
    "not there": ({"answer": ["Ann", "Paris", ""]}, "row 2: its answer 'Paris' is not in its context", "letter for"),
    "other case": ({"answer": ["ann", "Eva", ""]}, "row 1: its answer 'ann' is not in", "there it is written 'Ann'"),
    "offset": (
        {"answer": ["Ann", "Rome", ""], "answer_start": [0, 16, None]},
        "'Rome' does not begin at 16: there stands 'ome.'",
        "it begins at 15, 34",
    ),
    "behind the end": (
        {"answer": ["Ann", "Eva", ""], "answer_start": [0, 999, None]},
        "the context has 48 characters",
        "it begins at 44",
    ),
    "second offset": (
        {"answers": [HUB[0], {"text": ["Rome", "Eva"], "answer_start": [34, 0]}, HUB[2]]},
        "row 2: its answer 'Eva' does not begin at 0: there stands 'Ann'",
        "it begins at 44",
    ),
    "no number": ({"answer": ["Ann", "Eva", ""], "answer_start": ["0", "x", ""]}, "row 2 has 'x' for the", "from 0"),
    "negative": ({"answer": ["Ann", "Eva", ""], "answer_start": [0, -3, None]}, "row 2 has -3 for the place", "from 0"),
    "part of a number": ({"answer": ["Ann", "Eva", ""], "answer_start": [0, 1.5, None]}, "row 2 has 1.5", "from 0"),
    "lengths": (
        {"answer": [["Ann", "Tom"], "Eva", ""], "answer_start": [[0], 44, None]},
        "row 1 has 2 answers and 1 place",
        "give one for each",
    ),
    "table as text": ({"answers": [str(HUB[0]), "Eva", ""]}, "row 1 has the text \"{'text'", "JSON lines or Parquet"),
    "without text": ({"answers": [{"span": [0, 3]}, *HUB[1:]]}, "row 1 has answers without text; it has", "{text"),
    "empty beside others": ({"answer": [["Ann", ""], "Eva", ""]}, "row 1 has an empty answer beside", "has none"),
    "a number's list": ({"answer": [[["Ann"]], "Eva", ""]}, "row 1 has an array for an answer", ""),
    "another answer": (
        {"answer": [["Ann", "Ann met Tim"], "Eva", ""]},
        "row 1: its answer 'Ann met Tim' is not in its context",
        "letter for",
    ),
    "no answer at all": ({"answer": ["", "", None]}, "no row has an answer", ""),
    "no column": ({"reply": ["Ann", "Eva", ""]}, "rows has no answer column 'answers'", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_answer_is_refused_with_its_row(name: str):
    columns, words, hint = WRONG[name]
    with pytest.raises(InputError) as caught:
        read(**FLAT, **columns)
    assert words in caught.value.message and hint in (caught.value.hint or "")
    assert caught.value.where in ("task.answer", "task.answer_start")


def test_rows_that_are_only_scored_need_no_place_of_their_answer():
    assert read(train=False, **FLAT, answer=["Ann", "Rome", ""])["label"] == [["Ann"], ["Rome"], []]
    for answer in ("Paris", ["Rome", "Paris"]):
        with pytest.raises(InputError, match="'Paris' is not in its context"):
            read(train=False, **FLAT, answer=["Ann", answer, ""])


def test_further_answers_may_stand_several_times():
    assert read(**FLAT, answer=["Ann", ["Eva", " Rome "], ""])["label"] == [["Ann"], ["Eva", "Rome"], []]


def test_white_space_around_answers_is_none_of_them():
    context, answer = "So it is\u00a0 New York\n in the end.", "\u00a0 New York\n "
    given = {"text": [answer, "New York"], "answer_start": [context.index(answer), context.index("New")]}
    rows = read(question=["where?"], context=[context], answers=[given])
    assert rows["label"] == [["New York", "New York"]] and rows["start"] == [context.index("New")]


def test_rows_without_a_context_are_refused_and_those_without_a_question_told():
    with pytest.raises(InputError, match="1 row without a context, the first is row 2"):
        read(question=FLAT["question"], context=[TEXT, " ", TEXT], answers=HUB)
    rows = read(question=["who?", " ", "why?"], context=FLAT["context"], answers=HUB)
    assert rows["notes"] == ["rows: 1 row without a question, the first is row 2"]


def test_held_out_rows_have_contexts_of_their_own():
    rows = KIND.read(
        {
            "question": Column.of(["who?"] * 60),
            "context": Column.of([f"Ann met number {i // 6}." for i in range(60)]),
            "answer": Column.of(["Ann"] * 60),
        },
        SpanFields(), "rows", [],
    )[0]  # fmt: skip
    train, held = KIND.hold_out(rows, 0.2, 0)
    assert (len(train), len(held)) == (48, 12)
    assert not set(train["context"].to_pylist()) & set(held["context"].to_pylist())
    one, other = KIND.hold_out(rows.slice(0, 6), 0.2, 0)
    assert (len(one), len(other)) == (5, 1)


# Predictions


def model_of(family: str = "bert", **sizes: Any) -> Any:
    torch.manual_seed(0)
    return with_new_head(tiny(family, **sizes), KIND.head, KIND.configure(()))


def batch_of(rows: Dataset, words: Any = WORDS, max_length: int = 64) -> dict[str, Any]:
    windows = KIND.encode(rows, words, max_length)
    return KIND.collator(words)([windows[i] for i in range(len(windows))])


def forward(model: Any, batch: dict[str, Any]) -> Any:
    from kdcli.models.inputs import model_inputs

    return model(**model_inputs(model, batch))


def test_gold_and_soft_targets_are_over_the_context_and_no_answer_only():
    model, batch = model_of(), batch_of(ROWS)
    other = model_of(hidden=16)
    output, taught = forward(model, batch), forward(other, batch)
    start, end = (logits.detach().requires_grad_() for logits in (output.start_logits, output.end_logits))
    own = KIND.predictions(type(output)(start_logits=start, end_logits=end), batch)
    expected, divergence = torch.zeros(()), torch.zeros(())
    for side, (logits, theirs) in enumerate(((start, taught.start_logits), (end, taught.end_logits))):
        for row, allowed in enumerate(batch["candidates"]):
            mine, gold = logits[row][allowed], int(allowed[: batch["labels"][row, side]].sum())
            expected = expected + functional.cross_entropy(mine[None], torch.tensor([gold])) / len(logits) / 2
            p, q = theirs[row][allowed].log_softmax(-1), mine.log_softmax(-1)
            divergence = divergence + (p.exp() * (p - q)).sum() / len(logits) / 2
    loss = gold_loss(own, KIND.distribution)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(output_loss(own, KIND.predictions(taught, batch), KIND.distribution), divergence)
    for temperature in (0.5, 100.0):
        assert output_loss(own, KIND.predictions(taught, batch), KIND.distribution, temperature).isfinite()
    loss.backward()
    assert start.grad is not None and (start.grad[~batch["candidates"]] == 0).all()
    assert (start.grad[batch["candidates"]] != 0).all()


@pytest.mark.parametrize("family", NAMES)
def test_every_family_has_the_head_and_learns_from_windows(family: str):
    model = model_of(family, labels=3, layers=1)
    assert model.config.num_labels == 2 and type(model).__name__.endswith("ForQuestionAnswering")
    batch = batch_of(ROWS.select([0, 1]))
    loss = gold_loss(KIND.predictions(forward(model, batch), batch), KIND.distribution)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    answers = KIND.answers(model, ROWS, WORDS, max_length=64, ask=predict)
    assert all(answer and answer in row["context"] for answer, row in zip(answers.best, ROWS, strict=True))


def test_answers_are_cut_from_the_context_as_it_is_written():
    context = "Zoë\tÜnal  lives in   the HOUSE of “glass”."
    rows = rows_of(("who lives there ?", context, ["Zoë\tÜnal"]))
    windows = KIND.encode(rows, WORDS, 64)
    answers = KIND.decode(certain(windows), windows, rows)
    assert answers.chosen == ["Zoë\tÜnal"] and answers.parts[0][0][1:] == (0, 8)


def certain(windows: Dataset, *, none: float = 0.0) -> dict[str, Any]:
    """Return the logits of a model that is sure of the gold answers. none: what it adds where there is none."""
    found: dict[str, Any] = {"start_logits": [], "end_logits": []}
    for window in windows:
        for logits, place in zip(found.values(), window["labels"], strict=True):
            row = np.zeros(window["length"], np.float32)
            row[place] = 5.0 + (none if place == window["none"] else 0.0)
            logits.append(row)
    return found


def test_a_model_that_knows_the_answers_scores_one():
    rows = rows_of(*((row["question"], row["context"], row["label"]) for row in ROWS for _ in range(3)))
    windows = QuestionAnswering(SpanFields(stride=20)).encode(rows, WORDS, 64)
    answers = KIND.decode(certain(windows), windows, rows)
    assert KIND.score(answers, rows, (), KIND.metrics) == dict.fromkeys(KIND.metrics, 1.0)
    assert answers.threshold == 0.0
    # Without questions that have no answer each gets one, however low its score is.
    some = rows.filter(lambda start: start >= 0, input_columns="start")
    windows = QuestionAnswering(SpanFields(stride=20)).encode(some, WORDS, 64)
    unsure = {
        name: [row + 100 * (np.arange(len(row)) == 0) for row in table] for name, table in certain(windows).items()
    }
    answers = KIND.decode(unsure, windows, some)
    assert answers.threshold is None
    scores = KIND.score(answers, some, (), KIND.metrics)
    assert scores == {**dict.fromkeys(KIND.metrics, 1.0), "no_answer_accuracy": 0.0}


def test_the_margin_of_a_row_is_that_of_its_most_certain_window():
    windows = QuestionAnswering(SpanFields(stride=20)).encode(ROWS, WORDS, 64)
    outputs = certain(windows, none=1.0)
    answers = KIND.decode(outputs, windows, ROWS)
    # The window that holds the answer says 0 for no answer, all others 12; the best span has 10, or nothing 0.
    np.testing.assert_allclose(answers.margins, [-10.0, -10.0, 12.0, -10.0])
    assert answers.lacking.tolist() == [False, False, True, False]


def test_answers_have_at_most_so_many_tokens():
    for longest in (1, 4):
        kind = QuestionAnswering(SpanFields(max_answer=longest))
        windows = kind.encode(ROWS, WORDS, 64)
        random = np.random.default_rng(0)
        outputs = {
            name: [random.normal(size=length).astype(np.float32) for length in windows["length"]]
            for name in kind.head.outputs
        }
        for row, parts in zip(ROWS, kind.decode(outputs, windows, ROWS).parts, strict=True):
            assert len(parts) == 20
            for text, begin, end in parts:
                assert row["context"][begin:end] == text
                assert len(WORDS(text, add_special_tokens=False)["input_ids"]) <= longest + 1


def test_the_empty_answer_is_chance():
    assert KIND.chance([ROWS], (), "f1") == 0.25 and KIND.chance([ROWS], (), "has_answer_f1") == 0.0
    assert KIND.chance([ROWS.select([0, 1])], (), "f1") == 0.0
    empty = KIND.decode(certain(w := KIND.encode(ROWS, WORDS, 64), none=99.0), w, ROWS)
    assert KIND.chance([ROWS], (), "no_answer_accuracy") == 1.0
    object.__setattr__(empty, "threshold", -1e9)
    assert KIND.score(empty, ROWS, (), ["f1"]) == {"f1": 0.25}


def test_known_outputs_equal_a_fresh_pass_to_the_bit(monkeypatch: pytest.MonkeyPatch):
    teacher, windows = model_of(), QuestionAnswering(SpanFields(stride=20)).encode(ROWS, WORDS, 64)
    collator, options = KIND.collator(WORDS), {"outputs": KIND.head.outputs, "per_token": True}
    fresh = predict(teacher, windows, collator, batch_size=4, **options)
    first = known_outputs(teacher, windows, collator, batch_size=4, **options)
    monkeypatch.setattr("kdcli.training.teacher_cache.predict", None)
    second = known_outputs(teacher, windows, collator, batch_size=4, **options)
    chosen = [5, 0, len(windows) - 1, 2]
    batch = collator([windows[i] for i in chosen])
    for known in (first, second):
        tables = KIND.predictions(known.of(batch), batch)
        for name, table in zip(KIND.head.outputs, tables, strict=True):
            for row, (number, allowed) in enumerate(zip(chosen, batch["candidates"], strict=True)):
                length = windows[number]["length"]
                expected = torch.from_numpy(fresh[name][number])
                assert torch.equal(table.logits[row, :length][allowed[:length]], expected[allowed[:length]])
                assert (table.logits[row][~allowed] == -1e30).all()


# From a recipe to a score

CITIES = ["oslo", "rome", "new york", "lima", "san jose", "kiev"]
FILLER = [
    "the",
    "weather",
    "was",
    "mild",
    "and",
    "people",
    "were",
    "glad",
    "about",
    "summer",
    "by",
    "sea",
    "so",
    "home",
]


def stories(folder: Path, name: str, size: int, seed: int) -> None:
    """Write rows whose answers follow the word in; a fifth has none."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(size):
        words = list(random.choice(FILLER, 30))
        city = str(random.choice(CITIES)) if random.random() < 0.8 else None
        if city is not None:
            words.insert(random.integers(0, 30), f"xin {city}")
        context = " ".join(words)
        answers = (
            {"text": [city], "answer_start": [context.index("xin ") + 4]} if city else {"text": [], "answer_start": []}
        )
        lines.append(json.dumps({"question": "where was it ?", "context": context, "answers": answers}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and a run on them."""
    folder = tmp_path_factory.mktemp("stories")
    for name, size, seed in (("train", 300, 0), ("held", 60, 1), ("test", 40, 2)):
        stories(folder, name, size, seed)
    files = {"train": "train.jsonl", "validation": "held.jsonl", "test": "test.jsonl"}
    recipe = tiny_recipe(
        "task",
        task={"name": "cities", "type": "question-answering", **files, "max_length": 32, "stride": 8},
        teacher={"finetune": {"max_steps": 150, "learning_rate": 1e-2}},
        train={"max_steps": 80, "learning_rate": 1e-2, "eval_every": 40},
    )
    document = run_recipe(write_recipe(folder / "recipe.toml", recipe))
    (folder / "run.json").write_text(json.dumps(document))
    return folder


def record(world: Path) -> dict[str, Any]:
    return json.loads((world / "run.json").read_text())


def task_of(world: Path, **changes: Any) -> Task:
    files = {"train": "train.jsonl", "validation": "held.jsonl", "test": "test.jsonl"}
    values: Any = {"name": "cities", "type": "question-answering", "max_length": 32, "stride": 8, **files, **changes}
    return load_task(TaskSection(**values), EvaluateSection(), base=world)


def words_of(world: Path) -> Any:
    from kdcli.models.load import load_tokenizer

    return load_tokenizer(world / "runs" / "recipe" / "student")


def test_a_student_learns_where_answers_stand_and_keeps_its_threshold(world: Path):
    run_of, student = record(world), load_model(world / "runs" / "recipe" / "student")
    assert run_of["task"]["kind"] == "question-answering" and run_of["primary"] == "f1"
    assert run_of["task"]["sizes"] == {"train": 270, "calibration": 30, "selection": 60, "report-test": 40}
    assert min(run_of[side]["score"] for side in ("teacher", "student")) > 0.75
    assert isinstance(getattr(student.config, THRESHOLD), float) and run_of["student_head"] == "question-answering"
    card = (world / "runs" / "recipe" / "student" / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "AutoModelForQuestionAnswering" in card


def test_the_threshold_comes_from_training_rows_that_nothing_else_sees(world: Path):
    task, student = task_of(world), load_model(world / "runs" / "recipe" / "student")
    assert task.calibration is not None
    own, rows = getattr(student.config, THRESHOLD), Path(world / "train.jsonl").read_text().splitlines()
    apart = [*task.train["context"], *task.calibration["context"]]
    assert sorted(apart) == sorted(json.loads(row)["context"] for row in rows)
    options: Any = {"max_length": 32, "ask": predict}
    assert task.kind.calibrate(student, task.calibration, words_of(world), **options) == {THRESHOLD: pytest.approx(own)}
    setattr(student.config, THRESHOLD, -1e9)
    [test] = task.report.values()
    assert set(task.kind.answers(student, test, words_of(world), **options).chosen) == {""}


def test_the_threshold_comes_from_contexts_of_their_own(tmp_path: Path):
    cells = [{"text": ["Ann"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    rows = [
        {"question": f"who {i} ?", "context": f"Ann met number {i // 6}.", "answers": cells[i % 2]} for i in range(120)
    ]
    for name in ("train", "held", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = task_of(tmp_path)
    assert task.calibration is not None and (len(task.train), len(task.calibration)) == (108, 12)
    assert not set(task.train["context"]) & set(task.calibration["context"])


def test_rows_that_all_have_an_answer_need_no_threshold(world: Path, tmp_path: Path):
    lines = [line for line in (world / "train.jsonl").read_text().splitlines() if json.loads(line)["answers"]["text"]]
    (tmp_path / "answered.jsonl").write_text("\n".join(lines))
    task = task_of(world, train=str(tmp_path / "answered.jsonl"))
    assert task.calibration is None and len(task.train) == len(lines)


def test_plan_and_run_count_windows_and_samples_are_rows(world: Path):
    recipe = changed(
        load(world),
        "teacher",
        task={"train_samples": 40, "stride": 4},
        teacher={"model": record(world)["teacher_path"], "finetune": False},
        train={"max_steps": None, "epochs": 1, "eval_every": None},
    )
    path = write_recipe(world / "samples.toml", recipe)
    plan = make_plan(prepare(load_recipe(path), path))
    document = run_recipe(path)
    assert document["task"]["sizes"]["train"] == 36 and plan.task.sizes["train windows"] >= 72
    assert plan.task.sizes["calibration"] == 4 and plan.task.sizes["test"] == 40
    steps = -(-plan.task.sizes["train windows"] // 32)
    assert [stage.steps for stage in plan.stages] == [stage["steps"] for stage in document["training"]] == [steps]


def test_a_plan_says_how_many_answers_no_window_holds(world: Path):
    long = "the weather was mild and people were glad about summer by sea so home"
    row = {"question": "what ?", "context": f"{long} {long} xin rome", "answers": f"{long} {long}"}
    lines = [*(world / "train.jsonl").read_text().splitlines()[:40], *[json.dumps(row)] * 2]
    (world / "long.jsonl").write_text("\n".join(lines))
    teacher = {"model": record(world)["teacher_path"], "finetune": False}
    path = write_recipe(
        world / "long.toml", changed(load(world), "teacher", task={"train": "long.jsonl"}, teacher=teacher)
    )
    said = "training rows have an answer that no window holds whole"
    assert [note for note in make_plan(prepare(load_recipe(path), path)).task.notes if said in note] == [
        f"2 {said}, and count as without one: use a larger stride or max_length"
    ]


def test_another_stride_is_another_teacher():
    assert KIND.drawn(SpanFields(stride=4)) != KIND.drawn(SpanFields(stride=8))
    # Its threshold is chosen among the answers that it may give.
    assert KIND.drawn(SpanFields(max_answer=4)) != KIND.drawn(SpanFields(max_answer=8))
    assert KIND.drawn(SpanFields(n_best=4)) == KIND.drawn(SpanFields(n_best=8))


def load(world: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((world / "recipe.toml").read_text())


@pytest.mark.slow
def test_eval_and_an_exported_graph_score_what_the_run_scored(world: Path, capsys: Any):
    student, expected = str(world / "runs" / "recipe" / "student"), record(world)["student"]["metrics"]["test"]
    data = ["--data", str(world / "test.jsonl"), "--json"]

    def scores(*arguments: str) -> Any:
        assert run(["eval", *arguments]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)["metrics"]

    assert scores(str(world / "runs" / "recipe"), "--json") == {"test": pytest.approx(expected)}
    short = ["--max-length", "32", "--set", "stride=8"]
    assert scores(student, *data, *short)["rows"] == pytest.approx(expected)
    export = ["export", str(world / "runs" / "recipe"), "--batch-sizes", "1", "--sequence-lengths", "8", "--runs", "1"]
    assert run([*export, "--out", str(world / "served"), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["parity"]["max_abs_difference"] < 1e-4 and "examples of cities" in exported["parity"]["inputs"]
    assert scores(str(world / "served"), *data, *short)["rows"] == pytest.approx(expected)
    # Longer windows with fewer edges: other answers, of the same model.
    assert abs(scores(str(world / "served"), *data, "--max-length", "128")["rows"]["f1"] - expected["f1"]) < 0.3


def test_a_graph_has_start_and_end_logits(world: Path):
    import onnxruntime

    if not (world / "served").exists():
        assert run(["export", str(world / "runs" / "recipe"), "--no-latency", "--out", str(world / "served")]) == 0
    session = onnxruntime.InferenceSession(str(world / "served" / "model.onnx"))
    assert [node.name for node in session.get_outputs()] == ["start_logits", "end_logits"]


@pytest.mark.slow
def test_a_graph_answers_from_long_contexts_as_the_model_does(world: Path, tmp_path: Path, capsys: Any):
    assert run(["export", str(world / "runs" / "recipe"), "--no-latency", "--out", str(tmp_path / "served")]) == 0
    draw, rows = np.random.default_rng(5), []
    for number in range(12):
        words = [*draw.choice(FILLER, 900)]
        if number % 3:
            words.insert(int(draw.integers(0, 900)), f"xin {draw.choice(CITIES)}")
        text = " ".join(words)
        start = text.find("xin ") + 4
        found = {"text": [" ".join(text[start:].split()[:1])], "answer_start": [start]} if number % 3 else {"text": []}
        rows.append({"question": "where was it ?", "context": text, "answers": found})
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command, data in (("eval", "--data"), ("predict", "--input")):
        said = []
        for folder in (world / "runs" / "recipe" / "student", tmp_path / "served"):
            capsys.readouterr()
            options = [data, str(tmp_path / "long.jsonl"), "--max-length", "32", "--set", "stride=8", "--json"]
            assert run([command, str(folder), *options]) == 0, capsys.readouterr().err
            out = capsys.readouterr().out
            said.append([json.loads(part) for part in ([out] if command == "eval" else out.splitlines())])
        first, second = said
        if command == "eval":
            assert first[0]["metrics"]["rows"] == pytest.approx(second[0]["metrics"]["rows"], abs=1e-9)
        else:
            places = [[(reply["answer"], reply["start"]) for reply in side] for side in said]
            assert places[0] == places[1] and max(start or 0 for _, start in places[0]) > 1000
            assert [r["probability"] for r in first] == pytest.approx([r["probability"] for r in second], abs=1e-4)


def test_a_trained_model_of_others_is_scored_and_teaches(world: Path, tmp_path: Path, capsys: Any):
    from transformers import AutoModelForQuestionAnswering

    model = AutoModelForQuestionAnswering.from_pretrained(world / "runs" / "recipe" / "student")
    delattr(model.config, THRESHOLD)
    model.save_pretrained(tmp_path / "teacher")
    words_of(world).save_pretrained(tmp_path / "teacher")
    data = ["--data", str(world / "test.jsonl"), "--max-length", "32", "--set", "stride=8", "--json"]
    assert run(["eval", str(tmp_path / "teacher"), *data]) == 0
    neutral = json.loads(capsys.readouterr().out)["metrics"]["rows"]["f1"]
    assert neutral > 0.7
    files = {
        name: str(world / f"{file}.jsonl")
        for name, file in (("train", "train"), ("validation", "held"), ("test", "test"))
    }
    recipe = changed(load(world), "teacher", task=files, teacher={"model": "teacher"}, train={"max_steps": 1})
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    own = getattr(load_model(world / "runs" / "recipe" / "student").config, THRESHOLD)
    assert document["teacher_settings"] == {THRESHOLD: pytest.approx(own)}
    assert document["teacher"]["metrics"]["test"] == pytest.approx(record(world)["student"]["metrics"]["test"])


def test_replies_say_where_the_answer_stands(world: Path):
    student, task = load_model(world / "runs" / "recipe" / "student"), task_of(world)
    columns: Columns = {
        "question": Column.of(["where was it ?"] * 2),
        "context": Column.of(["the weather was mild xin new york and people were glad", "people were glad by the sea"]),
    }
    assert KIND.inputs(task.fields) == {"question": "question", "context": "context"}
    from kdcli.data.tables import dataset_of

    rows = dataset_of(KIND.read_inputs(columns, task.fields, "rows", []))
    options: Any = {"max_length": 32, "ask": predict}
    first, second = task.kind.replies(student, rows, words_of(world), top=3, **options)
    assert first["answer"] == "new york" and columns["context"][0][first["start"] : first["end"]] == "new york"
    assert second["answer"] == "" and second["start"] is None and KIND.show(second).startswith("(no answer) ")
    empty = next(entry for entry in second["top"] if entry["start"] is None)
    assert KIND.show_entry(empty) == f"(no answer) {empty['probability']:.3f}"
    assert KIND.show_entry(first["top"][0]).endswith(f" {first['top'][0]['probability']:.3f}")
    for reply in (first, second):
        assert len(reply["top"]) == 3 and 0 < reply["probability"] <= 1
        probabilities = [each["probability"] for each in reply["top"]]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1 + 1e-9
    json.dumps([first, second])
    delattr(student.config, THRESHOLD)
    (bare,) = task.kind.replies(student, rows.select([1]), words_of(world), **options)
    assert bare["answer"] and "top" not in bare


@pytest.mark.parametrize("changes", [{"teacher": {"cache": "all"}, "method": "minilmv2"}, {"overparam": {"length": 1}}])
def test_kept_states_and_chains_work_on_windows(changes: dict[str, Any], world: Path, tmp_path: Path):
    teacher = record(world)["teacher_path"]
    files = {name: str(world / f"{file}.jsonl") for name, file in (("train", "train"), ("validation", "held"))}
    given = {"model": teacher, "finetune": False, **changes.pop("teacher", {})}
    recipe = changed(
        load(world),
        "teacher",
        task={**files, "test": None, "train_samples": 30},
        teacher=given,
        train={"max_steps": 2, "eval_every": None},
        **changes,
    )
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    assert set(document["student"]["metrics"]["validation"]) == {"f1", "exact_match"}
    plain = changed(recipe, teacher={"cache": True})
    if "cache" in given:
        other = run_recipe(write_recipe(tmp_path / "plain.toml", plain))
        assert other["student"]["metrics"] == document["student"]["metrics"]


@pytest.mark.parametrize("method", ["kd", pytest.param("makd", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_to_the_same_student(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = record(world)["teacher_path"]
    files = {name: str(world / f"{file}.jsonl") for name, file in (("train", "train"), ("validation", "held"))}
    recipe = changed(
        load(world),
        "teacher",
        task={**files, "test": None, "train_samples": 60},
        teacher={"model": teacher, "finetune": False, "cache": "all"},
        train={"max_steps": 6, "eval_every": 2},
        method=method,
    )
    path = write_recipe(tmp_path / "recipe.toml", recipe)
    whole = run_recipe(path)
    shutil.move(tmp_path / "runs", tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            run_recipe(path)
    resumed = run_recipe(path, resume=True)
    assert resumed["student"]["metrics"] == whole["student"]["metrics"]
    first, second = (
        load_model(folder / "recipe" / "student").state_dict() for folder in (tmp_path / "whole", tmp_path / "runs")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_every_familys_graph_gives_the_models_logits(family: str, tmp_path: Path):
    task = Task("rows", KIND, SpanFields(), (), ("f1",), ROWS, ROWS, {"rows": ROWS})
    found = export_model(model_of(family), tokenizer(), tmp_path / "onnx", task=task, max_length=64, latency=False)
    assert found.difference < 1e-4 and "examples of rows" in found.inputs


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", ["squad_small", "squad_v2_small", "xquad_en"])
def test_real_sets_are_used_as_hub_sets_and_as_files(name: str, data_dir: Path, tmp_path: Path):
    sizes = {"train_samples": 30, "validation_samples": 20, "max_length": 128, "stride": 32}
    files = {split: str(data_dir / name / f"{split}.parquet") for split in ("train", "validation")}
    fingerprints = []
    for source in (files, {"hub": str(data_dir / name)}):
        recipe = tiny_recipe("task", task={"name": name, "type": "question-answering", **source, **sizes})
        document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe), resume=False)
        shutil.rmtree(tmp_path / "runs")
        fingerprints.append(document["task"]["fingerprint"])
        assert ("calibration" in document["task"]["sizes"]) == (name == "squad_v2_small")
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_named_sets_are_read_from_the_data_folder(name: str, world: Path, tmp_path: Path, monkeypatch: Any):
    folder = tmp_path / name
    folder.mkdir()
    for split, file in (("train", "train"), ("validation", "held")):
        lines = [json.loads(line) for line in (world / f"{file}.jsonl").read_text().splitlines()]
        lines = [{"id": str(i), "title": "x", **line} for i, line in enumerate(lines)]
        pq.write_table(Dataset.from_list(lines).with_format("arrow")[:], folder / f"{split}.parquet")
    monkeypatch.setenv("KDCLI_DATA_DIR", str(tmp_path))
    values: Any = {"name": name, "stride": 12, "max_length": 40}
    task = load_task(TaskSection(**values), EvaluateSection(), base=tmp_path)
    assert task.metrics == ("f1", "exact_match") and task.fields.stride == 12 and len(task.selection) == 60
    assert len(task.kind.encode(task.selection, WORDS, 40)) > 60


@pytest.mark.slow
@pytest.mark.data
def test_a_real_encoder_answers_real_questions(data_dir: Path, encoder: Path, tmp_path: Path):
    for split in ("train", "validation"):
        rows = pq.read_table(data_dir / "squad_small" / f"{split}.parquet")
        short = [len(context.split()) < 90 for context in rows["context"].to_pylist()]
        pq.write_table(rows.filter(short), tmp_path / f"{split}.parquet")
    files = {split: f"{split}.parquet" for split in ("train", "validation")}
    recipe = tiny_recipe(
        *("task", "teacher"),
        task={"name": "short", "type": "question-answering", **files, "max_length": 160},
        teacher={"model": str(encoder), "finetune": {"epochs": 2, "learning_rate": 3e-4, "batch_size": 8}},
        train={"max_steps": 1},
    )
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    # The best spans of random logits have an F1 of 0.08 on these rows, and 0.002 of them are right.
    scores = document["teacher"]["metrics"]["validation"]
    assert scores["f1"] > 0.12 and scores["exact_match"] > 0.03, scores


@pytest.mark.parametrize("family", NAMES)
def test_trained_models_of_every_family_are_loaded_as_the_library_and_kdcli_save_them(family: str, tmp_path: Path):
    model, batch = model_of(family, layers=1), batch_of(ROWS.select([0]))
    model.save_pretrained(tmp_path / "library")
    (tmp_path / "own").mkdir()
    save_model(model, tmp_path / "own", WORDS)
    with torch.no_grad():
        expected = forward(model, batch)
        for folder in ("library", "own"):
            again = load_model(tmp_path / folder)
            assert kind_of_model(again, folder, "model") == KIND
            found = forward(again, batch)
            assert all(torch.equal(found[name], expected[name]) for name in KIND.head.outputs)
