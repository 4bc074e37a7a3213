"""A run of each kind of task answers: its student beside its teacher, its graph, and the script in that folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import tiny, tokenizer
from tiny_recipes import run_recipe, tiny_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.models.heads import with_new_head
from kdcli.models.save import save_model
from kdcli.tasks import registry

STORY = "Ada wrote the first program . Bert sang of it , and Cleo heard him sing in the old town by the sea ."
QUESTIONS = [("Who wrote it ?", "Ada"), ("Who sang ?", "Bert"), ("Who heard him ?", "Cleo"), ("What ?", "program")] * 8
WORDS = [(["Ada", "saw", "Rome", "."], ["B-who", "O", "B-where", "O"]), (["Rome", "!"], ["B-where", "O"])] * 12
SENTENCES = [f"a {one} film , and so {other} ." for one in ("fine", "dull", "dark", "long") for other in "abcdefgh"]

KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "question-answering": (
        [{"query": question, "story": STORY, "reply": answer} for question, answer in QUESTIONS],
        {"question": "query", "context": "story", "answer": "reply", "stride": 4, "max_answer": 3, "max_length": 24},
        ["Who sang ?", STORY, "Who ?", "Ada ."],
    ),
    "token-classification": (
        [{"parts": words, "marks": tags} for words, tags in WORDS],
        {"text": "parts", "label": "marks", "max_length": 16},
        ["Ada saw Rome .", "Rome !"],
    ),
    "sentence-embedding": (
        [{"line": text} for text in SENTENCES],
        {"text": "line", "max_length": 16},
        ["a fine film .", "the sea ."],
    ),
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def near(value: Any) -> Any:
    """Return a value to compare with, whose numbers may be a little different."""
    if isinstance(value, dict):
        return {key: near(part) for key, part in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [near(part) for part in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float | list) and _has_floats(value) else value


def _has_floats(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, float)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_answers_with_its_own_settings(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    rows, fields, texts = KINDS[kind]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "own", "type": kind, "data": "rows.jsonl", **fields}
    changes: dict[str, Any] = {}
    if kind == "sentence-embedding":
        (tmp_path / "teacher").mkdir()
        save_model(with_new_head(tiny("bert"), registry.get(kind).head), tmp_path / "teacher", tokenizer())
        changes = {"teacher": {"model": "teacher"}, "method": {"name": "hs"}}
    recipe = tiny_recipe("task", *changes, task=task, train={"max_steps": 2}, **changes)
    run_recipe(write_recipe(tmp_path / "own.toml", recipe))

    student = printed(capsys, "predict", "runs/own", *texts)
    both = printed(capsys, "predict", *texts, "--beside", "teacher")
    teacher = printed(
        capsys,
        "predict",
        json.loads(Path("runs/own/run.json").read_text())["teacher_path"],
        *_options(task, kind),
        *texts,
    )
    assert len(student) == 2
    assert [{key: row[key] for key in reply} for row, reply in zip(both, student, strict=True)] == near(student)
    assert [row["beside"] for row in both] == near(teacher)

    assert run(["export", "runs/own", "--no-latency"]) == 0
    assert printed(capsys, "predict", "runs/own/onnx", *texts) == near(student)
    command = [sys.executable, "runs/own/onnx/predict.py", *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line, reply in zip(lines, student, strict=True):
        assert line.get("answer") == reply.get("answer") and line.get("tags") == reply.get("tags")
        assert line.get("embedding") == near(reply.get("embedding"))

    # The columns are those that the run read.
    read = printed(capsys, "predict", "runs/own", "--input", "rows.jsonl", "--batch-size", "3")
    assert len(read) == len(rows)


def _options(task: dict[str, Any], kind: str) -> list[str]:
    """Return what tells a model outside the run how the run's own models are asked."""
    own = {"question-answering": ["stride", "max_answer"]}.get(kind, [])
    settings = [part for name in own for part in ("--set", f"{name}={task[name]}")]
    return ["--max-length", str(task["max_length"]), *settings]
