"""The script beside an exported graph: short, without any library but ONNX Runtime and tokenizers, and right."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from families import tiny, tokenizer

from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.export.export import export_model
from kdcli.models.save import save_model
from kdcli.tasks import registry
from kdcli.tasks.heads import load_model
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.predict import predict

TEXTS = ["a fine film", "a dull film , and so long that it is cut in the end , after many words", "dark"]
LENGTH = 16
ALLOWED = {"json", "sys", "numpy", "onnxruntime", "tokenizers"}


def code_lines(script: str) -> list[str]:
    """Return the lines of a script that do something."""
    lines = re.sub('^""".*?"""\n', "", script, flags=re.DOTALL).splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def answers_of_script(folder: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Run the script in a process without kdcli, torch and transformers, and return what it prints."""
    script = (folder / "predict.py").read_text()
    assert len(code_lines(script)) <= 20 and max(map(len, script.splitlines())) <= 120
    assert set(re.findall(r"^(?:from|import) (\w+)", script, re.MULTILINE)) <= ALLOWED
    command = [sys.executable, "-X", "importtime", str(folder / "predict.py"), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    imported = set(re.findall(r"\| +(\w+)\n", done.stderr))
    assert "onnxruntime" in imported and not imported & {"torch", "transformers", "kdcli", "scipy", "datasets"}
    return [json.loads(line) for line in done.stdout.splitlines()]


def replies(kind: TaskKind, fields: Any, model: Any, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return what kdcli answers with the PyTorch model."""
    rows = kind.read_inputs({name: Column.of(values) for name, values in columns.items()}, fields, "here", [])
    return kind.replies(model, dataset_of(rows), tokenizer(), max_length=LENGTH, ask=predict)


def near(value: Any) -> Any:
    """Return a value to compare with, whose numbers may be a little different."""
    if isinstance(value, Mapping):
        return {key: near(part) for key, part in value.items()}
    if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
        return pytest.approx(value, abs=1e-5)
    return value


MODELS: dict[str, Any] = {
    "classification": {"id2label": {0: "no", 1: "so", 2: "yes"}, "labels": 3},
    "regression": {"labels": 1},
    "multi-label": {
        "id2label": {0: "joy", 1: "fear", 2: "anger"},
        "labels": 3,
        "problem_type": "multi_label_classification",
        "kdcli_thresholds": [0.3, 0.6, 0.5],
    },
}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("classification", "bert"),
        pytest.param("regression", "roberta", marks=pytest.mark.slow),
        pytest.param("multi-label", "distilbert", marks=pytest.mark.slow),
    ],
)
def test_the_script_answers_texts_as_kdcli_does(name: str, family: str, tmp_path: Path):
    kind, model = registry.get(name), tiny(family, layers=1, **MODELS[name])
    result = export_model(model, tokenizer(), tmp_path / "out", task=None, max_length=LENGTH, latency=False)
    assert result.to_json()["script"] == "predict.py"
    found = answers_of_script(tmp_path / "out", TEXTS)
    assert found == [near(reply) for reply in replies(kind, kind.fields(), model, {"text": TEXTS})]
    assert len({json.dumps(reply) for reply in found}) == 3


@pytest.mark.slow
def test_the_script_of_a_pair_takes_texts_in_twos(tmp_path: Path):
    from kdcli.recipe.schema import EvaluateSection, TaskSection
    from kdcli.tasks.load import load_task

    rows = [{"a": text, "b": other, "label": "yn"[i % 2]} for i, text in enumerate(TEXTS) for other in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = TaskSection.model_validate({"name": "own", "data": str(tmp_path / "rows.jsonl"), "text": ["a", "b"]})
    task, model = load_task(section, EvaluateSection(), base=tmp_path), tiny("bert", layers=1)
    export_model(model, tokenizer(), tmp_path / "out", task=task, max_length=LENGTH, latency=False)
    found = answers_of_script(tmp_path / "out", [text for row in rows for text in (row["a"], row["b"])])
    columns = {name: [row[name] for row in rows] for name in ("a", "b")}
    assert found == [near(reply) for reply in replies(task.kind, task.fields, model, columns)]


@pytest.mark.slow
def test_a_model_that_may_be_for_several_tasks_gets_no_script(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(tiny("bert", layers=1, problem_type="other"), folder, tokenizer())
    result = export_model(load_model(folder), tokenizer(), tmp_path / "out", task=None, latency=False)
    assert result.script is None and not (tmp_path / "out" / "predict.py").exists()
