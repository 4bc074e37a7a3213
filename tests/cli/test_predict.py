"""`kdcli predict`: the examples that it takes, the replies that it writes, and what it writes them into."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import World
from families import tiny, tokenizer
from tiny_recipes import run_recipe, tiny_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.models.heads import with_new_head
from kdcli.models.save import save_model
from kdcli.tasks import registry
from kdcli.tasks.heads import load_model

TEXTS = ["a fine film", "a dull film", "dark"]


def probabilities(folder: Path, *texts: str) -> list[float]:
    """Return what the library computes for one example."""
    with torch.no_grad():
        return load_model(folder)(**tokenizer()(*texts, return_tensors="pt")).logits[0].softmax(-1).tolist()


def documents(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def type_in(world: World, text: str | bytes) -> None:
    """Let standard input be a text."""
    stream = io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text), encoding="ascii")
    world.monkeypatch.setattr(sys, "stdin", stream)


def test_texts_are_answered_in_their_order(world: World):
    folder = world.model()
    outcome = world.call("predict", "teacher", *TEXTS, "--json", "--top", "2")
    assert outcome.code == 0 and outcome.err == ""
    for text, found in zip(TEXTS, documents(outcome.out), strict=True):
        no, yes = probabilities(folder, text)
        assert found["label"] == ("yes" if yes > no else "no")
        assert [entry["probability"] for entry in found["top"]] == pytest.approx(sorted([no, yes])[::-1], abs=1e-6)
        assert list(found) == ["label", "probability", "top"]
    people = world.call("predict", "teacher", *TEXTS)
    assert [line.split("  ") for line in people.out.splitlines()] == [
        [f"{row['label']} {row['probability']:.3f}", text]
        for row, text in zip(documents(outcome.out), TEXTS, strict=True)
    ]
    assert "    no 0." in world.call("predict", "teacher", "dark", "--top", "2").out


def test_every_way_in_gives_the_same_replies(world: World):
    world.model()
    expected = documents(world.call("predict", "teacher", *TEXTS, "--json").out)
    world.write("texts.txt", "\n".join(TEXTS))

    def same(*arguments: str) -> None:
        found = documents(world.call("predict", "teacher", *arguments, "--json").out)
        assert found == [{**row, "probability": pytest.approx(row["probability"], abs=1e-6)} for row in expected]

    world.csv("rows.csv", [(text, "yes") for text in TEXTS], "text,label")
    world.write("rows.jsonl", "".join(json.dumps({"n": 1, "message": text}) + "\n" for text in TEXTS))
    for arguments in (
        ["--input", "texts.txt"],
        ["--input", "rows.csv", "--batch-size", "1"],
        ["--input", "rows.jsonl", "--text", "message"],
        ["--input", "rows.jsonl", "--set", "text=message"],
    ):
        same(*arguments)
    for arguments, typed in (
        (["-"], "\n".join(TEXTS) + "\n"),
        (["--input", "-", "--batch-size", "2"], "\ufeff" + "\r\n".join(TEXTS)),
        (["-", "--json-input"], "".join(json.dumps(text) + "\n" for text in TEXTS)),
        (["-", "--json-input"], "".join(json.dumps({"text": text, "id": 7}) + "\n" for text in TEXTS)),
    ):
        type_in(world, typed)
        same(*arguments)
    type_in(world, "caf\xe9".encode("latin-1"))
    found = world.call("predict", "teacher", "-", "--encoding", "latin-1", "--json", "--echo")
    assert documents(found.out)[0]["text"] == "café"


def test_pairs_are_given_in_twos_or_with_a_text_that_is_the_same_for_all(world: World):
    world.model("regressor")
    world.write("second.txt", "a dull film")
    with torch.no_grad():
        expected = [
            float(load_model(world.folder / "teacher")(**tokenizer()(text, "a dull film", return_tensors="pt")).logits)
            for text in TEXTS
        ]
    world.csv("pairs.csv", [(text, "a dull film") for text in TEXTS], "one,other")
    for arguments in (
        ["--pair", *(part for text in TEXTS for part in (text, "a dull film"))],
        ["--pair", *TEXTS, "--with", "text_pair=@second.txt"],
        ["--input", "pairs.csv", "--text", "one,other"],
    ):
        found = documents(world.call("predict", "teacher", *arguments, "--json").out)
        assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5), arguments
    one = world.call("predict", "teacher", "--pair", "--with", "text=dark", "--with", "text_pair=a dull film", "--json")
    assert [row["score"] for row in documents(one.out)] == pytest.approx(expected[2:], abs=1e-5)


def test_many_rows_are_written_part_by_part_and_in_order(world: World):
    world.model("regressor")
    texts = [" ".join(["film"] * (1 + number * 7 % 40)) for number in range(70)]
    world.write("texts.txt", "\n".join(texts))
    parts = documents(world.call("predict", "teacher", "--input", "texts.txt", "--batch-size", "2", "--json").out)
    whole = documents(world.call("predict", "teacher", "--input", "texts.txt", "--json").out)
    assert [row["score"] for row in parts] == pytest.approx([row["score"] for row in whole], abs=1e-5)
    by_text: dict[str, float] = {}
    assert all(
        by_text.setdefault(t, row["score"]) == pytest.approx(row["score"], abs=1e-5)
        for t, row in zip(texts, whole, strict=True)
    )
    assert len({round(score, 4) for score in by_text.values()}) > 20


def test_files_hold_the_same_replies(world: World):
    world.model()
    expected = documents(world.call("predict", "teacher", *TEXTS, "--json", "--echo").out)
    outcome = world.call("predict", "teacher", *TEXTS, "--echo", "--output", "new/replies.jsonl", "--json")
    assert outcome.json["rows"] == 3 and outcome.json["output"] == "new/replies.jsonl"
    assert documents((world.folder / "new" / "replies.jsonl").read_text()) == expected
    assert world.call("predict", "teacher", *TEXTS, "--echo", "--output", "replies.csv").out == "replies.csv: 3 rows\n"
    with (world.folder / "replies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{**row, "probability": float(row["probability"])} for row in rows] == expected
    again = world.call("predict", "teacher", TEXTS[0], "--output", "replies.csv")
    assert again.code == 2 and "replies.csv exists already" in again.err
    assert world.call("predict", "teacher", "dark", "--output", "replies.csv", "--force").code == 0
    assert len((world.folder / "replies.csv").read_text().splitlines()) == 2


def test_an_error_on_the_way_leaves_no_file(world: World):
    world.model()
    type_in(world, "dark\n\ndark\n")
    outcome = world.call("predict", "teacher", "-", "--batch-size", "1", "--output", "replies.jsonl")
    assert outcome.code == 2 and "standard input:2 is empty" in outcome.err
    assert list(world.folder.glob("*replies*")) == []


def test_a_second_model_answers_beside_and_its_classes_are_put_into_order(world: World):
    first, second = world.model(), world.folder / "second"
    second.mkdir()
    other = tiny("bert", seed=3, id2label={0: "Yes", 1: "NO"})
    save_model(other, second, tokenizer())
    outcome = world.call("predict", "teacher", *TEXTS, "--beside", "second", "--json")
    rows = documents(outcome.out)
    for text, row in zip(TEXTS, rows, strict=True):
        assert row["beside"]["label"] in ("no", "yes"), "as the first model calls them"
        assert row["beside"]["probability"] == pytest.approx(max(probabilities(second, text)), abs=1e-6)
        yes, no = probabilities(second, text)
        mine = probabilities(first, text)
        assert row["agree"] == ((yes > no) == (mine[1] > mine[0]))
    agreeing = sum(row["agree"] for row in rows)
    assert f"agree: {agreeing} of 3 rows" in outcome.err
    world.call("predict", "teacher", *TEXTS, "--beside", "second", "--output", "both.csv")
    header = (world.folder / "both.csv").read_text().splitlines()[0]
    assert header == "label,probability,beside.label,beside.probability,agree"


def test_embeddings_come_as_one_array_in_the_order_of_the_texts(world: World):
    for name, layers in (("one", 2), ("other", 1)):
        head = registry.get("sentence-embedding").head
        (world.folder / name).mkdir()
        save_model(with_new_head(tiny("bert", layers=layers), head), world.folder / name, tokenizer())
    texts = [" ".join(["film"] * count) for count in (3, 9, 1, 5, 2)]
    rows = documents(world.call("predict", "one", *texts, "--json", "--beside", "other").out)
    expected = np.array([row["embedding"] for row in rows])
    for source in (["-", "--batch-size", "2"], ["--input", world.write("texts.txt", "\n".join(texts))]):
        type_in(world, "\n".join(texts))
        assert world.call("predict", "one", *source, "--output", "found.npy", "--force").code == 0
        found = np.load(world.folder / "found.npy", mmap_mode="r")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    for row in rows:
        own, others = (np.array(each["embedding"]) for each in (row, row["beside"]))
        cosine = own @ others / np.linalg.norm(own) / np.linalg.norm(others)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    refused = world.call("predict", "one", "film", "--beside", "other", "--output", "both.npy")
    assert refused.code == 2 and "both.npy takes vectors alone" in refused.err


@pytest.mark.slow
def test_a_reader_that_goes_is_no_error_and_a_pipe_is_answered_line_by_line(world: World):
    world.model()
    command = [sys.executable, "-m", "kdcli", "predict", "teacher", "-", "--batch-size", "1", "--json"]
    with subprocess.Popen(
        command, cwd=world.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for text in TEXTS:
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["label"] in ("no", "yes")
        process.stdout.close()
        process.stdin.write("dark\n")
        process.stdin.flush()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the built-in reviews, and its exported student."""
    folder = tmp_path_factory.mktemp("runs")
    run_recipe(write_recipe(folder / "first.toml", tiny_recipe(teacher={"finetune": {"max_steps": 20}})))
    return folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(runs)
    return runs


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict[str, Any]], str]:
    capsys.readouterr()
    assert run(["predict", *arguments, "--json"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    return documents(captured.out), captured.err


def test_the_newest_run_answers_where_no_model_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    [found], _ = answered(capsys, "a fine film")
    for name in ("runs/first", "runs/latest", "runs/first/student"):
        assert answered(capsys, name, "a fine film")[0] == [found]
    assert answered(capsys, "--with", "text=a fine film")[0] == [found]
    assert found["label"] in ("negative", "positive")


def test_the_teacher_of_a_run_answers_as_it_does_alone(here: Path, capsys: pytest.CaptureFixture[str]):
    teacher = json.loads((here / "runs" / "first" / "run.json").read_text())["teacher_path"]
    alone, _ = answered(capsys, teacher, *TEXTS)
    rows, told = answered(capsys, "runs/first", *TEXTS, "--beside", "teacher")
    assert [row["beside"] for row in rows] == alone
    assert [row["agree"] for row in rows] == [row["label"] == row["beside"]["label"] for row in rows]
    assert "of 3 rows" in told


@pytest.mark.slow
@pytest.mark.data
def test_a_run_on_pairs_takes_texts_in_twos(data_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    task = {"name": "rte", "train_samples": 48, "validation_samples": 24}
    run_recipe(write_recipe(tmp_path / "rte.toml", tiny_recipe(task=task)))
    typed, _ = answered(capsys, "runs/rte", *TEXTS, TEXTS[0])
    (tmp_path / "rows.csv").write_text("sentence2,sentence1\na dull film,a fine film\na fine film,dark\n")
    read, _ = answered(capsys, "runs/rte", "--input", "rows.csv")
    assert len(typed) == 2 and typed == read and {row["label"] for row in typed} <= {"entailment", "not_entailment"}
    assert run(["predict", "runs/rte", "a fine film"]) == 2


@pytest.mark.slow
def test_an_onnx_folder_answers_as_its_model_does(here: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["export", "runs/first", "--no-latency"]) == 0
    texts = [" ".join(["a fine and dull film"] * count) for count in (1, 9, 3)]
    expected, _ = answered(capsys, "runs/first", *texts)
    found, _ = answered(capsys, "runs/first/onnx", *texts)
    assert found == [{**row, "probability": pytest.approx(row["probability"], abs=1e-5)} for row in expected]
