"""A user's own data: files and folders of every kind, what they may hold, and what is refused."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from kdcli.errors import InputError
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks import registry
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_rows, load_task
from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")
ROWS: dict[str, list] = {
    "message": ["it works, mostly", 'he said "no"', "two\nlines", "  spaces ", "übel 正面", "007"],
    "answer": ["a", "b", "c", "d", "e", "NA"],
    "team": ["sales", "help", "sales", "help", "sales", "help"],
}


def quoted(value: Any) -> str:
    return '"' + str(value).replace('"', '""') + '"'


def write(path: Path, columns: dict[str, list]) -> str:
    """Write columns as the kind of file that the name says, and return the name."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix in (".csv", ".tsv"):
        comma = "," if path.suffix == ".csv" else "\t"
        lines = [list(columns), *(list(row.values()) for row in rows)]
        text = "".join(comma.join(map(quoted, line)) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8", newline="")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pa.parquet.write_table(pa.table(columns), path)
    return path.name


def load(base: Path, *, protocol: str = "dev", **values: Any) -> Task:
    section = TaskSection(**{"name": "own", "text": "message", "label": "team", **values})
    return load_task(section, EvaluateSection(protocol=protocol), base=base)  # type: ignore[arg-type]


def whole(base: Path, columns: dict[str, list], suffix: str = "jsonl", **values: Any) -> Task:
    """Load a task that is trained on all of `columns` and scored on them too."""
    name = write(base / f"rows.{suffix}", columns)
    return load(base, train=name, validation=name, **values)


def pairs_of(*sets: Dataset) -> list[tuple[str, int]]:
    return [(text, label) for rows in sets for text, label in zip(rows["text"], rows["label"], strict=True)]


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path):
    task = whole(tmp_path, ROWS, suffix, text=["message", "answer"])
    assert task.train["text"][:] == ROWS["message"] and task.train["text_pair"][:] == ROWS["answer"]
    assert task.label_names == ("help", "sales") and task.train["label"][:] == [1, 0, 1, 0, 1, 0]
    assert task.train["index"][:] == list(range(6))
    assert task.kind.name == "classification" and task.metrics == ("accuracy", "f1") and task.primary == "accuracy"
    assert task.selection["text"][:] == task.report["validation"]["text"][:] == ROWS["message"]


def test_the_kind_of_file_does_not_change_the_fingerprint(tmp_path: Path):
    fingerprints = {whole(tmp_path, ROWS, suffix).description["fingerprint"] for suffix in KINDS}
    assert len(fingerprints) == 1


@pytest.mark.parametrize("text", ["message", ["message"]])
def test_one_column_of_text_is_no_pair(text: Any, tmp_path: Path):
    task = whole(tmp_path, ROWS, text=text)
    assert "text_pair" not in task.train.column_names


def test_the_label_column_is_label_unless_it_is_named(tmp_path: Path):
    name = write(tmp_path / "rows.csv", {"message": ["x", "y"] * 10, "label": ["a", "b"] * 10})
    assert load(tmp_path, data=name, label=None).label_names == ("a", "b")


def test_absolute_paths_need_no_base(tmp_path: Path):
    write(tmp_path / "rows.csv", ROWS)
    path = str(tmp_path / "rows.csv")
    assert len(load(Path("/nowhere"), train=path, validation=path).train) == 6


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(suffix: str, tmp_path: Path):
    path = tmp_path / f"rows.{suffix}"
    write(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(tmp_path, train=path.name, validation=path.name).train["text"][:] == ROWS["message"]


def test_windows_line_ends_and_empty_lines_are_no_rows(tmp_path: Path):
    (tmp_path / "rows.csv").write_bytes(b"message,team\r\nx,a\r\n\r\ny,b\r\n\r\n")
    (tmp_path / "rows.jsonl").write_bytes(b'{"message": "x", "team": "a"}\r\n\r\n{"message": "y", "team": "b"}\r\n')
    for name in ("rows.csv", "rows.jsonl"):
        assert pairs_of(load(tmp_path, train=name, validation=name).train) == [("x", 0), ("y", 1)]


def test_a_line_separator_inside_a_json_text_ends_no_line(tmp_path: Path):
    texts = ["one\u2028text", "another\x85one"]
    lines = [json.dumps({"message": t, "team": i}, ensure_ascii=False) for i, t in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert load(tmp_path, train="rows.jsonl", validation="rows.jsonl").train["text"][:] == texts


def test_a_cell_may_be_long(tmp_path: Path):
    columns = {"message": ["x" * 200_000, "y"], "team": ["a", "b"]}
    assert whole(tmp_path, columns, "csv").train["text"][:] == columns["message"]


@pytest.mark.parametrize(
    "texts",
    [
        ["007", "1e5", "3.10", "12"],
        ["true", "false", "TRUE", "1"],
        ["2024-01-01", "2024-01-02", "12:30", "x"],
        ["NA", "null", "None", "nan"],
    ],
)
def test_texts_of_a_csv_file_stay_as_they_are_written(texts: list[str], tmp_path: Path):
    assert whole(tmp_path, {"message": texts, "team": list("abab")}, "csv").train["text"][:] == texts


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        ([2, 10, 1, 2], ("1", "2", "10")),
        (["2", "10", "1", "2"], ("1", "2", "10")),
        ([-1, 1, -1, 0], ("-1", "0", "1")),
        ([1.0, 0.0, 1.0, 0.0], ("0", "1")),
        (["1.0", "0.0", "1", "0"], ("0", "1")),
        ([True, False, True, False], ("false", "true")),
        (["10", "9", "x", "x"], ("10", "9", "x")),
        (["²", "1", "²", "1"], ("1", "²")),
        (["01", "1", "01", "1"], ("01", "1")),
        (["v1.0", "v1.1", "v1.0", "v1.1"], ("v1.0", "v1.1")),
    ],
)
def test_classes_are_sorted_and_numbers_as_numbers(labels: list, names: tuple[str, ...], tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": labels})
    assert task.label_names == names and task.kind.name == "classification"
    assert all(0 <= label < len(names) for label in task.train["label"])


@pytest.mark.parametrize("suffix", KINDS)
def test_numbered_classes_are_the_same_in_every_kind_of_file(suffix: str, tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": [3, 1, 20, 1]}, suffix)
    assert task.label_names == ("1", "3", "20") and task.train["label"][:] == [1, 0, 2, 0]


def test_labels_gives_the_order_and_may_have_classes_that_do_not_occur(tmp_path: Path):
    task = whole(tmp_path, ROWS, labels=["sales", "press", "help"])
    assert task.label_names == ("sales", "press", "help") and task.train["label"][:] == [0, 2, 0, 2, 0, 2]


def test_labels_makes_numbers_with_fractions_into_classes(tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": ["1.0", "1.5"] * 2}, labels=["1.5", "1.0"])
    assert task.kind.name == "classification" and task.label_names == ("1.5", "1.0")
    assert task.train["label"][:] == [1, 0, 1, 0]


@pytest.mark.parametrize("suffix", KINDS)
def test_labels_with_fractions_are_a_regression(suffix: str, tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": [1.0, 2.5, 0.0, 4.75]}, suffix)
    assert task.kind.name == "regression" and task.label_names == () and task.metrics == ("pearson", "spearman")
    assert task.train["label"][:] == [1.0, 2.5, 0.0, 4.75]
    assert task.train.features["label"].dtype == "float64"


def test_whole_numbers_are_a_regression_when_the_recipe_says_so(tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": [1, 5, 2, 2]}, type="regression")
    assert task.kind.name == "regression" and task.train["label"][:] == [1.0, 5.0, 2.0, 2.0]


def test_numbers_with_fractions_are_classes_when_the_recipe_says_so(tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": [0.5, 1.5, 0.5, 1.5]}, type="classification")
    assert task.label_names == ("0.5", "1.5")


def test_metrics_may_be_chosen_and_the_first_one_decides(tmp_path: Path):
    task = whole(tmp_path, ROWS, metrics=["mcc", "balanced_accuracy"])
    assert task.metrics == ("mcc", "balanced_accuracy") and task.primary == "mcc"


@pytest.mark.parametrize("metrics", [["pearson"], ["bleu"], [], ["accuracy", "mse"]])
def test_metrics_that_do_not_fit_are_refused(metrics: list[str], tmp_path: Path):
    with pytest.raises(InputError, match="of a classification task; known are accuracy, f1") as caught:
        whole(tmp_path, ROWS, metrics=metrics)
    assert caught.value.where == "task.metrics"


def test_an_error_cannot_be_the_first_metric(tmp_path: Path):
    columns = {"message": list("wxyz"), "team": [0.5, 1.5, 2.5, 3.5]}
    with pytest.raises(InputError, match="'mse' cannot be the first metric"):
        whole(tmp_path, columns, metrics=["mse", "pearson"])
    assert whole(tmp_path, columns, metrics=["spearman", "mse"]).metrics == ("spearman", "mse")


# Splits


def many(count: int, labels: list) -> dict[str, list]:
    return {"message": [f"message {i}" for i in range(count)], "team": [labels[i % len(labels)] for i in range(count)]}


def test_one_file_is_split_and_no_row_is_lost_or_doubled(tmp_path: Path):
    columns = many(100, ["a", "b", "b", "b"])
    task = load(tmp_path, data=write(tmp_path / "rows.csv", columns))
    assert (len(task.train), len(task.selection)) == (90, 10)
    expected = list(zip(columns["message"], [int(team == "b") for team in columns["team"]], strict=True))
    assert sorted(pairs_of(task.train, task.selection)) == sorted(expected)
    numbers = [int(text.split()[1]) for text in task.train["text"]]
    assert numbers == sorted(numbers)
    for rows in (task.train, task.selection):
        assert rows["index"][:] == list(range(len(rows)))


def test_both_halves_of_a_set_sorted_by_label_have_all_classes(tmp_path: Path):
    name = write(tmp_path / "rows.csv", many(200, ["a"] * 100 + ["b"] * 100))
    task = load(tmp_path, protocol="half-dev", data=name)
    [report] = task.report.values()
    assert set(task.selection["label"]) == set(report["label"]) == {0, 1}


@pytest.mark.parametrize("column", ["message", "team"])
def test_half_of_a_character_is_refused_with_its_row(column: str, tmp_path: Path):
    columns = many(20, ["a", "b"])
    columns[column][6] = "cut \ud83d"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="row 7 has half of a character at place 5"):
        load(tmp_path, data="rows.jsonl")


def test_the_split_is_the_same_each_time_and_another_with_another_seed(tmp_path: Path):
    name = write(tmp_path / "rows.csv", many(100, ["a", "b"]))
    held = [load(tmp_path, data=name, split_seed=seed).selection["text"][:] for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize(("fraction", "held"), [(0.1, 20), (0.25, 50), (0.5, 100), (0.9, 180)])
def test_the_split_keeps_the_shares_of_the_classes(fraction: float, held: int, tmp_path: Path):
    name = write(tmp_path / "rows.csv", many(200, ["a", *"bbb", *"cccccc"]))
    for seed in range(3):
        task = load(tmp_path, data=name, validation_fraction=fraction, split_seed=seed)
        counts = Counter(task.selection["label"])
        assert [counts[i] for i in range(3)] == [held // 10, 3 * held // 10, 6 * held // 10]


@pytest.mark.parametrize("fraction", [0.05, 0.95])
def test_parts_with_no_room_for_all_classes_are_split_without_regard_to_them(fraction: float, tmp_path: Path):
    name = write(tmp_path / "rows.csv", many(40, list("abcde")))
    task = load(tmp_path, data=name, validation_fraction=fraction)
    assert len(task.selection) == round(40 * fraction) and len(task.label_names) == 5


def test_a_class_with_one_example_does_not_stop_the_split(tmp_path: Path):
    columns = many(50, ["a", "b"])
    columns["team"][7] = "c"
    task = load(tmp_path, data=write(tmp_path / "rows.csv", columns))
    assert task.label_names == ("a", "b", "c") and len(task.train) + len(task.selection) == 50


def test_a_regression_is_split_too(tmp_path: Path):
    columns = {"message": [f"m{i}" for i in range(40)], "team": [i / 7 for i in range(40)]}
    task = load(tmp_path, data=write(tmp_path / "rows.csv", columns), validation_fraction=0.25)
    assert (len(task.train), len(task.selection)) == (30, 10)
    assert dict(pairs_of(task.train, task.selection)) == pytest.approx(dict(zip(*columns.values(), strict=True)))


@pytest.mark.parametrize(("count", "fraction"), [(4, 0.1), (4, 1.0), (10, 0.01)])
def test_too_few_rows_to_split_is_an_error(count: int, fraction: float, tmp_path: Path):
    name = write(tmp_path / "rows.csv", many(count, ["a", "b"]))
    with pytest.raises(InputError, match=f"{count} rows cannot be split") as caught:
        load(tmp_path, data=name, validation_fraction=fraction)
    assert caught.value.where == "task.validation_fraction"


def three(base: Path) -> dict[str, str]:
    rows = {"message": list("wxyz"), "team": list("abab")}
    return {
        name: write(base / f"{name}.jsonl", {**rows, "message": [f"{name} {text}" for text in rows["message"]]})
        for name in ("train", "validation", "test")
    }


def test_the_validation_file_chooses_and_the_test_file_is_reported(tmp_path: Path):
    task = load(tmp_path, **three(tmp_path))
    assert list(task.report) == ["test"]
    assert task.train["text"][0] == "train w" and task.selection["text"][0] == "validation w"
    assert task.report["test"]["text"][0] == "test w"
    assert task.description["sizes"] == {"train": 4, "selection": 4, "report-test": 4}


def test_a_test_file_without_a_validation_file_has_one_split_off(tmp_path: Path):
    files = three(tmp_path)
    task = load(tmp_path, train=files["train"], test=files["test"], validation_fraction=0.25)
    assert (len(task.train), len(task.selection), len(task.report["test"])) == (3, 1, 4)


def test_half_dev_halves_own_validation_rows(tmp_path: Path):
    files = three(tmp_path)
    task = load(tmp_path, train=files["train"], validation=files["validation"], protocol="half-dev")
    assert task.selection["text"][:] == ["validation w", "validation x"]
    assert task.report["validation"]["text"][:] == ["validation y", "validation z"]


def test_half_dev_beside_a_test_set_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="test set") as error:
        load(tmp_path, **three(tmp_path), protocol="half-dev")
    assert error.value.where == "evaluate.protocol"


@pytest.mark.parametrize("changed", ["train", "validation", "test"])
def test_the_fingerprint_sees_every_file(changed: str, tmp_path: Path):
    files = three(tmp_path)
    before = load(tmp_path, **files).description["fingerprint"]
    assert load(tmp_path, **files).description["fingerprint"] == before
    write(tmp_path / files[changed], {"message": list("wxyz"), "team": list("abab")})
    assert load(tmp_path, **files).description["fingerprint"] != before


def test_the_fingerprint_sees_both_halves_of_the_validation_set(tmp_path: Path):
    texts, fingerprints = list("wxyz"), set()
    for changed in (None, 0, 3):
        name = write(tmp_path / "held.csv", {"message": [t if i != changed else "!" for i, t in enumerate(texts)],
                                             "team": list("abab")})  # fmt: skip
        files = {"train": three(tmp_path)["train"], "validation": name}
        fingerprints.add(load(tmp_path, protocol="half-dev", **files).description["fingerprint"])
    assert len(fingerprints) == 3


def test_the_fingerprint_sees_the_names_of_the_classes(tmp_path: Path):
    one = whole(tmp_path, {"message": list("wxyz"), "team": list("abab")})
    other = whole(tmp_path, {"message": list("wxyz"), "team": list("cdcd")})
    assert one.train["label"][:] == other.train["label"][:]
    assert one.description["fingerprint"] != other.description["fingerprint"]


# What is refused


def refused(base: Path, columns: dict[str, list], words: str, suffix: str = "jsonl", **values: Any) -> InputError:
    with pytest.raises(InputError, match=words) as caught:
        whole(base, columns, suffix, **values)
    return caught.value


@pytest.mark.parametrize(
    ("values", "there", "hint"),
    [
        ({"text": "mesage"}, "no text column 'mesage'; it has 'message', 'answer', 'team'", "did you mean 'message'?"),
        ({"text": ["message", "answers"]}, "no text column 'answers'", "did you mean 'answer'?"),
        ({"label": "Team"}, "no label column 'Team'", "did you mean 'team'?"),
        ({"label": "zzz"}, "no label column 'zzz'", None),
        ({"label": None}, "no label column 'label'", 'name it: task.label = "COLUMN"'),
    ],
)
def test_a_missing_column_gets_the_nearest_name(values: dict, there: str, hint: str | None, tmp_path: Path):
    assert refused(tmp_path, ROWS, there, **values).hint == hint


@pytest.mark.parametrize("suffix", KINDS)
def test_an_empty_file_is_an_error_that_names_it(suffix: str, tmp_path: Path):
    (tmp_path / f"rows.{suffix}").write_text("")
    with pytest.raises(InputError, match=rf"rows\.{suffix}") as caught:
        load(tmp_path, data=f"rows.{suffix}")
    assert caught.value.where == "task.data"


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.csv", "message,team\n"), ("rows.tsv", "message\tteam"), ("rows.json", "[]"), ("rows.jsonl", "\n\n")],
)
def test_a_file_without_rows_says_so(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="has no rows"):
        load(tmp_path, data=name)


def test_a_table_without_rows_says_so(tmp_path: Path):
    refused(tmp_path, {"message": [], "team": []}, "has no rows", "parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.csv", b"message,team\nx,a\ny,b,c\n", r"rows\.csv:3 has 3 columns, the header has 2"),
        ("rows.csv", b"message,team\nx\n", r"rows\.csv:2 has 1 column, the header has 2"),
        ("rows.csv", b"message,team,message\nx,a,y\n", "has two columns 'message'"),
        ("rows.csv", b'message,team\n"x,a\n', "not readable as CSV"),
        ("rows.csv", b"message,team\n\xff\xfe,a\n", "not readable as CSV"),
        ("rows.jsonl", b'{"message": "x", "team": 1}\n{"message": \n', r"rows\.jsonl:2 is not valid JSON"),
        ("rows.jsonl", b'["x", "a"]\n', "must be a JSON object"),
        ("rows.jsonl", b'{"message": "\xff", "team": 1}\n', "not readable as JSON lines"),
        ("rows.json", b'{"message": ["x"], "team": ["a"]}', "must hold a JSON array"),
        ("rows.json", b"[" * 100_000, "not readable as JSON"),
        ("rows.parquet", b"PAR1 and no more PAR1", "not readable as Parquet"),
        ("rows.xlsx", b"PK", r"rows\.xlsx is none of .*, \.csv"),
        ("rows", b"message,team\n", "rows is none of"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(name: str, content: bytes, words: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path, data=name)
    assert caught.value.where == "task.data"


def test_two_columns_of_one_name_are_refused_in_tables_too(tmp_path: Path):
    table = pa.table([["x", "y"], ["a", "b"], ["c", "d"]], names=["message", "team", "team"])
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="has two columns 'team'") as caught:
        load(tmp_path, data="rows.parquet")
    assert caught.value.hint == "rename one of them"


@pytest.mark.parametrize("given", ["absent.csv", "."])
def test_what_is_no_file_is_named(given: str, tmp_path: Path):
    with pytest.raises(InputError, match="no file at"):
        load(tmp_path, data=given)


@pytest.mark.parametrize(
    ("suffix", "hole"),
    [("jsonl", None), ("json", None), ("parquet", None), ("jsonl", math.nan), ("json", math.nan)],
)
def test_a_missing_text_is_named_by_its_row(suffix: str, hole: float | None, tmp_path: Path):
    error = refused(tmp_path, {**ROWS, "answer": ["a", "b", hole, "d", "e", "f"]}, "row 3 has no 'answer'", suffix,
                    text=["message", "answer"])  # fmt: skip
    assert error.where == "task.text"


@pytest.mark.parametrize("suffix", KINDS)
def test_a_row_without_any_text_is_named(suffix: str, tmp_path: Path):
    columns = {"message": ["x", "", " ", "y"], "answer": ["a", "b", "", "d"], "team": list("abab")}
    refused(tmp_path, columns, "2 rows without text, the first is row 2", suffix)
    refused(tmp_path, columns, "1 row without text, the first is row 3", suffix, text=["message", "answer"])


def test_a_key_that_a_row_lacks_is_a_hole(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"message": "x", "team": 1}\n{"team": 0}\n{"message": "y"}\n')
    with pytest.raises(InputError, match="row 2 has no 'message'"):
        load(tmp_path, data="rows.jsonl")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_missing_labels_are_counted_and_the_first_is_named(suffix: str, tmp_path: Path):
    hole = "" if suffix == "csv" else None
    error = refused(
        tmp_path, {**ROWS, "team": ["a", hole, "b", "a", hole, "b"]}, "2 rows without a label.*row 2", suffix
    )
    assert error.where == "task.label"
    refused(tmp_path, {**ROWS, "team": [0.5, 1.5, hole, 2.5, 1.0, 2.0]}, "1 row without a label.*row 3", suffix)


@pytest.mark.parametrize("value", [["a"], {"is": "a"}])
def test_lists_and_objects_are_neither_text_nor_label(value: Any, tmp_path: Path):
    several = [value] * 6
    kind = {"type": "classification"}
    refused(
        tmp_path, {**ROWS, "team": several}, "the label of row 1 is (an array|a table), not one text or number", **kind
    )
    refused(tmp_path, {**ROWS, "message": several}, "'message' of row 1 is (an array|a table), not a text")


def test_bytes_are_no_text(tmp_path: Path):
    refused(tmp_path, {**ROWS, "message": [b"x"] * 6}, "'message' of row 1 is bytes, not a text", "parquet")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["1.5", "2", "high", "4"], "row 3: the label of a regression is 'high', not a number"),
        ([1.5, 2, "nan", 4], "row 3: the label of a regression is 'nan', not a number"),
        ([1.5, 2, math.inf, 4], "row 3: the label of a regression is inf, not a number"),
    ],
)
def test_labels_of_a_regression_must_be_numbers(labels: list, words: str, tmp_path: Path):
    refused(tmp_path, {"message": list("wxyz"), "team": labels}, words, type="regression")


def test_equal_labels_teach_nothing(tmp_path: Path):
    error = refused(tmp_path, {**ROWS, "team": ["a"] * 6}, r"has one class only \('a'\)")
    assert error.where == "task.label"
    refused(tmp_path, {**ROWS, "team": ["a"] * 6}, "has one class only", labels=["a", "b"])
    refused(tmp_path, {**ROWS, "team": [1.5] * 6}, "all labels are equal")


def test_labels_must_have_every_class_once(tmp_path: Path):
    error = refused(tmp_path, ROWS, r"label 'help', which is not in task.labels \(sales, support\)",
                    labels=["sales", "support"])  # fmt: skip
    assert error.where == "task.labels"
    refused(tmp_path, ROWS, "a class is listed twice", labels=["sales", "help", "sales"])
    refused(tmp_path, {**ROWS, "team": [1.5, 2, 3, 4, 5, 6]}, 'type = "regression" has no labels', type="regression",
            labels=["1", "2"])  # fmt: skip


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_class_that_training_does_not_have_is_named_with_its_file(split: str, tmp_path: Path):
    files = three(tmp_path)
    write(tmp_path / files[split], {"message": list("wx"), "team": list("ac")})
    with pytest.raises(
        InputError, match=rf"{split}\.jsonl: row 2 has the label 'c', which the training data does not have"
    ):
        load(tmp_path, **files)


# Sets of the hub, from a folder that the library reads like one


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def put(folder: Path, split: str, labels: list[int], names: list[str] | None = None) -> None:
    features = Features({"message": Value("string"), "team": ClassLabel(names=names) if names else Value("int64")})
    rows = Dataset.from_dict({"message": [f"{split} {i}" for i in range(len(labels))], "team": labels}, features)
    rows.to_parquet(folder / f"{split}.parquet")


def test_a_set_has_its_own_splits_and_its_own_class_names(hub: Path):
    names = ["spam", "ham"]
    for split, size in (("train", 6), ("validation", 4), ("test", 2)):
        put(hub, split, [i % 2 for i in range(size)], names)
    task = load(hub.parent, hub=str(hub))
    assert [len(task.train), len(task.selection), len(task.report["test"])] == [6, 4, 2]
    assert task.label_names == ("ham", "spam") and task.train["label"][:2] == [1, 0]
    assert load(hub.parent, hub=str(hub), labels=names).train["label"][:2] == [0, 1]


def test_numbers_without_names_stay_numbers(hub: Path):
    put(hub, "train", [1, 0] * 10)
    task = load(hub.parent, hub=str(hub))
    assert task.label_names == ("0", "1") and (len(task.train), len(task.selection)) == (18, 2)


def test_a_test_split_without_answers_is_not_scored(hub: Path):
    put(hub, "train", [1, 0] * 5, ["no", "yes"])
    put(hub, "validation", [1, 0], ["no", "yes"])
    put(hub, "test", [-1, -1, -1], ["no", "yes"])
    assert list(load(hub.parent, hub=str(hub)).report) == ["validation"]


def test_a_set_without_training_rows_lists_what_it_has(hub: Path):
    put(hub, "test", [0, 1])
    with pytest.raises(InputError, match="has no split named train; it has test") as caught:
        load(hub.parent, hub=str(hub))
    assert caught.value.where == "task.hub"


def test_a_set_that_cannot_be_read_is_an_input_error(hub: Path):
    with pytest.raises(InputError, match="cannot load the data set") as caught:
        load(hub.parent, hub=str(hub))
    assert caught.value.where == "task.hub" and caught.value.hint is not None


# Held-out rows for a finished model


def model(*names: str) -> Any:
    return SimpleNamespace(num_labels=max(1, len(names)), id2label=dict(enumerate(names)), problem_type=None)


def rows_for(
    base: Path, columns: dict[str, list], config: Any, text: tuple[str, ...] = ("message",), **values: Any
) -> Task:
    path = base / write(base / "held.csv", columns)
    section = TaskSection(name="held", data=str(path), text=list(text), label="team", **values)
    kinds = [kind for kind in registry.usable()[0] if kind.head == SEQUENCE_CLASSIFICATION]
    kind = next(kind for kind in kinds if kind.fits(config))
    return load_rows(section, kind, config)


def test_held_out_rows_have_the_models_order(tmp_path: Path):
    task = rows_for(tmp_path, ROWS, model("sales", "help"), ("message", "answer"))
    assert task.label_names == ("sales", "help") and task.report["rows"]["label"][:] == [0, 1, 0, 1, 0, 1]
    assert "text_pair" in task.train.column_names and task.report["rows"]["text"][:] == ROWS["message"]


NUMBERED = {"message": list("wxy"), "team": [1, 0, 1]}


def test_integers_are_no_classes_of_a_model_that_names_its_own(tmp_path: Path):
    words = r"integer labels \(0, 1\), but the model's classes have names \(sales, help\)"
    with pytest.raises(InputError, match=words) as caught:
        rows_for(tmp_path, NUMBERED, model("sales", "help"))
    assert caught.value.where == "task.labels" and "--labels sales,help" in str(caught.value.hint)


@pytest.mark.parametrize(("labels", "expected"), [(["sales", "help"], [1, 0, 1]), (["Help", "SALES"], [0, 1, 0])])
def test_integers_count_the_classes_that_are_named_for_them(labels: list[str], expected: list[int], tmp_path: Path):
    task = rows_for(tmp_path, NUMBERED, model("sales", "help"), labels=labels)
    assert task.label_names == ("sales", "help") and task.report["rows"]["label"][:] == expected


def test_integers_count_the_classes_of_a_model_without_names(tmp_path: Path):
    assert rows_for(tmp_path, NUMBERED, model("LABEL_0", "LABEL_1")).report["rows"]["label"][:] == [1, 0, 1]


def test_held_out_labels_match_as_a_teachers_do(tmp_path: Path):
    task = rows_for(tmp_path, {"message": list("wxy"), "team": ["HELP ", "sales", "Help"]}, model("Sales", "help"))
    assert task.report["rows"]["label"][:] == [1, 0, 1]


def test_numbers_that_are_names_are_names(tmp_path: Path):
    task = rows_for(tmp_path, {"message": list("wxy"), "team": [1, 0, 1]}, model("1", "0"))
    assert task.report["rows"]["label"][:] == [0, 1, 0]


def test_held_out_rows_of_a_single_class_can_be_scored(tmp_path: Path):
    assert rows_for(tmp_path, {"message": ["x"], "team": ["help"]}, model("sales", "help")).report["rows"]["label"][
        :
    ] == [1]


def test_a_model_with_one_output_takes_numbers(tmp_path: Path):
    task = rows_for(tmp_path, {"message": list("wxy"), "team": [1, 0, 3]}, model())
    assert task.kind.name == "regression" and task.report["rows"]["label"][:] == [1.0, 0.0, 3.0]


def test_a_label_that_the_model_does_not_have_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"has the label 'press', which the model does not have \(sales, help\)"):
        rows_for(tmp_path, {**ROWS, "team": ["sales", "press"] * 3}, model("sales", "help"))


# Names for integers


@pytest.mark.parametrize("suffix", KINDS)
def test_integers_in_the_data_count_the_classes_of_the_recipe(suffix: str, tmp_path: Path):
    columns = {"message": list("wxyz"), "team": [2, 0, 1, 0]}
    task = whole(tmp_path, columns, suffix, labels=["ABBR", "DESC", "ENTY"])
    assert task.label_names == ("ABBR", "DESC", "ENTY") and task.train["label"][:] == [2, 0, 1, 0]


def test_integers_that_the_recipe_names_are_names(tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": [1, 0, 1, 0]}, labels=["1", "0"])
    assert task.label_names == ("1", "0") and task.train["label"][:] == [0, 1, 0, 1]


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [1, 2, 1, 2], ["0", "DESC", "0", "DESC"], [-1, 0, 1, 0]])
def test_integers_that_do_not_count_the_classes_are_refused(labels: list, tmp_path: Path):
    refused(tmp_path, {"message": list("wxyz"), "team": labels}, "which is not in task.labels", labels=["ABBR", "DESC"])


# What the names of classes look like


def test_white_space_around_labels_and_unicode_forms_make_no_classes_and_are_told(tmp_path: Path):
    composed, parted = "caf\u00e9", "cafe\u0301"
    task = whole(tmp_path, {"message": list("uvwxyz"), "team": ["tea", " tea", "tea\u00a0", composed, parted, parted]})
    assert task.label_names == (composed, "tea") and task.train["label"][:] == [1, 1, 1, 0, 0, 0]
    [note] = [note for note in task.notes if "labels have" in note]
    assert "rows.jsonl: 4 labels have another Unicode form" in note and "'cafe\\u0301'" in note


def test_names_in_the_recipe_are_cleaned_like_labels(tmp_path: Path):
    assert whole(tmp_path, ROWS, labels=[" sales", "help "]).label_names == ("sales", "help")
    refused(tmp_path, ROWS, "a class is listed twice", labels=["sales", "help", "help "])


@pytest.mark.parametrize(
    "names", [("Sports", "sports"), ("non-toxic", "non toxic"), ("a b", "ab"), ("yes", "yes\u200b"), ("\uff21", "a")]
)
def test_names_that_look_like_one_class_are_warned_of(names: tuple[str, str], tmp_path: Path):
    columns = {"message": list("wxyz"), "team": [*names, *names]}
    assert any("are they one?" in note and repr(names[0]) in note for note in whole(tmp_path, columns).notes)
    assert not any("are they one?" in note for note in whole(tmp_path, columns, labels=list(names)).notes)


@pytest.mark.parametrize("names", [("c", "c++"), ("-1", "1"), ("1.5", "15"), ("good", "bad"), ("+", "-")])
def test_names_that_differ_are_not_warned_of(names: tuple[str, str], tmp_path: Path):
    task = whole(tmp_path, {"message": list("wxyz"), "team": [*names, *names]}, type="classification")
    assert not any("are they one?" in note for note in task.notes)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_scores_with_decimal_commas_are_no_classes(suffix: str, tmp_path: Path):
    columns = {"message": list("wxyz"), "team": ["0,5", "1", "2,75", "-3,0"]}
    error = refused(tmp_path, columns, "look like numbers with decimal commas, such as '-3,0'", suffix)
    assert error.where == "task.label" and "decimal points" in str(error.hint)
    assert "decimal points" in str(refused(tmp_path, columns, "not a number", suffix, type="regression").hint)
    assert whole(tmp_path, columns, suffix, type="classification").kind.name == "classification"


@pytest.mark.parametrize("scores", [["3,5"], ["3.5"], ["1.234,5", "12"], ["3,5 %"], ["1,234.5", "7"]])
def test_scores_with_other_words_among_them_are_remarked_on(scores: list[str], tmp_path: Path):
    labels = [scores[i % len(scores)] for i in range(12)]
    labels[6] = "n/a"
    notes = whole(tmp_path, {"message": list("abcdefghijkl"), "team": labels}).notes
    [note] = [note for note in notes if "look like numbers" in note]
    assert "11 of 12 labels look like numbers; the first that does not is 'n/a' in row 7" in note
    assert 'task.type = "regression" needs numbers' in note


@pytest.mark.parametrize(
    "labels", [["1", "2", "n/a", "2", "1"], ["1.5", "good", "bad", "good", "bad"], ["a", "b", "a", "b", "a"]]
)
def test_other_classes_are_not_taken_for_scores(labels: list[str], tmp_path: Path):
    notes = whole(tmp_path, {"message": list("abcde"), "team": labels}).notes
    assert not any("look like numbers" in note for note in notes)


def test_shares_are_remarked_on_and_grouped_numbers_refused(tmp_path: Path):
    columns = {"message": list("wxyz"), "team": ["10 %", "20 %", "10 %", "20 %"]}
    assert any("4 of 4 labels look like numbers" in note for note in whole(tmp_path, columns).notes)
    refused(tmp_path, {"message": list("wxyz"), "team": ["1.234,5", "2", "3,5 %", "4"]}, "decimal commas")


def test_truth_values_are_the_same_classes_in_every_kind_of_file(tmp_path: Path):
    texts = list("wxyz")
    (tmp_path / "pandas.csv").write_text("message,team\nw,True\nx,False\ny,TRUE\nz,false\n")
    names = [
        write(tmp_path / f"rows.{suffix}", {"message": texts, "team": [True, False, True, False]})
        for suffix in ("jsonl", "json", "parquet")
    ]
    for train, validation in [("pandas.csv", name) for name in names] + [(name, "pandas.csv") for name in names]:
        task = load(tmp_path, train=train, validation=validation)
        assert task.label_names == ("false", "true")
        assert task.train["label"][:] == task.selection["label"][:] == [1, 0, 1, 0]
        named = load(tmp_path, train=train, validation=validation, labels=["True", "False"])
        assert named.label_names == ("True", "False") and named.train["label"][:] == [0, 1, 0, 1]


def test_of_many_classes_an_error_shows_the_nearest_five(tmp_path: Path):
    names = [f"topic {word}{number}" for word in ("art", "law", "sport") for number in range(60)]
    names.append("balance_not_updated")
    columns = {"message": [f"m{i}" for i in range(len(names))], "team": names}
    held = write(tmp_path / "held.jsonl", {"message": ["x"], "team": ["Balance not updated"]})
    with pytest.raises(InputError, match="which the training data does not have") as caught:
        load(tmp_path, train=write(tmp_path / "rows.jsonl", columns), validation=held)
    assert "181 classes; the nearest are balance_not_updated, " in caught.value.message
    assert len(caught.value.message) < 250


# How many rows a score stands on


def test_samples_of_the_validation_set_leave_the_test_set_whole(tmp_path: Path):
    files = {
        name: write(tmp_path / f"{name}.csv", many(size, ["a", "b"]))
        for name, size in (("train", 60), ("validation", 50), ("test", 40))
    }
    task = load(tmp_path, **files, train_samples=20, validation_samples=12)
    assert [len(task.train), len(task.selection), len(task.report["test"])] == [20, 12, 40]
    assert len(load(tmp_path, **files, test_samples=15).report["test"]) == 15
    assert task.description["sizes"]["report-test"] == 40


def test_samples_of_a_test_set_that_is_not_there_are_refused(tmp_path: Path):
    name = write(tmp_path / "rows.csv", many(40, ["a", "b"]))
    with pytest.raises(InputError, match="there is no test set") as caught:
        load(tmp_path, data=name, test_samples=10)
    assert caught.value.where == "task.test_samples"


@pytest.mark.parametrize(("rows", "said"), [(1, "validation set has 1 row only"), (4, "has 4 rows only"), (10, None)])
def test_a_score_on_next_to_nothing_is_remarked_on(rows: int, said: str | None, tmp_path: Path):
    train = write(tmp_path / "rows.csv", many(40, ["a", "b"]))
    task = load(tmp_path, train=train, validation=write(tmp_path / "held.csv", many(rows, ["a", "b"])))
    assert [note for note in task.notes if said is None or said not in note] == []
    assert len(task.notes) == (said is not None)
