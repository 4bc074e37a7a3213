"""What each command imports: the big libraries only where they are used, and a run says what it is before that."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import tiny, tokenizer
from tiny_recipes import changed, tiny_recipe, write_recipe

from kdcli.models.save import save_model

HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "sklearn",
    "scipy",
    "pandas",
    "pyarrow",
    "accelerate",
    "onnx",
    "matplotlib",
    "tensorboard",
}
RECIPE = tiny_recipe("student", method="makd")


@dataclass
class Started:
    """A finished command: its exit code, its words, the modules that it imported, and both in the order of time."""

    code: int
    out: str
    lines: list[str]

    @property
    def modules(self) -> set[str]:
        return {_module(line) for line in self.lines if line.startswith("import time:")}

    @property
    def said(self) -> str:
        return "\n".join(line for line in self.lines if not line.startswith("import time:"))


def _module(line: str) -> str:
    return line.rpartition("|")[2].strip()


def start(folder: Path, *arguments: str) -> Started:
    """Run the program in a process of its own that writes every import to stderr."""
    command = [sys.executable, "-X", "importtime", "-m", "kdcli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return Started(done.returncode, done.stdout, done.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["distill", "--help"], 0),
        (["predict", "--help"], 0),
        (["predict"], 2),
        (["predict", "a text", "--input", "texts.txt"], 2),
        (["predict", "a text", "--output", "recipe.toml"], 2),
        (["methods", "--json"], 0),
        (["methods", "makd"], 0),
        (["methods", "unknown"], 2),
        (["tasks"], 0),
        (["tasks", "text"], 0),
        (["families"], 0),
        (["recipes", "list"], 0),
        (["recipes", "copy", "quickstart"], 0),
        (["recipes", "explain", "--method", "makd"], 0),
        (["recipes", "schema"], 0),
        (["distill", "missing.toml"], 2),
        (["distill", "wrong.toml"], 2),
        (["distill", "recipe.toml", "--set", "method.alpha=2"], 2),
    ],
)
def test_without_a_model_no_big_library_is_imported(tmp_path: Path, arguments: list[str], code: int) -> None:
    write_recipe(tmp_path / "recipe.toml", RECIPE)
    write_recipe(tmp_path / "wrong.toml", changed(RECIPE, student={"budjet": 0.5}))
    started = start(tmp_path, *arguments)
    assert started.code == code, started.said
    assert not started.modules & (HEAVY | {"numpy", "onnxruntime"})


def test_env_imports_one_library_to_ask_for_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    started = start(tmp_path, "env", "--json")
    assert started.code == 0
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("with a driver there, torch is asked for the devices")
    assert not started.modules & HEAVY


def test_a_run_says_what_it_is_before_torch_is_imported_and_plans_without_the_loop(tmp_path: Path) -> None:
    write_recipe(tmp_path / "recipe.toml", RECIPE)
    started = start(tmp_path, "distill", "recipe.toml", "--dry-run", "--json")
    assert started.code == 0, started.said
    first = started.lines.index("recipe.toml: makd on reviews, low-rank student")
    big = [number for number, line in enumerate(started.lines) if _module(line).split(".")[0] in HEAVY]
    assert first < min(big)
    unused = {"transformers.trainer", "sklearn", "onnx", "onnxruntime", "matplotlib", "tensorboard", "scipy.stats"}
    assert not started.modules & unused


@pytest.mark.slow
def test_eval_predict_and_export_import_what_they_use(tmp_path: Path) -> None:
    save_model(tiny("bert", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}), tmp_path / "m", tokenizer())
    (tmp_path / "rows.csv").write_text("text,label\na fine film,yes\na dull film,no\n")
    scored = start(tmp_path, "eval", "m", "--data", "rows.csv", "--text", "text", "--label", "label", "--json")
    assert scored.code == 0, scored.said
    assert not scored.modules & {"transformers.trainer", "onnx", "onnxruntime", "matplotlib", "tensorboard"}
    answered = start(tmp_path, "predict", "m", "a fine film", "--json")
    assert answered.code == 0, answered.said
    assert not answered.modules & {"transformers.trainer", "onnx", "onnxruntime", "sklearn", "matplotlib"}
    written = start(tmp_path, "export", "m", "--onnx", "--no-latency", "--out", "served", "--json")
    assert written.code == 0, written.said
    assert not written.modules & {"transformers.trainer", "datasets", "sklearn", "pandas", "matplotlib", "tensorboard"}
