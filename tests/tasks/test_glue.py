"""GLUE by name: from made-up files of the same columns, and from the real ones where they are."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from kdcli.data.glue import GLUE
from kdcli.errors import InputError
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task

COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
"""The columns as the hub's nyu-mll/glue has them."""

METRICS = {
    "cola": ("mcc",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
}
"""GLUE's official metrics; accuracy elsewhere."""

Write = Callable[..., None]


def load(name: str, protocol: str = "dev", **values: object) -> Task:
    section = TaskSection(name=name, **values)  # type: ignore[arg-type]
    return load_task(section, EvaluateSection(protocol=protocol), base=Path())  # type: ignore[arg-type]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a made-up split of a task into a data folder of the test's own."""
    monkeypatch.setenv("KDCLI_DATA_DIR", str(tmp_path))

    def write_split(name: str, split: str, rows: int, **columns: list) -> None:
        classes = max(1, len(GLUE[name].fields.get("labels", [])))
        table = {column: [f"{split} {column} {i}" for i in range(rows)] for column in COLUMNS[name]}
        table["label"] = [i % classes if GLUE[name].fields.get("labels") else i / 2 for i in range(rows)]  # type: ignore[misc]
        table["idx"] = list(range(rows))  # type: ignore[arg-type]
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True, exist_ok=True)
        pa.parquet.write_table(pa.table({**table, **columns}), folder / f"{split}.parquet")

    return write_split


def test_there_are_the_nine_tasks_of_glue():
    assert set(GLUE) == set(COLUMNS)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "mnli"])
def test_every_task_loads_by_name(name: str, write: Write):
    write(name, "train", 7)
    write(name, "validation", 5)
    task = load(name)
    columns = COLUMNS[name]
    assert task.train["text"][3] == f"train {columns[0]} 3"
    assert ("text_pair" in task.train.column_names) == (len(columns) == 2)
    if len(columns) == 2:
        assert task.report["validation"]["text_pair"][4] == f"validation {columns[1]} 4"
    assert (len(task.train), len(task.selection)) == (7, 5) and list(task.report) == ["validation"]
    assert task.metrics == METRICS.get(name, ("accuracy",)) and task.primary == task.metrics[0]
    assert task.train["index"][:] == list(range(7))
    if name == "stsb":
        assert task.kind.name == "regression" and task.label_names == ()
        assert task.train["label"][:3] == [0.0, 0.5, 1.0]
    else:
        assert task.kind.name == "classification" and len(task.label_names) == 2
        assert task.train["label"][:3] == [0, 1, 0]


def test_label_names_are_those_of_the_hubs_set():
    labels = {name: tuple(row.fields.get("labels", ())) for name, row in GLUE.items()}
    assert labels["sst2"] == ("negative", "positive")
    assert labels["cola"] == ("unacceptable", "acceptable")
    assert labels["mnli"] == ("entailment", "neutral", "contradiction")
    assert labels["qnli"] == labels["rte"] == ("entailment", "not_entailment")
    assert labels["wnli"] == ("not_entailment", "entailment")
    assert labels["mrpc"] == ("not_equivalent", "equivalent")
    assert labels["qqp"] == ("not_duplicate", "duplicate")


def test_mnli_is_reported_on_both_sets_and_chosen_on_the_matched_one(write: Write):
    for split, rows in (("train", 9), ("validation_matched", 6), ("validation_mismatched", 4)):
        write("mnli", split, rows)
    task = load("mnli")
    assert list(task.report) == ["matched", "mismatched"]
    assert [len(rows) for rows in task.report.values()] == [6, 4]
    assert task.selection["text"][:] == task.report["matched"]["text"][:]
    assert task.report["mismatched"]["text"][0] == "validation_mismatched premise 0"


def test_half_dev_chooses_on_the_first_half_and_reports_the_second(write: Write):
    write("rte", "train", 4)
    write("rte", "validation", 7)
    task = load("rte", "half-dev")
    assert task.selection["text"][:] == [f"validation sentence1 {i}" for i in range(3)]
    assert task.report["validation"]["text"][:] == [f"validation sentence1 {i}" for i in range(3, 7)]
    assert task.description["sizes"] == {"train": 4, "selection": 3, "report-validation": 4}


def test_half_dev_of_mnli_reports_the_second_halves_of_both_sets(write: Write):
    for split, rows in (("train", 9), ("validation_matched", 6), ("validation_mismatched", 4)):
        write("mnli", split, rows)
    task = load("mnli", "half-dev")
    assert task.selection["text"][:] == [f"validation_matched premise {i}" for i in range(3)]
    assert task.report["matched"]["text"][:] == [f"validation_matched premise {i}" for i in range(3, 6)]
    assert task.report["mismatched"]["text"][:] == [f"validation_mismatched premise {i}" for i in range(2, 4)]


def test_one_row_cannot_be_halved(write: Write):
    write("rte", "train", 4)
    write("rte", "validation", 1)
    with pytest.raises(InputError, match="too small to be halved"):
        load("rte", "half-dev")


def test_a_sample_keeps_the_order_and_is_the_same_each_time(write: Write):
    write("sst2", "train", 50)
    write("sst2", "validation", 20)
    task = load("sst2", train_samples=10, validation_samples=6)
    numbers = [int(text.split()[-1]) for text in task.train["text"]]
    assert len(set(numbers)) == 10 and numbers == sorted(numbers)
    assert task.train["label"][:] == [number % 2 for number in numbers]
    assert len(task.selection) == 6 and task.train["index"][:] == list(range(10))
    again = load("sst2", train_samples=10, validation_samples=6)
    assert again.train["text"][:] == task.train["text"][:]
    assert again.description["fingerprint"] == task.description["fingerprint"]
    other = load("sst2", train_samples=10, validation_samples=6, split_seed=1)
    assert other.train["text"][:] != task.train["text"][:]
    assert other.description["fingerprint"] != task.description["fingerprint"]
    assert len(load("sst2", train_samples=1000).train) == 50


def test_missing_files_are_named(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write("qnli", "validation", 4)
    with pytest.raises(InputError, match=r"qnli: train\.parquet not found in .*glue/qnli") as caught:
        load("qnli")
    assert caught.value.where == "task.name"
    monkeypatch.delenv("KDCLI_DATA_DIR")
    with pytest.raises(
        InputError, match=r"train\.parquet, validation\.parquet not found in KDCLI_DATA_DIR \(not set\)"
    ):
        load("qnli")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0, 1, 2, 0]}, r"row 3 has the label '2', which is not in task.labels \(negative, positive\)"),
        ({"label": [0, 1, 0, -1]}, "row 4 has the label '-1'"),
        ({"label": [0, None, 1, 0]}, "1 row without a label, the first is row 2"),
        ({"label": ["a", "b", "a", "b"]}, "row 1 has the label 'a'"),
        ({"label": [0.0, 0.5, 1.0, 1.0]}, "row 2 has the label '0.5'"),
        ({"sentence": ["a", "b", None, "c"]}, "row 3 has no 'sentence'"),
    ],
)
def test_broken_rows_are_named(write: Write, columns: dict[str, list], words: str):
    write("sst2", "train", 4, **columns)
    write("sst2", "validation", 4)
    with pytest.raises(InputError, match=words):
        load("sst2")


@pytest.mark.parametrize("labels", [["high", "low", "x", "y"], [1.0, None, 2.0, 3.0], [1.0, float("nan"), 2.0, 3.0]])
def test_similarities_must_be_numbers(write: Write, labels: list):
    write("stsb", "train", 4, label=labels)
    write("stsb", "validation", 4)
    with pytest.raises(InputError, match="label"):
        load("stsb")


def test_other_columns_are_refused_with_what_is_there(write: Write, tmp_path: Path):
    write("sst2", "validation", 4)
    pa.parquet.write_table(pa.table({"sentences": ["a"], "label": [0]}), tmp_path / "glue" / "sst2" / "train.parquet")
    with pytest.raises(InputError, match="no text column 'sentence'; it has 'sentences', 'label'") as caught:
        load("sst2")
    assert caught.value.hint == "did you mean 'sentences'?"


def test_a_corrupt_file_is_named(write: Write, tmp_path: Path):
    write("sst2", "validation", 4)
    (tmp_path / "glue" / "sst2" / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"train\.parquet is not readable as Parquet"):
        load("sst2")


def test_an_unknown_task_gets_the_nearest_name():
    with pytest.raises(InputError, match="unknown task 'sst-2'; known are cola, sst2") as caught:
        load("sst-2")
    assert caught.value.hint == "did you mean 'sst2'?"
    with pytest.raises(InputError) as caught:
        load("sentiment")
    assert caught.value.hint is not None and "task.data" in caught.value.hint


def test_the_built_in_reviews_need_no_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KDCLI_DATA_DIR", raising=False)
    task, other = load("reviews"), load("reviews", split_seed=1)
    assert (len(task.train), len(task.selection)) == (8000, 1000)
    assert task.label_names == ("negative", "positive")
    assert other.train["text"][:5] != task.train["text"][:5]
    assert load("reviews").description["fingerprint"] == task.description["fingerprint"]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("sst2", 67_349, 872),
        ("cola", 8_551, 1_043),
        ("mrpc", 3_668, 408),
        ("rte", 2_490, 277),
        ("stsb", 5_749, 1_500),
        ("wnli", 635, 71),
    ],
)
def test_real_sets_have_their_official_sizes(name: str, train: int, validation: int, data_dir: Path):
    task = load(name)
    assert (len(task.train), len(task.report["validation"])) == (train, validation)
    labels = set(task.train["label"])
    assert labels == {0, 1} if task.kind.name == "classification" else (min(labels), max(labels)) == (0.0, 5.0)


@pytest.mark.data
def test_the_first_real_validation_sentence(data_dir: Path):
    task = load("sst2", "half-dev")
    assert (len(task.selection), len(task.report["validation"])) == (436, 436)
    assert task.selection["text"][0] == "it 's a charming and often affecting journey . "
    assert task.label_names[task.selection["label"][0]] == "positive"


@pytest.mark.parametrize(
    ("name", "words"),
    [("sst2", "sst2 is a classification task, not a regression task"), ("mine", "no rows of your own")],
)
def test_a_type_that_a_name_does_not_have_is_refused(name: str, words: str):
    with pytest.raises(InputError, match=words):
        load(name, type="regression")
