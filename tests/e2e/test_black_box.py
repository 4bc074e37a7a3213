"""A teacher of which nothing is known but its answers: from recipe to student."""

from pathlib import Path

import pytest
from families import tiny, tokenizer

from kdcli.cli import render
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.distill.resolve import resolve
from kdcli.distill.run import run_distill
from kdcli.errors import InputError
from kdcli.models.save import save_model


def test_a_black_box_needs_no_model_at_all(tmp_path: Path):
    """Only answers are known: the student comes from a checkpoint, and its tokenizer with it."""
    save_model(tiny("bert").base_model, tmp_path, tokenizer())
    (tmp_path / "decider.py").write_text(
        "def decide(texts):\n    return ['positive' if 'good' in text else 'negative' for text in texts]\n"
    )
    recipe = tmp_path / "box.toml"
    recipe.write_text(
        """
task = {name = "reviews", train_samples = 64, validation_samples = 40}
method = {name = "dbkd", copies = 3, black_box = {callable = "decider:decide"}}
teacher = {black_box = true}
student = {form = "checkpoint", model = "."}
train = {max_steps = 4}
"""
    )
    loaded = load_recipe(recipe, [])
    plan = make_plan(prepare(loaded, recipe))
    assert plan.to_json()["teacher"]["parameters"] is None
    result = run_distill(loaded, recipe_path=recipe, output=tmp_path / "runs")
    assert result.to_json()["teacher"] is None and result.to_json()["hashes"]["teacher"] is None
    assert result.to_json()["retention"] is None and 0 <= result.to_json()["student"]["score"] <= 1
    assert not (tmp_path / "runs" / "box" / "teacher").exists()
    card = (tmp_path / "runs" / "box" / "student" / "README.md").read_text()
    assert "a black box" in card and "| | student |" in card
    again = run_distill(loaded, recipe_path=recipe, output=tmp_path / "runs", resume=True)
    assert render.scores(again.result).columns[-1].header == "student"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method={name='kd'}", "answers of a black box are not enough for kd"),
        ("method={name='dbkd'}", "answers of a black box are not enough for dbkd"),
        ("overparam.length=1", "no tensors to compare with"),
        ("student={form='depth'}", "cannot be cut from a black box"),
        ("assistant.layers=2", "an assistant cannot be cut"),
    ],
)
def test_more_than_answers_is_refused(tmp_path: Path, override: str, words: str):
    recipe = tmp_path / "box.toml"
    recipe.write_text(
        """
task = "reviews"
method = {name = "dbkd", black_box = {callable = "decider:decide"}}
teacher = {black_box = true}
student = {form = "checkpoint", model = "."}
"""
    )
    with pytest.raises(InputError, match=words):
        resolve(load_recipe(recipe, [override]), recipe)
