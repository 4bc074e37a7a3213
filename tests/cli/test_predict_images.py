"""`kdcli predict` and `kdcli eval` on files, folders, tables and lists of images."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import tiny
from PIL import Image
from scripts import answers_of_script
from transformers import ViTImageProcessor

from kdcli.cli.app import run
from kdcli.cli.predict import IMAGES
from kdcli.data.images import suffixes
from kdcli.export.export import export_model

NAMES = {0: "cat", 1: "dog", 2: "ship"}

Command = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its graph, and images of one size in folders of classes; none is resized."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny("vit", layers=1, labels=3, id2label=NAMES, label2id={name: number for number, name in NAMES.items()})
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for one in (model, processor):
        one.save_pretrained(folder / "model")
    export_model(model, processor, folder / "onnx", task=None, latency=False)
    drawn = np.random.default_rng(0)
    for place in ("cat/1.png", "cat/2.jpg", "dog/deep/3.png", "ship/4.png"):
        path = folder / "photos" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (folder / "photos" / "notes.txt").write_text("no image\n")
    return folder


@pytest.fixture
def predict(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command in the world's folder, and returns what it prints as JSON."""
    monkeypatch.chdir(world)

    def command(*arguments: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        code = run(["predict", *map(str, arguments), "--json"])
        found = capsys.readouterr()
        assert code == 0, found.err
        return [json.loads(line) for line in found.out.splitlines()]

    return command


def expected(world: Path, path: Path) -> dict[str, Any]:
    """Return the answer by the library alone."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(world / "model")
    pixels = AutoImageProcessor.from_pretrained(world / "model")(Image.open(path), return_tensors="pt")
    with torch.no_grad():
        shares = model(**pixels).logits.softmax(-1)[0]
    return {"label": NAMES[int(shares.argmax())], "probability": pytest.approx(float(shares.max()), abs=1e-5)}


def test_files_and_folders_are_answered_in_order_by_the_model_and_by_its_graph(world: Path, predict: Command):
    files = sorted(path for path in (world / "photos").rglob("*") if path.suffix in (".png", ".jpg"))
    answers = [{"image": str(path.relative_to(world)), **expected(world, path)} for path in files]
    assert len(answers) == 4
    assert predict("model", "photos") == answers
    assert predict("onnx", *files) == answers
    assert predict("model", files[3], "photos/cat") == [answers[3], *answers[:2]]
    assert predict("model", "--input", "photos/dog") == [answers[2]]
    [best] = predict("model", files[0], "--top", 3)
    assert best["top"][0] == {key: best[key] for key in ("label", "probability")}
    assert sorted(entry["label"] for entry in best["top"]) == ["cat", "dog", "ship"]


def test_the_script_beside_a_graph_says_the_same(world: Path, predict: Command):
    files = [str(world / "photos" / name) for name in ("cat/1.png", "cat/2.jpg", "ship/4.png")]
    found = answers_of_script(world / "onnx", files)
    lines = (world / "onnx" / "predict.py").read_text().splitlines()
    # Two blank lines on both sides of the function.
    at = [number for number, line in enumerate(lines) if line.startswith(("def pixels", "logits = "))]
    assert [lines[number - 3 : number].count("") for number in at] == [2, 2]
    assert found == [{key: near(row[key]) for key in ("label", "probability")} for row in predict("model", *files)]


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def test_tables_and_lists_hold_paths_from_their_own_folder_or_bytes(world: Path, predict: Command):
    first, last = world / "photos" / "cat" / "1.png", world / "photos" / "ship" / "4.png"
    answers = [expected(world, first), expected(world, last)]

    def without_images(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "image"} for row in found]

    (world / "photos" / "table.csv").write_text("name,image\na,cat/1.png\nb,ship/4.png\n")
    (world / "photos" / "list.txt").write_text(f"cat/1.png\n{last}\n")
    for given in ("table.csv", "list.txt"):
        assert without_images(predict("model", "--input", world / "photos" / given)) == answers
    assert predict("model", "--input", "photos/table.csv") == answers
    rows = pa.table({"picture": [first.read_bytes(), last.read_bytes()]})
    pq.write_table(rows, world / "bytes.parquet")
    found = predict("model", "--input", "bytes.parquet", "--beside", "onnx", "--echo")
    assert [{key: row[key] for key in ("label", "probability")} for row in found] == answers
    assert all(row["agree"] for row in found) and found[0]["image"] == f"{first.stat().st_size:,} bytes"


def test_lines_of_standard_input_are_files(world: Path, predict: Command, monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.write(write, b"photos/cat/1.png\nphotos/ship/4.png\n")
    os.close(write)
    with open(read, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        found = predict("model", "-", "--batch-size", 1)
    assert [row["image"] for row in found] == ["photos/cat/1.png", "photos/ship/4.png"]


@pytest.mark.parametrize("arguments", [["photos/cat/1.png"], ["photos"], ["photos", "photos/cat/2.jpg"]])
def test_files_and_folders_of_images_are_no_models(
    arguments: list[str], world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(world)
    assert run(["predict", *arguments]) == 2
    assert "no run yet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "run.json", "model.onnx"])
def test_a_model_with_pictures_beside_it_is_one(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for one in (name, "photo.png"):
        (tmp_path / "model" / one).touch()
    assert run(["predict", "model"]) == 2
    assert "nothing to answer" in (told := capsys.readouterr().err) and "folders of images" in told


def test_names_of_images_are_all_those_that_are_read():
    assert suffixes() <= set(IMAGES)


def test_of_several_frames_the_file_is_named(world: Path, capsys: pytest.CaptureFixture[str]):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(world / "moving.gif", save_all=True, append_images=frames[1:])
    assert run(["predict", str(world / "model"), str(world / "moving.gif")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"1 image of {world}/moving.gif has several frames or pages" in told


def test_a_graph_is_scored_on_a_folder_of_classes_as_its_model_is(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(world)
    scores = []
    for model in ("model", "onnx"):
        assert run(["eval", model, "--data", "photos", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["metrics"])
    assert scores[0] == scores[1]
    labels = [expected(world, path)["label"] for path in sorted((world / "photos").rglob("*.[pj][np]g"))]
    hits = [label == truth for label, truth in zip(labels, ["cat", "cat", "dog", "ship"], strict=True)]
    assert next(iter(scores[0].values()))["accuracy"] == pytest.approx(sum(hits) / 4)
