"""Kinds of tasks of other packages: one that a model reads in several features a row, and one that is broken."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_recipes import run_recipe, tiny_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.distill.resolve import resolve
from kdcli.errors import InputError, UnfitTaskError
from kdcli.tasks import registry

WINDOWED = """
import numpy as np
from kdcli.tasks.classification import Classification


class Windowed(Classification):
    name = "windowed"

    def recognises(self, columns, fields, source, notes):
        return False

    def encode(self, rows, processor, max_length):
        features = super().encode(rows, processor, max_length)
        three = features.select(np.repeat(np.arange(len(features)), 3))
        return three.remove_columns("index").add_column("index", np.arange(len(three)))

    def examples(self, rows, processor, max_length):
        return 3 * len(rows)

    def decode(self, outputs, features, rows):
        return outputs["logits"].reshape(len(rows), 3, -1).mean(1).argmax(-1)


KIND = Windowed()
"""

Offer = Callable[[str, str], None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Give a function that puts a package that offers a kind on the path: the kind's name, and the module's text."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(kind: str, module: str) -> None:
        module_name = f"kind_{kind}".replace("-", "_")
        (tmp_path / f"{module_name}.py").write_text(module)
        info = tmp_path / f"kind_{kind}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kind_{kind}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kdcli.tasks]\n{kind} = {module_name}:KIND\n")
        registry.offers().forget()

    yield put
    registry.offers().forget()


def own_data(folder: Path, kind: str, rows: int = 40, **train: object) -> Path:
    """Write a recipe with data of its own, of a kind, and return its path."""
    lines = [f"{word} number {row},{word}" for row in range(rows // 2) for word in ("good", "bad")]
    (folder / "rows.csv").write_text("\n".join(["text,label", *lines]))
    task = {"name": "own", "type": kind, "data": "rows.csv", "text": "text"}
    return write_recipe(folder / "recipe.toml", tiny_recipe("task", task=task, train={"batch_size": 8, **train}))


def test_the_steps_that_are_planned_are_run_where_a_row_gives_several_features(offer: Offer, tmp_path: Path):
    offer("windowed", WINDOWED)
    path = own_data(tmp_path, "windowed", max_steps=None, epochs=1)
    plan = make_plan(prepare(load_recipe(path), path))
    record = run_recipe(path)
    assert plan.task.sizes["train"] == 3 * record["task"]["sizes"]["train"] == 108
    assert plan.task.sizes["selection"] == 3 * plan.task.sizes["validation"] == 12
    assert [stage.steps for stage in plan.stages] == [stage["steps"] for stage in record["training"]] == [14]


GENERATING = """
from kdcli.tasks.classification import Classification


class Generating(Classification):
    name = "generating"
    scored_by_outputs = False

    def recognises(self, columns, fields, source, notes):
        return False

    def answers(self, model, rows, processor, *, max_length, ask, **options):
        features = self.encode(rows, processor, max_length)
        return super().decode(ask(model, features, self.collator(processor), **options), features, rows)

    def decode(self, outputs, features, rows):
        raise NotImplementedError


KIND = Generating()
"""


def test_checkpoints_are_chosen_by_the_loss_where_answers_are_not_decoded_outputs(offer: Offer, tmp_path: Path):
    offer("generating", GENERATING)
    record = run_recipe(own_data(tmp_path, "generating", eval_every=1))
    (training,) = record["training"]
    losses = [entry["eval_loss"] for entry in training["history"] if "eval_loss" in entry]
    assert len(losses) == 3 and training["best"] == min(losses)
    assert set(record["student"]["metrics"]["validation"]) == {"accuracy", "f1"}


WITHOUT_TEXT = """
from kdcli.tasks.classification import Classification


class WithoutText(Classification):
    name = "without-text"
    text_columns = ()

    def recognises(self, columns, fields, source, notes):
        return False


KIND = WithoutText()
"""


def test_no_tokenizer_is_made_for_a_kind_without_text(offer: Offer, tmp_path: Path):
    offer("without-text", WITHOUT_TEXT)
    path = own_data(tmp_path, "without-text")
    with pytest.raises(InputError, match="made from the texts of the task") as caught:
        prepare(load_recipe(path), path)
    assert caught.value.where == "teacher.scratch"


WHOLE = """
from kdcli.tasks.regression import Regression


class Whole(Regression):
    name = "whole"

    def recognises(self, columns, fields, source, notes):
        return False

    def decode(self, outputs, features, rows):
        return super().decode(outputs, features, rows).round()


KIND = Whole()
"""


def test_a_model_that_several_kinds_fit_is_scored_by_that_of_its_run_or_the_one_that_is_named(
    offer: Offer, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    offer("whole", WHOLE)
    path = own_data(tmp_path, "whole", max_steps=1)
    lines = [f"{'good ' * (row % 5)}number,{row % 5}" for row in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    run_recipe(path)
    shutil.copytree(tmp_path / "runs" / "recipe" / "student", tmp_path / "copy")
    data = ["--data", str(tmp_path / "rows.csv"), "--text", "text", "--json"]

    def score(model: str, *named: str) -> float:
        assert run(["eval", str(tmp_path / model), *data, *named]) == 0
        return json.loads(capsys.readouterr().out)["score"]

    whole = score("runs/recipe/student")
    assert score("copy", "--type", "whole") == whole != score("copy", "--type", "regression")
    refused = {"": "copy may be one for several types", "multi-label": "is not one for multi-label", "hole": "'whole'?"}
    for wanted, words in refused.items():
        assert run(["eval", str(tmp_path / "copy"), *data, *(["--type", wanted] if wanted else [])]) == 2
        told = capsys.readouterr().err
        assert words in told and "--type" in told


def test_a_broken_kind_stops_no_list_but_is_told(offer: Offer, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    built_in = registry.names()
    offer("broken", "import not_there")
    for command in (["tasks", "--json"], ["recipes", "schema", "--json"], ["recipes", "explain", "task", "--json"]):
        assert run(command) == 0, command
        shown = capsys.readouterr()
        assert "left out: " in shown.err and "'broken' of the package kind_broken" in shown.err, command
        if command[0] == "tasks":
            assert [row["name"] for row in json.loads(shown.out)["tasks"]] == built_in
    for command in (["methods", "--json"], ["methods", "dbkd"], ["tasks", "classification", "--json"]):
        assert run(command) == 0, command
    with pytest.raises(UnfitTaskError, match="dbkd works on classification and image-classification tasks"):
        resolve(load_recipe(own_data(tmp_path, "regression"), ["method=dbkd"]), tmp_path / "recipe.toml")
