"""Runs whose student is made of projections of the teacher: trained, interrupted, merged, refused."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import run_recipe, tiny_recipe, write_recipe

from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.load import load_model
from kdcli.models.projections import is_projected
from kdcli.objectives.hidden import HiddenObjective

STUDENT: dict[str, Any] = {"form": "width", "hidden_size": 16, "heads": 2, "layers": None}


def recipe(method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a tiny recipe of a student of projections."""
    student = {**STUDENT, "init": "projections", **changes.pop("student", {})}
    return tiny_recipe(method=method, student=student, **changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))


class Interrupting(io.StringIO):
    """A terminal at which someone ends the program as soon as it shows a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def write(self, text: str) -> int:
        if self.text in text:
            self.text = "\0"
            raise KeyboardInterrupt
        return super().write(text)


def test_a_run_ends_with_a_plain_model_and_learns_no_bridge(tmp_path: Path):
    method = {"name": "hs", "weights": {"embedding": 1.0}}
    document = run_recipe(write_recipe(tmp_path / "p.toml", recipe(method)))
    sliced = run_recipe(write_recipe(tmp_path / "s.toml", recipe(method, student={"init": "teacher"})))
    found, other = (load_file(tmp_path / "runs" / name / "student" / "model.safetensors") for name in ("p", "s"))
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in other.items()}
    assert document["student"]["parameters"] == sliced["student"]["parameters"]
    terms = document["training"][0]["history"][0]
    assert terms["alignment"] > 0 and terms["hidden"] > 0 and terms["embedding"] > 0
    assert "alignment" not in sliced["training"][0]["history"][0]


def test_hidden_states_go_through_the_projections_unless_a_bridge_is_asked_for(tmp_path: Path):
    def hidden(method: dict[str, Any]) -> list[HiddenObjective]:
        path = write_recipe(tmp_path / "r.toml", recipe(method))
        [follower] = prepare(load_recipe(path, []), path).followers
        terms = [term.objective for stage in follower.stages for term in stage.terms]
        return [objective for objective in terms if isinstance(objective, HiddenObjective)]

    for method in ({"name": "hs"}, {"name": "tinybert"}):
        [objective] = hidden(method)
        assert objective.projected and not list(objective.parameters())
        assert objective.student_request().projections
    [objective] = hidden({"name": "hs", "bridge": True})
    assert not objective.projected and list(objective.parameters())


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_student(tmp_path: Path):
    document = recipe({"name": "hs"}, train={"max_steps": 4, "eval_every": 1})
    whole = write_recipe(tmp_path / "whole.toml", document)
    run_recipe(whole)
    other = write_recipe(tmp_path / "other.toml", document)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(other, console=Console(file=Interrupting("step 3/4"), width=200))
    assert not (tmp_path / "runs" / "other" / "student").exists()
    assert list((tmp_path / "runs" / "other" / "checkpoints").glob("*/checkpoint-*"))
    run_recipe(other, resume=True)
    first, second = (
        load_file(tmp_path / "runs" / name / "student" / "model.safetensors") for name in ("whole", "other")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["kd", "minilmv2", pytest.param("tinybert", marks=pytest.mark.slow), "lgtm"])
def test_other_methods_train_it_too(tmp_path: Path, method: str):
    document = recipe({"name": method}, student={"alignment": 0.0} if method == "kd" else {})
    result = run_recipe(write_recipe(tmp_path / "r.toml", document))
    history = result["training"][0]["history"][0]
    assert ("alignment" in history) == (method != "kd")
    from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION

    assert not is_projected(load_model(str(tmp_path / "runs" / "r" / "student"), SEQUENCE_CLASSIFICATION))


@pytest.mark.parametrize("method", ["kd", "hs"])
def test_kept_states_hold_what_the_alignment_compares(tmp_path: Path, method: str):
    kept, plain = (
        write_recipe(tmp_path / f"{name}.toml", recipe({"name": method}, teacher={"cache": cache}))
        for name, cache in (("kept", "all"), ("plain", True))
    )
    plan = make_plan(prepare(load_recipe(kept, []), kept))
    # Its weight stands among those of the method's terms.
    assert [stage.terms["alignment"] for stage in plan.stages] == [1.0]
    [states] = plan.states
    assert states.bytes > 0
    first, second = (run_recipe(path)["training"][0]["history"][0] for path in (kept, plain))
    assert first["alignment"] == pytest.approx(second["alignment"], rel=1e-4)
    found, other = (load_file(tmp_path / "runs" / name / "student" / "model.safetensors") for name in ("kept", "plain"))
    for name, weight in other.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


def test_without_a_teacher_beside_it_a_student_is_aligned_with_nothing(tmp_path: Path):
    path = write_recipe(tmp_path / "r.toml", recipe({"name": "dbkd"}))
    [stage] = make_plan(prepare(load_recipe(path, []), path)).stages
    assert stage.terms and "alignment" not in stage.terms


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"method": {"name": "dbkd"}, "student": {"alignment": 0.5}}, "student.alignment"),
        ({"overparam": {"length": 1}}, "student.init"),
        ({"student": {"hidden_size": 64}}, "student.hidden_size"),
        ({"student": {"layers": 3}}, "student.layers"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], place: str):
    path = write_recipe(tmp_path / "r.toml", recipe(**{"method": {"name": "kd"}, **changes}))
    with pytest.raises(InputError) as found:
        prepare(load_recipe(path, []), path)
    assert found.value.where == place


def test_fields_of_projections_belong_to_them(tmp_path: Path):
    for student, message in (
        ({"form": "depth", "init": "projections"}, "has no init"),
        ({"form": "width", "alignment": 0.5}, "only a width student"),
    ):
        path = write_recipe(tmp_path / "r.toml", tiny_recipe("student", student=student))
        with pytest.raises(InputError, match=message):
            load_recipe(path, [])
