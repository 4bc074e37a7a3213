"""The table of families is the only place that names one, and another package can add a row."""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES
from tiny_recipes import tiny_recipe, write_recipe
from transformers import AutoConfig, AutoModelForSequenceClassification, ErnieConfig

import kdcli
from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.models import families
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.models.scratch import build_scratch
from kdcli.models.shape import longest_input
from kdcli.recipe.schema import ScratchSection
from kdcli.tasks.heads import load_model
from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION

ELSEWHERE = {
    # Names of a method, and the family of a teacher from scratch where a recipe names none.
    ("methods/distilbert.py", "distilbert"),
    ("methods/registry.py", "distilbert"),
    ("recipe/schema.py", "bert"),
}

MODULE = """
from kdcli.models.families import Family, Matrix

MODEL = Family(
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
"""


def test_no_other_module_names_a_family():
    root = Path(kdcli.__file__).parent
    found = {
        (path.relative_to(root).as_posix(), node.value)
        for path in root.rglob("*.py")
        if path.relative_to(root).as_posix() != "models/families.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in families.FAMILIES
    }
    assert found == ELSEWHERE


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_that_of_a_family_of_the_library(name: str):
    config = AutoConfig.for_model(name)
    row = families.get(name)
    assert config.model_type == name == row.name
    sizes = row.sizes
    fields = (sizes.layers, sizes.hidden, sizes.heads, sizes.intermediate, sizes.vocabulary, sizes.positions)
    assert all(isinstance(getattr(config, field), int) for field in fields)
    others = (sizes.types, sizes.embedding, row.positions_if, *row.one_of, *sizes.as_hidden, *sizes.by_block)
    assert all(hasattr(config, field) for field in others if field is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_from_scratch_has_its_tokenizers_padding_where_its_family_looks_for_it(name: str):
    section = ScratchSection(family=name, layers=2, hidden_size=16, heads=2, intermediate_size=32, vocab_size=80)
    model, tokenizer = build_scratch(section, ["a fine film", "a dull film"], SEQUENCE_CLASSIFICATION, seed=0)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    # The library's own table knows which of its rows is padding.
    assert model.get_input_embeddings().padding_idx == tokenizer.pad_token_id
    assert (longest_input(model.config) or 512) in (512, 513)
    longest = tokenizer("film " * 600, truncation=True, max_length=512, return_tensors="pt")
    with torch.no_grad():
        assert model(input_ids=longest["input_ids"]).logits.isfinite().all()


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Give a function that puts a package `further` with an entry point on the path: the point, the module's text."""
    monkeypatch.syspath_prepend(str(tmp_path))
    families.OFFERS.forget()

    def put(point: str, module: str) -> None:
        (tmp_path / f"{point}_rows.py").write_text(module)
        info = tmp_path / "further-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: further\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kdcli.families]\n{point} = {point}_rows:MODEL\n")

    yield put
    families.OFFERS.forget()


def test_a_family_of_another_package_is_like_any_other(
    offer: Callable[[str, str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(ErnieConfig(**sizes, vocab_size=220, pad_token_id=0)).eval()
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model")
    with pytest.raises(InputError, match="unknown family 'ernie'") as caught:
        load_model(tmp_path / "model")
    assert "entry point kdcli.families" in (caught.value.hint or "")
    offer("ernie", MODULE)
    families.OFFERS.forget()
    assert torch.equal(probe(load_model(tmp_path / "model")), probe(model))
    assert run(["families", "--json"]) == 0
    shown = capsys.readouterr()
    assert "ernie" in [row["name"] for row in json.loads(shown.out)["families"]] and "left out" not in shown.err


@pytest.mark.slow
def test_a_family_of_another_package_is_distilled_scored_exported_and_compared(
    offer: Callable[[str, str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
):
    offer("ernie", MODULE)
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe("student", method={"name": "makd"}, overparam={"length": 1})
    recipe["teacher"] = {**recipe["teacher"], "scratch": {**recipe["teacher"]["scratch"], "family": "ernie"}}
    write_recipe(tmp_path / "recipe.toml", recipe)
    assert run(["distill", "recipe.toml", "--output", "runs", "--json"]) == 0
    student = json.loads((tmp_path / "runs" / "recipe" / "student" / "config.json").read_text())
    assert student["kdcli"]["base_model_type"] == "ernie"
    folder = str(tmp_path / "runs" / "recipe" / "student")
    assert run(["eval", folder, "--task", "reviews"]) == 0
    assert run(["export", folder, "--onnx", "--no-latency", "--out", "served"]) == 0
    assert run(["compare", "recipe.toml", "--seeds", "1"]) == 0


@pytest.mark.parametrize(
    ("point", "module", "words"),
    [
        ("offsite", "import not_there", "No module named 'not_there'"),
        ("numeric", "MODEL = 3", "is a int; numeric_rows:MODEL must be a kdcli.models.families.Family"),
        ("renamed", MODULE, "is called 'ernie'"),
        ("roberta", MODULE, "taken by several packages: kdcli, further"),
    ],
)
def test_a_broken_row_of_another_package_stops_no_other_family(
    point: str, module: str, words: str, offer: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
):
    offer(point, module)
    assert run(["families", "--json"]) == 0
    shown = capsys.readouterr()
    assert [row["name"] for row in json.loads(shown.out)["families"]] == sorted(families.FAMILIES)
    assert words in shown.err and "further" in shown.err
    assert families.get("roberta").title == "RoBERTa"
