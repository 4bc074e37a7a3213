"""A kind of task and a family of models from outside: a package with entry points, and all commands on them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import tiny_recipe, write_recipe

PACKAGE = '''
"""Tags of words, and ERNIE: neither is in the package."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from kdcli.data.rows import batches_of, stored, values_of
from kdcli.models.families import Family, Matrix
from kdcli.objectives.distribution import Categorical, row_weights
from kdcli.signals import Prediction
from kdcli.tasks.encode import IDS, Collator
from kdcli.tasks.kind import Fields, TaskKind
from kdcli.tasks.labels import align_outputs, in_order, named_outputs, to_ids
from kdcli.tasks.token_classification import TOKEN_CLASSIFICATION


class TagFields(Fields):
    words: str = Field(default="words", description="The column with the words of a row.")
    tags: str = Field(default="tags", description="The column with a tag for each word.")


class Tagging(TaskKind):
    name = "tagging"
    title = "a tag for each word"
    head = TOKEN_CLASSIFICATION
    fields = TagFields
    provides = frozenset({"labels", "classes"})
    metrics = usual_metrics = ("word_accuracy",)
    distribution = Categorical()

    def read(self, columns, fields, source, notes, labels=None):
        words, tags = list(columns[fields.words]), list(columns[fields.tags])
        labels = labels or in_order({tag for row in tags for tag in row})
        numbers = [to_ids(row, labels, source).tolist() for row in tags]
        return pa.table({"words": words, "label": numbers}), labels

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return named_outputs(labels)

    def align(self, model, labels, owner, names=None):
        return align_outputs(model, labels, owner, names)

    def texts(self, rows) -> Iterator[str]:
        return (" ".join(words) for words in values_of(rows, "words"))

    def check(self, task, processor, max_length) -> None:
        assert len(self.encode(task.train.select([0]), processor, max_length)) == 1

    def encode(self, rows, processor, max_length):
        return stored(self._encoded(batch, processor, max_length) for batch in batches_of(rows))

    def _encoded(self, batch, processor, max_length) -> pa.RecordBatch:
        found = processor(batch["words"], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = []
        for number, row in enumerate(batch["label"]):
            places, before = found.word_ids(number), None
            labels.append([row[p] if p is not None and p != q else -100 for p, q in zip(places, [before, *places])])
        columns = {name: pa.array(found[name], IDS[name]) for name in IDS if name in found}
        lengths = [len(ids) for ids in found["input_ids"]]
        return pa.RecordBatch.from_pydict({"index": batch["index"], **columns, "labels": labels, "length": lengths})

    def collator(self, processor) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
        pad = Collator(processor)

        def collate(rows):
            batch = pad([{**row, "labels": 0} for row in rows])
            batch["labels"] = torch.full_like(batch["input_ids"], -100)
            for i, row in enumerate(rows):
                batch["labels"][i, : len(row["labels"])] = torch.tensor(row["labels"])
            return batch

        return collate

    def predictions(self, output, batch, *, everywhere=False) -> list[Prediction]:
        labels = batch["labels"].flatten()
        places = (labels != -100).nonzero().squeeze(-1)
        weights = row_weights(places, *batch["labels"].shape)
        return [Prediction(output.logits.flatten(0, 1)[places], weights, labels[places])]

    def decode(self, outputs, features, rows) -> list[list[int]]:
        answers = zip(outputs["logits"], values_of(features, "labels"), strict=True)
        return [[int(n) for n, gold in zip(row.argmax(-1), labels) if gold != -100] for row, labels in answers]

    def score(self, answers, rows, labels, metrics) -> dict[str, float]:
        pairs = zip(answers, values_of(rows, "label"), strict=True)
        right = [a == b for answer, row in pairs for a, b in zip(answer, row)]
        return {"word_accuracy": float(np.mean(right))}


KIND = Tagging()
ERNIE = Family(
    "ernie",
    "ERNIE",
    "encoder.layer",
    query=Matrix("attention.self.query"),
    key=Matrix("attention.self.key"),
    value=Matrix("attention.self.value"),
    attention_output=Matrix("attention.output.dense"),
    ffn_in=Matrix("intermediate.dense"),
    ffn_out=Matrix("output.dense"),
)
'''
POINTS = "[kdcli.tasks]\ntagging = word_tags:KIND\n\n[kdcli.families]\nernie = word_tags:ERNIE\n"
TAGS = {"film": "noun", "plot": "noun", "was": "verb", "seemed": "verb", "good": "adjective", "dull": "adjective"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, with rows of tagged words and with recipes."""
    folder = tmp_path_factory.mktemp("foreign")
    info = folder / "site" / "word_tags-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: word-tags\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (folder / "site" / "word_tags.py").write_text(PACKAGE)
    draw = random.Random(0)
    for name, size in (("train", 120), ("held", 30)):
        rows = [[draw.choice(list(TAGS)) for _ in range(draw.randint(1, 9))] for _ in range(size)]
        text = "".join(json.dumps({"words": row, "tags": [TAGS[word] for word in row]}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    sizes = {"family": "ernie", "layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "vocab_size": 60}
    files = {"train": "train.jsonl", "validation": "held.jsonl", "max_length": 24}
    for method in ("kd", "minilmv2"):
        recipe = tiny_recipe(
            "task",
            name=method,
            method=method,
            task={"name": "words", "type": "tagging", **files},
            teacher={"scratch": sizes, "finetune": {"max_steps": 40, "learning_rate": 1e-2}},
            train={"max_steps": 20, "learning_rate": 1e-2},
        )
        write_recipe(folder / f"{method}.toml", recipe)
    return folder


def call(world: Path, *arguments: str) -> Any:
    """Run the program with the package on its path, and return its JSON."""
    path = os.pathsep.join([str(world / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "KDCLI_CACHE": str(world / "cache")}
    command = [sys.executable, "-m", "kdcli", *arguments, "--json"]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_kind_and_a_family_of_another_package_go_through_every_command(world: Path):
    assert "tagging" in [row["name"] for row in call(world, "tasks")["tasks"]]
    run = call(world, "distill", "kd.toml")
    assert run["task"]["kind"] == "tagging" and run["task"]["labels"] == ["adjective", "noun", "verb"]
    assert run["primary"] == "word_accuracy" and run["student_head"] == "token-classification"
    # Each word has one tag: whoever has learnt anything knows them all.
    assert run["teacher"]["score"] > 0.95 and run["student"]["score"] > 0.95
    card = (world / "runs" / "kd" / "student" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card and "AutoModelForTokenClassification" in card
    assert call(world, "eval", "runs/kd")["score"] == run["student"]["score"]
    data = call(world, "eval", "runs/kd", "--data", "held.jsonl")
    assert data["metrics"]["rows"]["word_accuracy"] == run["student"]["score"]
    exported = call(world, "export", "runs/kd", "--batch-sizes", "1", "--sequence-lengths", "8", "--runs", "1")
    assert exported["parity"]["max_abs_difference"] < 1e-4 and exported["parity"]["inputs"] == "30 examples of words"
    assert call(world, "eval", "runs/kd/onnx", "--task", "words")["score"] == run["student"]["score"]
    compared = call(world, "compare", "kd.toml", "minilmv2.toml", "--seeds", "2")
    [task] = compared["tasks"]
    assert task["metric"] == "word_accuracy" and not compared["failures"]
    assert {row["name"]: len(row["scores"]) for row in task["rows"]} == {"kd": 2, "minilmv2": 2}
