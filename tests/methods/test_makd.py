"""makd: its stages, and what its terms ask of both models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import tiny_recipe, write_recipe

from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context, Stage
from kdcli.methods.layer_maps import uniform
from kdcli.models.shape import ModelShape
from kdcli.signals import Request
from kdcli.tasks import registry as kinds

SHAPE = ModelShape("bert", 3, 32, 4, 4, 8, 64, 220, 130)


def context(kind: str = "classification", **facts: Any) -> Context:
    return Context(SHAPE, SHAPE, "low-rank", kinds.get(kind), uniform(SHAPE.layers, SHAPE.layers), **facts)


def stages(where: Context | None = None, **options: Any) -> list[Stage]:
    where, method = where or context(), registry.get("makd")
    chosen = method.options.model_validate(options)
    method.check(chosen, where)
    return method.build(chosen, where)


def names(stage: Stage) -> list[str]:
    return [term.name for term in stage.terms if term.weight > 0]


OFF = [
    ({}, ["matrix", "layer", "model"], [0.4, 0.3, 0.3]),
    ({"weights": {"matrix": 0.0, "layer": 0.0}}, ["model"], [1.0]),
    ({"weights": {"matrix": 0.0}}, ["layer", "model"], [0.5, 0.5]),
    ({"terms": {"mha": 0.0, "ffn": 0.0}}, ["layer", "model"], [0.5, 0.5]),
    ({"weights": {"layer": 0.0}, "shares": [0.2, 0.3, 0.5]}, ["matrix", "model"], [2 / 7, 5 / 7]),
    ({"weights": {"model": 0.0}, "shares": [0.2, 0.6, 0.2]}, ["matrix", "layer"], [0.25, 0.75]),
]


@pytest.mark.parametrize(("options", "which", "shares"), OFF, ids=lambda value: str(value)[:40])
def test_the_stages_of_the_levels_that_are_on_have_all_steps(
    options: dict[str, Any], which: list[str], shares: list[float]
):
    found = stages(schedule="staged", **options)
    assert [stage.name for stage in found] == which
    assert [stage.share for stage in found] == pytest.approx(shares)


def test_each_stage_adds_its_level_and_the_last_one_is_the_joint_objective():
    first, second, third = stages(schedule="staged", final_learning_rate=1e-5)
    assert names(first) == ["mha", "ffn"]
    assert names(second) == ["mha", "ffn", "attention", "hidden"]
    assert names(third) == ["mha", "ffn", "attention", "hidden", "output", "task"]
    assert [stage.learning_rate for stage in (first, second, third)] == [None, None, 1e-5]
    (joint,) = stages()
    assert [(t.name, t.weight) for t in joint.terms] == [(t.name, t.weight) for t in third.terms]


def test_terms_of_weight_zero_everywhere_and_a_rate_without_its_stage_are_refused():
    for schedule in ("joint", "staged"):
        with pytest.raises(InputError, match="weight 0"):
            stages(schedule=schedule, weights={"layer": 0.0, "model": 0.0}, terms={"mha": 0.0, "ffn": 0.0})
    with pytest.raises(InputError, match="no third stage"):
        stages(schedule="staged", weights={"model": 0.0}, final_learning_rate=1e-5)


def test_factored_embeddings_have_a_term_in_the_layer_level():
    (stage,) = stages(context(factored_embeddings=True), weights={"layer": 0.5})
    (term,) = (term for term in stage.terms if term.name == "embedding")
    assert term.weight == 0.5
    assert term.objective.student_request() == term.objective.teacher_request() == Request(hidden=frozenset({0}))
    assert "embedding" not in names(stages()[0])
    # What the recipe says comes first.
    assert "embedding" not in names(stages(context(factored_embeddings=True), terms={"embedding": 0.0})[0])
    assert "embedding" in names(stages(terms={"embedding": 2.0})[0])


@pytest.mark.parametrize("rank", [None, 8])
def test_a_recipes_embedding_rank_brings_the_term(rank: int | None, tmp_path: Path):
    student = {"form": "low-rank", "layers": None, "embedding_rank": rank}
    path = write_recipe(tmp_path / "recipe.toml", tiny_recipe(method={"name": "makd"}, student=student))
    prepared = prepare(load_recipe(path), path)
    assert ("embedding" in names(prepared.followers[-1].stages[0])) == (rank is not None)


def test_on_plain_text_the_model_level_is_the_masked_tokens():
    (stage,) = stages(context("text"), alpha=0.25, weights={"model": 2.0})
    assert {term.name: term.weight for term in stage.terms[-2:]} == {"output": 0.5, "mlm": 1.5}
    assert all(term.objective.student_request() == Request(logits=True) for term in stage.terms[-2:])
    (stage,) = stages(context("text"), weights={"model": 0.0})
    assert not any(term.objective.student_request().logits for term in stage.terms)
    other = replace(context("text"), student=replace(SHAPE, vocab=100))
    with pytest.raises(InputError, match="same vocabulary"):
        stages(other)
    # Without the model level no words are compared.
    assert stages(other, weights={"model": 0.0})
