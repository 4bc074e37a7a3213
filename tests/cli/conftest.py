"""A working folder, tiny models that are built once, and the program called in process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from tiny_recipes import changed, write_recipe
from transformers import AutoModelForMultipleChoice, AutoModelForTokenClassification

from kdcli.cli.app import run
from kdcli.models.overparam import overparameterise
from kdcli.models.processors import new_image_processor
from kdcli.models.save import save_model
from kdcli.recipe.schema import OverparamSection

NAMED = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
ROWS = [("a fine and moving film", "yes"), ("a dull and empty film", "no")] * 20
RECIPE: dict[str, Any] = {
    "method": "kd",
    "task": {"name": "own", "data": "rows.csv", "text": "text"},
    "teacher": {"model": "teacher"},
    "student": {"form": "depth", "layers": 1},
    "train": {"max_steps": 1, "precision": "fp32"},
}


def _chains() -> Any:
    model = tiny("bert", **NAMED)
    overparameterise(model, OverparamSection(length=1))
    return model


def _filler() -> Any:
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_config(tiny("bert", layers=1).config).eval()


def _embedder() -> Any:
    from kdcli.models.embedding import append_dense
    from kdcli.models.heads import SENTENCE_EMBEDDING, with_new_head

    model = with_new_head(tiny("bert"), SENTENCE_EMBEDDING)
    append_dense(model, torch.eye(24, 32), normalize=True)
    return model


BUILDERS: dict[str, Callable[[], Any]] = {
    "teacher": partial(tiny, "bert", **NAMED),
    "unnamed": partial(tiny, "bert"),
    "other-classes": partial(tiny, "bert", id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1}),
    "regressor": partial(tiny, "bert", labels=1, problem_type="regression"),
    "multi-label": partial(tiny, "bert", **NAMED, problem_type="multi_label_classification"),
    "tagger": lambda: AutoModelForTokenClassification.from_config(tiny("roberta", **NAMED).config),
    "chooser": lambda: AutoModelForMultipleChoice.from_config(tiny("roberta").config),
    "half": lambda: tiny("bert", **NAMED).to(torch.bfloat16),
    "headless": lambda: tiny("bert").base_model,
    "narrow": partial(tiny, "bert", **NAMED, vocab_size=100),
    "roomy": partial(tiny, "bert", **NAMED, vocab_size=400),
    "prime": partial(tiny, "bert", **NAMED, hidden=116),
    "chains": _chains,
    "filler": _filler,
    "embedder": _embedder,
    "viewer": partial(tiny, "vit", **NAMED),
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a named tiny model, made when it is first asked for."""
    root = tmp_path_factory.mktemp("models")
    words = tokenizer()

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            path.mkdir()
            model = BUILDERS[name]()
            save_model(model, path, words if model.main_input_name != "pixel_values" else new_image_processor(16, 16))
        return path

    return folder


@dataclass
class Outcome:
    """What a call of the program gave: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class World:
    """A working folder with some data; whatever else a test needs is put there by name."""

    folder: Path
    model_folder: Callable[[str], Path]
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    arguments: list[str] = field(default_factory=list)

    def write(self, name: str, text: str | bytes) -> str:
        """Write a file and return its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    def csv(self, name: str, rows: list[tuple[str, str]], header: str = "text,label") -> str:
        """Write rows as CSV and return the file's name."""
        return self.write(name, "\n".join([header, *(",".join(row) for row in rows)]) + "\n")

    def model(self, kind: str = "teacher", name: str = "teacher") -> Path:
        """Put a tiny model there, as a folder of its own that may be spoiled."""
        shutil.copytree(self.model_folder(kind), self.folder / name)
        return self.folder / name

    def recipe(self, *without: str, **changes: Any) -> str:
        """Write `recipe.toml`, and return its name: RECIPE, changed."""
        return write_recipe(self.folder / "recipe.toml", changed(RECIPE, *without, **changes)).name

    def call(self, *arguments: object) -> Outcome:
        """Run the program in this process."""
        self.capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def listing(self) -> dict[str, bytes | str]:
        """Return every path below the working folder, with the bytes of files and the targets of links."""
        found: dict[str, bytes | str] = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_symlink():
                found[name] = str(path.readlink())
            else:
                found[name] = path.read_bytes() if path.is_file() else "folder"
        return found


@pytest.fixture
def world(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    """An empty working folder that the program starts in, with 40 rows of data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDCLI_DEBUG", raising=False)
    monkeypatch.delenv("KDCLI_DATA_DIR", raising=False)
    here = World(tmp_path, model_folder, capsys, monkeypatch)
    here.csv("rows.csv", ROWS)
    return here
