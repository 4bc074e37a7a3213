"""A model that says NaN has no score, no graph and no student: it is named, and nothing is made of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import World
from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, torch.Tensor]], None]


def all_nan(weights: dict[str, torch.Tensor]) -> None:
    for tensor in weights.values():
        tensor.fill_(torch.nan)


def one_class(weights: dict[str, torch.Tensor]) -> None:
    weights["classifier.bias"][1] = torch.inf


def one_word(weights: dict[str, torch.Tensor]) -> None:
    """Only rows with this word have logits that are NaN."""
    weights["bert.embeddings.word_embeddings.weight"][150] = torch.nan


def too_large(weights: dict[str, torch.Tensor]) -> None:
    """All weights are finite, and the logits are not."""
    weights["classifier.weight"].fill_(3e38)


@pytest.fixture
def spoiled(world: World) -> Callable[[Change, str], Path]:
    """Change the weights of a model folder of the test's own."""

    def spoil(change: Change, name: str = "teacher") -> Path:
        path = world.folder / name
        file = (path if path.exists() else world.model(name=name)) / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})
        return file.parent

    return spoil


@pytest.mark.parametrize("change", [all_nan, one_class, too_large])
def test_eval_gives_no_score_and_passes_no_gate(world: World, spoiled: Callable[..., Path], change: Change):
    spoiled(change)
    common = ("eval", "teacher", "--data", "rows.csv", "--text", "text")
    for gate in ([], ["--fail-under", "0.1"], ["--teacher", "teacher", "--fail-under-retention", "0.1"]):
        outcome = world.call(*common, *gate)
        assert outcome.code == 2
        assert "MODEL" in outcome.err and "contain NaN or inf" in outcome.err and outcome.out == ""


def test_a_teacher_to_compare_with_is_named_when_it_is_the_one(world: World, spoiled: Callable[..., Path]):
    world.model()
    spoiled(all_nan, "other")
    outcome = world.call("eval", "teacher", "--data", "rows.csv", "--text", "text", "--teacher", "other")
    assert outcome.code == 2 and "--teacher" in outcome.err and "other contain NaN or inf" in outcome.err


@pytest.mark.parametrize(
    "change", [all_nan, *(pytest.param(change, marks=pytest.mark.slow) for change in (one_class, too_large))]
)
def test_export_writes_nothing(world: World, spoiled: Callable[..., Path], change: Change):
    spoiled(change)
    outcome = world.call("export", "teacher", "--onnx", "--out", "graph", "--no-latency")
    assert outcome.code == 2 and "contain NaN or inf" in outcome.err
    assert not (world.folder / "graph").exists()


@pytest.mark.parametrize("command", [["overparam", "--length", "1"], ["contract"]])
def test_chains_of_such_a_model_are_not_called_equal_to_it(
    world: World, spoiled: Callable[..., Path], command: list[str]
):
    spoiled(all_nan)
    outcome = world.call(command[0], "teacher", *command[1:], "--out", "other")
    assert outcome.code != 0 and "contain NaN or inf" in outcome.err
    assert not (world.folder / "other").exists()


@pytest.mark.parametrize("change", [all_nan, one_class, one_word, too_large])
def test_such_a_teacher_is_named_before_training(world: World, spoiled: Callable[..., Path], change: Change):
    spoiled(change)
    outcome = world.call("distill", world.recipe())
    assert outcome.code == 2
    assert "teacher.model" in outcome.err and "of the teacher contain NaN or inf" in outcome.err
    assert "diverged" not in outcome.err and "step" not in outcome.err
    assert not (world.folder / "runs").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize("change", [all_nan, too_large])
def test_such_a_student_is_named_before_training(
    world: World, spoiled: Callable[..., Path], change: Change, options: list[str]
):
    world.model()
    spoiled(change, "start")
    recipe = world.recipe(student={"form": "checkpoint", "model": "start", "layers": None})
    outcome = world.call("distill", recipe, *options)
    assert outcome.code == 2 and not (world.folder / "runs").exists()
    assert "student.model" in outcome.err and "contain NaN or inf" in outcome.err


def test_a_student_that_ends_as_nan_is_no_result(world: World):
    world.model()
    outcome = world.call("distill", world.recipe(train={"max_steps": 3, "learning_rate": 1e6}))
    assert outcome.code == 3 and "training has diverged" in outcome.err
    assert not (world.folder / "runs" / "recipe" / "student").exists()


@pytest.mark.parametrize("limit", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "teacher", "--fail-under"],
        ["eval", "teacher", "--fail-under-retention"],
        ["distill", "recipe.toml", "--fail-under"],
        ["distill", "recipe.toml", "--fail-under-retention"],
        ["export", "teacher", "--max-latency-ms"],
    ],
)
def test_a_limit_that_is_no_finite_number_is_refused(world: World, command: list[str], limit: str):
    outcome = world.call(*command[:-1], f"{command[-1]}={limit}")
    assert outcome.code == 2 and command[-1] in outcome.err
    assert "is no finite number" in outcome.err or "greater than or equal to 0" in outcome.err


def test_a_latency_below_zero_is_no_limit(world: World):
    outcome = world.call("export", "teacher", "--max-latency-ms=-1")
    assert outcome.code == 2 and "--max-latency-ms" in outcome.err
