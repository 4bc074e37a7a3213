"""A kind of task with neither gold answers nor masked tokens: texts alone, on which a student follows its teacher."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import tiny, tokenizer
from small_kinds import TEXTS, offered
from tiny_recipes import run_recipe, tiny_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context, Stage
from kdcli.methods.layer_maps import uniform
from kdcli.models.save import save_model
from kdcli.models.shape import ModelShape
from kdcli.tasks import registry as kinds

METHODS = ("kd", "makd", "hs", "minilm", "minilmv2", "tinybert", "distilbert")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with texts, a teacher, and a recipe."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "rows.csv").write_text("\n".join(["text", *(f"a good film number {row}" for row in range(40))]))
    (folder / "teacher").mkdir()
    save_model(tiny("bert", layers=2, labels=3), folder / "teacher", tokenizer())
    recipe = tiny_recipe(
        *("task", "teacher"),
        task={"name": "own", "type": "texts", "data": "rows.csv", "text": "text", "max_length": 16},
        teacher={"model": "teacher"},
        train={"max_steps": 1},
    )  # fmt: skip
    write_recipe(folder / "recipe.toml", recipe)
    with offered(folder / "site"):
        yield folder


def stages(name: str, **options: Any) -> list[Stage]:
    method, shape = registry.get(name), ModelShape("bert", 4, 32, 4, 4, 8, 64, 220, 128)
    chosen = method.options.model_validate(options)
    where = Context(shape, shape, "depth", TEXTS, uniform(4, 4))
    method.check(chosen, where)
    return method.build(chosen, where)


@pytest.mark.parametrize("name", METHODS)
def test_the_teachers_prediction_has_the_weight_of_the_gold_answers_too(name: str):
    terms = {term.name: term.weight for stage in stages(name) for term in stage.terms}
    assert terms["output"] == (5.0 if name == "distilbert" else 1.0)
    assert not terms.keys() & {"task", "mlm"}
    with_gold = Context(
        *[ModelShape("bert", 4, 32, 4, 4, 8, 64, 220, 128)] * 2, "depth", kinds.get("classification"), [(1, 1)]
    )
    assert [term.name for term in with_gold.prediction_terms(2.0, 0.75, 1.0)] == ["output", "task"]
    assert [term.weight for term in with_gold.prediction_terms(2.0, 0.75, 1.0)] == [1.5, 0.5]


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        *((name, {"alpha": 0.5}, "alpha") for name in METHODS if name != "distilbert"),
        ("distilbert", {"weights": {"task": 1.0}}, "weights.task"),
        ("hs", {"weights": {"mlm": 1.0}}, "weights.mlm"),
        ("distilbert", {"positions": "all"}, "positions"),
    ],
)
def test_what_belongs_to_gold_labels_or_masked_tokens_has_no_effect(name: str, options: dict[str, Any], field: str):
    with pytest.raises(InputError, match=f"{field} has no effect without (gold labels|masked tokens)"):
        stages(name, **options)


def test_the_kind_lists_these_methods_and_no_others(world: Path):
    assert {name for name in registry.names() if "texts" in kinds.providing(registry.get(name).needs)} == {*METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_one_of_them_distils_unlabelled_texts(method: str, world: Path):
    changes = ["student={form='low-rank', budget=0.5}"] if method == "makd" else []
    document = run_recipe(world / "recipe.toml", f"method={method}", *changes, output=world / method)
    terms = next(entry for entry in document["training"][-1]["history"] if "loss" in entry)
    assert terms["output"] > 0 and not terms.keys() & {"task", "mlm"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["teacher.finetune=true"], "own is a texts task, which has no gold answers to train a teacher on"),
        (["method=theseus"], "theseus works on causal-lm, classification"),
        (["student={form='low-rank', budget=0.5, init='gradients'}"], "needs the gradients of a loss"),
        (["overparam={select='static', matrices=1}"], "needs the loss of gold answers"),
    ],
)
def test_what_needs_gold_answers_is_refused_before_any_work(changes: list[str], words: str, world: Path, capsys: Any):
    sets = [part for change in changes for part in ("--set", change)]
    assert run(["distill", str(world / "recipe.toml"), "--dry-run", *sets]) == 2
    assert words in capsys.readouterr().err
