"""Matrices that become chains while a student trains: which, when, and that nothing else changes."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import factors_of
from families import tiny
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from training.stages import Killed, kill_after, rows, setting
from transformers import PreTrainedModel

from kdcli.methods.base import Term
from kdcli.models.blocks import iter_block_matrices
from kdcli.models.overparam import contract_model, overparameterise, teacher_factors
from kdcli.models.probe import probe
from kdcli.objectives.cores import TensorObjective
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.training.growing import GrowingChains
from kdcli.training.sampler import EpochSampler
from kdcli.training.schemes.base import Scheme
from kdcli.training.step import Distiller
from kdcli.training.trainer import fit

SECTION = {"length": 1, "select": "dynamic", "matrices": 5, "select_count": 2, "select_every": 2}


class Watch(Scheme):
    """Notes before every forward pass what is a chain, what the student computes, and what the optimizer holds."""

    def __init__(self) -> None:
        self.chains: list[set[Any]] = []
        self.outputs: list[Tensor] = []
        self.blank: list[int] = []

    def before_step(self, step: int, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        student = self.setting.student
        self.chains.append(set(factors_of(student)))
        self.outputs.append(probe(student))
        held = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [p for p in student.parameters() if p.requires_grad]
        assert {id(p) for p in held} == {id(p) for p in trained} and len(held) == len(set(held))
        # AdamW knows what it has updated.
        state = getattr(optimizer, "optimizer", optimizer).state
        assert all(any(p is q for q in held) for p in state)
        self.blank.append(sum(p not in state for p in held))
        student.train()


def go(folder: Path, student: PreTrainedModel, *, resume: bool = False, console: Any = None, **loop: Any) -> Any:
    section = OverparamSection(**{**SECTION, **loop.pop("section", {})})
    place, watch = setting(student, None, rows(40), **{"max_steps": 9, **loop}), Watch()
    watch.begin(place)
    teacher, wide = tiny("bert", layers=2), tiny("bert", layers=2)
    overparameterise(wide, OverparamSection(length=section.length))
    factors = teacher_factors(teacher, wide, [(1, 1), (2, 2)], section)[0]
    terms = [Term("task", GoldObjective(Categorical())), Term("tensor", TensorObjective(), 3.0)]
    console = console or Console(quiet=True)
    record = fit(
        Distiller(student, terms, kind=CLASSIFICATION, teacher_factors=factors),
        train=place.train,
        selection=place.train if place.loop.eval_every else None,
        collator=place.collator,
        metrics=lambda outputs: {"accuracy": float(outputs["logits"].std())},
        settings=place.loop,
        folder=folder,
        log_dir=None,
        title="test",
        console=console,
        scheme=watch,
        growing=GrowingChains(student, section, steps=place.loop.max_steps or 0, console=console),
        resume=resume,
    )
    return watch, record


def test_a_few_at_a_time_become_chains_until_all_are_there(tmp_path: Path):
    student, output = tiny("bert", layers=2, seed=1), io.StringIO()
    watch, record = go(tmp_path, student, console=Console(file=output, width=200))
    assert [len(chains) for chains in watch.chains] == [0, 0, 2, 2, 4, 4, 5, 5, 5]
    assert all(before <= after for before, after in zip(watch.chains, watch.chains[1:], strict=False))
    # Three tensors of each new chain have no moments yet; all have after their first step.
    assert watch.blank[1:] == [0, 6, 0, 6, 0, 3, 0, 0]
    assert "from step 2 on (2 of 5)" in output.getvalue()
    logged = [entry for entry in record["history"] if "tensor" in entry]
    assert logged[0]["tensor"] == 0.0 and logged[-1]["tensor"] > 0.0 and "tensor_gradient" in logged[-1]


def test_the_function_is_the_same_before_and_after(tmp_path: Path):
    """With a rate of nothing only the change from matrices to chains could move the outputs."""
    student = tiny("bert", layers=2, seed=1)
    watch, _ = go(tmp_path, student, learning_rate=1e-12)
    assert len(watch.chains[-1]) == 5
    for output in watch.outputs[1:]:
        torch.testing.assert_close(output, watch.outputs[0], atol=1e-4, rtol=1e-4)


def test_the_first_chosen_have_the_greatest_gradient_times_weight(tmp_path: Path):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student = tiny("bert", layers=2, seed=1, **off)
    place = setting(student, None, rows(40))
    distiller = Distiller(student, [Term("task", GoldObjective(Categorical()))], kind=CLASSIFICATION)
    distiller.train()
    expected: dict[Any, float] = {}
    sampler = EpochSampler(place.train["length"][:], 8, seed=place.loop.seed, group=True)
    for first in (0, 8):
        student.zero_grad()
        chosen = sampler.order()[first : first + 8]
        distiller(place.collator([place.train[int(i)] for i in chosen]))["loss"].backward()
        for key, matrix in iter_block_matrices(student):
            change = float((matrix.weight.grad * matrix.weight.detach()).abs().sum())  # type: ignore[operator]
            expected[key] = expected.get(key, 0.0) + change
    distiller.close()
    student.zero_grad()
    watch, _ = go(tmp_path, student, learning_rate=1e-12, max_steps=3)
    assert watch.chains[2] == set(sorted(expected, key=lambda key: -expected[key])[:2])


@pytest.mark.parametrize("at", [3, 6])
def test_a_stopped_training_goes_on_to_the_same_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    """The stop comes between two choices: what was measured before it counts in the next one."""
    loop = {"eval_every": 3, "chain_learning_rate": "matched", "section": {"train": "auxiliary"}}
    whole, part, resumed = (tiny("bert", layers=2, seed=1) for _ in range(3))
    one, record = go(tmp_path / "whole", whole, **loop)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        go(tmp_path / "parts", part, **loop)
    torch.manual_seed(99)
    other, again = go(tmp_path / "parts", resumed, resume=True, **loop)
    assert other.chains == one.chains[at:]
    mine, yours = whole.state_dict(), resumed.state_dict()
    assert mine.keys() == yours.keys() and all(torch.equal(value, yours[name]) for name, value in mine.items())
    assert record["history"] == again["history"]


def test_the_best_weights_come_back_with_the_chains_that_they_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    student = tiny("bert", layers=2, seed=1)
    # The spread of the outputs falls at so high a rate of decay.
    loop = {"eval_every": 3, "select": "best", "weight_decay": 100.0}
    watch, record = go(tmp_path, student, **loop)
    assert record["best_step"] == 3 and len(watch.chains[-1]) == 5
    assert set(factors_of(student)) == watch.chains[3] and len(watch.chains[3]) == 2
    kept = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    own = student.state_dict()
    assert all(torch.equal(own[name.removeprefix("student.")], value) for name, value in kept.items())
    contract_model(student)
    assert not factors_of(student)
