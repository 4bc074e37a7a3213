"""Chains with matched steps in training: the same in one go and in parts, and stable where plain steps are not."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor
from torch.nn import functional
from training.stages import Killed, batch_of, kill_after, rows, setting, train
from transformers import PreTrainedModel

from kdcli.errors import RunError
from kdcli.methods.base import Term
from kdcli.models.inputs import model_inputs
from kdcli.models.overparam import overparameterise
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tensors.mpo import contract
from kdcli.tensors.parametrization import chains_of
from kdcli.training.groups import MatchedSteps
from kdcli.training.schemes.base import Scheme
from kdcli.training.schemes.lgtm import Learning, LGTMScheme

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MATCHED: dict[str, Any] = {"chain_learning_rate": "matched"}


def chained(family: str = "bert", *, length: int = 1, **extra: Any) -> PreTrainedModel:
    model = tiny(family, layers=1, seed=1, **extra)
    overparameterise(model, OverparamSection(length=length, aux_weight=0.0))
    return model


def weights(model: PreTrainedModel) -> list[Tensor]:
    """Return the weight behind every chain, in fp64."""
    return [contract([t.detach().double() for t in chain], shape) for shape, chain in chains_of(model)]


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


class Watch(Scheme):
    """Notes the weights behind the chains before every step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def before_step(self, step: int, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        self.weights.append(weights(self.setting.student))


def go(
    folder: Path, student: PreTrainedModel, *, scheme: Scheme | None = None, resume: bool = False, **loop: Any
) -> Any:
    place = setting(student, None, rows(40), **{**MATCHED, **loop})
    return train(scheme or Scheme(), place, [Term("task", GoldObjective(Categorical()))], folder, resume=resume)


@pytest.mark.parametrize("length", [0, 1, 3, 8])
def test_the_first_step_moves_every_weight_by_the_students_own_rate(tmp_path: Path, length: int):
    student, watch = chained(length=length, **OFF), Watch()
    go(tmp_path, student, scheme=watch, max_steps=1, learning_rate=1e-5)
    for name, before, after in zip(range(6), watch.weights[0], weights(student), strict=True):
        # Of a few entries the gradient is too small against Adam's epsilon for a full step.
        assert 0.9e-5 < rms(after - before) < 1.02e-5, name


def test_a_frozen_central_tensor_does_not_slow_the_others_down(tmp_path: Path):
    student, watch = tiny("bert", layers=1, seed=1, **OFF), Watch()
    overparameterise(student, OverparamSection(length=1, aux_weight=0.0, train="auxiliary"))
    go(tmp_path, student, scheme=watch, max_steps=1, learning_rate=1e-5)
    for name, before, after in zip(range(6), watch.weights[0], weights(student), strict=True):
        assert 0.9e-5 < rms(after - before) < 1.02e-5, name


def test_a_layers_rate_does_not_move_what_another_one_is(tmp_path: Path):
    """Without matching, the same step moves the weights behind longer chains further."""
    moved = []
    for length in (0, 8):
        student, watch = chained(length=length, **OFF), Watch()
        go(tmp_path / str(length), student, scheme=watch, max_steps=1, learning_rate=1e-5, chain_learning_rate=1e-5)
        moved.append(rms(weights(student)[0] - watch.weights[0][0]))
    assert moved[1] > 1.5 * moved[0]


def test_a_stopped_training_goes_on_to_the_same_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loop = {"max_steps": 6, "eval_every": 3}
    whole, part, resumed = chained(), chained(), chained()
    record = go(tmp_path / "whole", whole, **loop)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 3)
        go(tmp_path / "parts", part, **loop)
    again = go(tmp_path / "parts", resumed, resume=True, **loop)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert record["history"] == again["history"]


def test_accumulated_parts_give_the_step_of_the_whole_batch(tmp_path: Path):
    one, other = chained(**OFF), chained(**OFF)
    go(tmp_path / "one", one)
    go(tmp_path / "other", other, gradient_accumulation=4)
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_chain_that_layers_share_makes_one_matched_step(tmp_path: Path, precision: str):
    student, watch = chained("albert", **OFF), Watch()
    tied = student.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    assert len(chains_of(student)) == 6
    go(tmp_path, student, scheme=watch, max_steps=2, learning_rate=1e-5, precision=precision, scheduler="constant")
    assert tied.query.weight.dtype == torch.float32
    for before, after in zip(watch.weights[0], watch.weights[1], strict=True):
        assert 0.5e-5 < rms(after - before) < 1.02e-5


def test_at_eight_middle_tensors_the_students_own_rate_does_not_diverge(tmp_path: Path):
    """A rate at which plain steps on so long a chain blow up, in the same number of steps."""
    loop: dict[str, Any] = {"max_steps": 30, "learning_rate": 1e-2, "scheduler": "constant", "log_every": 10}
    record = go(tmp_path / "matched", chained(length=8, **OFF), **loop)
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    try:
        plain = go(tmp_path / "plain", chained(length=8, **OFF), **{**loop, "chain_learning_rate": 1e-2})
        assert plain["history"][-2]["loss"] > losses[-1]
    except RunError as error:
        assert "diverged" in error.message


def test_lgtm_looks_ahead_to_where_the_matched_step_leads(tmp_path: Path):
    teacher, student = tiny("bert", layers=2, **OFF), chained(length=8, **OFF)
    place = replace(setting(student, teacher, rows(40), **MATCHED), overparam=OverparamSection(length=8))
    scheme = LGTMScheme(Learning(CLASSIFICATION, alpha_student=0.0))
    scheme.begin(place)
    scheme.place(torch.device("cpu"))
    twin, batch = copy.deepcopy(student), batch_of(place)

    def loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(model(**model_inputs(model, batch)).logits, batch["labels"])

    # What it would come to, by making the step.
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    MatchedSteps(twin).attach(optimizer)
    loss(twin, batch).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), place.loop.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    assert scheme.held is not None
    loss(twin, scheme.held.batch(0, torch.device("cpu"))).backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]

    own = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    found = scheme.direction(loss(student, batch), 0, own)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)

    # The teacher that learns makes matched steps, too.
    before = weights(scheme.teacher())
    scheme.before_step(0, batch, own)
    for old, new in zip(before, weights(scheme.teacher()), strict=True):
        assert rms(new - old) == pytest.approx(scheme.teacher_rate(0), rel=0.1)
