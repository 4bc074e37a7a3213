"""Which tensors of a chain train, and the log of how much the teacher's tensors pull at them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chains import factors_of
from families import tiny
from torch import Tensor
from training.stages import batch_of, rows, setting, train
from transformers import PreTrainedModel

from kdcli.methods.base import Term
from kdcli.models.overparam import contract_model, overparameterise, teacher_factors
from kdcli.objectives.cores import TensorObjective
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tensors.mpo import central_index, contract
from kdcli.training.schemes.base import Scheme
from kdcli.training.step import Distiller

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PAIRS = [(1, 2)]
WEIGHT = 30.0


def pair(**section: Any) -> tuple[PreTrainedModel, dict[Any, tuple[Tensor, ...]]]:
    """Return a chained student of one block, and its teacher's tensors."""
    chains = OverparamSection(**{"length": 1, **section})
    student = tiny("bert", layers=1, seed=1, **OFF)
    overparameterise(student, chains)
    return student, teacher_factors(tiny("bert", layers=2, **OFF), student, PAIRS, chains)[0]


def go(folder: Path, student: PreTrainedModel, factors: Any = None, **loop: Any) -> list[dict[str, Any]]:
    terms = [Term("task", GoldObjective(Categorical()))]
    if factors:
        terms.append(Term("tensor", TensorObjective(), WEIGHT))
    return train(Scheme(), setting(student, None, rows(40), **loop), terms, folder, factors=factors)["history"]


@pytest.mark.parametrize(("section", "middle"), [({"length": 3}, 2), ({"factorization": "svd"}, 0)])
def test_a_frozen_central_tensor_stays_while_the_others_train(tmp_path: Path, section: dict[str, Any], middle: int):
    student, _ = pair(train="auxiliary", **section)
    before = {key: [t.detach().clone() for t in chain] for key, chain in factors_of(student).items()}
    go(tmp_path, student, max_steps=2)
    assert len(before) == 6
    for key, chain in factors_of(student).items():
        assert middle == central_index(len(chain))
        stayed = [torch.equal(t, old) for t, old in zip(chain, before[key], strict=True)]
        assert stayed == [k == middle for k in range(len(chain))], key
    contract_model(student)
    assert all(p.requires_grad for p in student.parameters())


def test_a_matched_step_counts_what_trains_alone(tmp_path: Path):
    student, _ = pair(train="auxiliary", length=3)
    before = {key: contract([t.detach().double() for t in chain]) for key, chain in factors_of(student).items()}
    go(tmp_path, student, max_steps=1, learning_rate=1e-5, chain_learning_rate="matched")
    for key, chain in factors_of(student).items():
        moved = contract([t.detach().double() for t in chain]) - before[key]
        assert 0.9e-5 < float(moved.square().mean().sqrt()) < 1.02e-5, key


def share_by_hand(student: PreTrainedModel, factors: Any, batch: dict[str, Tensor]) -> float:
    """Return the ratio of the gradients' norms from two whole backward passes, of one loss each."""
    tensors = [t for chain in factors_of(student).values() for t in chain]
    gradients = []
    for terms in ([Term("task", GoldObjective(Categorical()))], [Term("tensor", TensorObjective(), WEIGHT)]):
        distiller = Distiller(student, terms, kind=CLASSIFICATION, teacher_factors=factors)
        student.train()
        found = torch.autograd.grad(distiller(batch)["loss"], tensors, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
        distiller.close()
    return float(gradients[1].norm() / gradients[0].norm())


@pytest.mark.parametrize("parts", [1, 4])
def test_the_log_has_the_ratio_of_the_gradients_where_a_step_is_logged(tmp_path: Path, parts: int):
    student, factors = pair()
    place = setting(student, None, rows(8), group_by_length=False)
    expected = share_by_hand(student, factors, batch_of(place))
    terms = [Term("task", GoldObjective(Categorical())), Term("tensor", TensorObjective(), WEIGHT)]
    # One batch that is all rows, and gradients far beyond the length that they are clipped to.
    loop = {"max_grad_norm": 1e-3, "max_steps": 5, "log_every": 3, "eval_every": 5, "gradient_accumulation": parts}
    place = setting(student, None, rows(8), **loop)
    history = train(Scheme(), place, terms, tmp_path, factors=factors)["history"]
    logged = {entry["step"]: entry["tensor_gradient"] for entry in history if "loss" in entry}
    assert list(logged) == [1, 3, 5]
    assert logged[1] == pytest.approx(expected, rel=1e-3)
    assert 0.01 < expected < 100 and logged[5] != logged[1]


def test_without_a_loss_between_chains_nothing_is_logged(tmp_path: Path):
    student, _ = pair(aux_weight=0.0)
    assert all("tensor_gradient" not in entry for entry in go(tmp_path, student, max_steps=1))
