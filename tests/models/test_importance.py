"""Which matrices matter to a loss: measured by zeroing each, against models that have a zero there."""

import copy
from typing import Any

import pytest
import torch
from families import NAMES, matrices, tiny
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdcli.models.blocks import iter_block_matrices
from kdcli.models.importance import most_important, zeroing_importance
from kdcli.models.lowrank import factorise
from kdcli.models.overparam import candidates, overparameterise
from kdcli.recipe.schema import OverparamSection, StudentSection

SECTION = OverparamSection(length=1, aux_weight=0.0)
IDS = torch.randint(5, 200, (8, 10), generator=torch.Generator().manual_seed(0))


def loss(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return functional.cross_entropy(model(input_ids=IDS).logits, torch.arange(8) % 2)


def low_rank() -> PreTrainedModel:
    model = tiny("bert")
    factorise(model, StudentSection(form="low-rank", rank=8))
    return model


@pytest.mark.parametrize("family", [*NAMES, "low-rank"])
def test_importance_is_the_change_of_the_loss_without_the_matrix(family: str):
    model = low_rank() if family == "low-rank" else tiny(family)
    before = copy.deepcopy(model.state_dict())
    found = zeroing_importance(candidates(model, SECTION), lambda: loss(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(found) == (12 if family == "low-rank" else matrices(family))
    for key, importance in found.items():
        without = copy.deepcopy(model)
        matrix: Any = dict(iter_block_matrices(without))[key]
        with torch.no_grad():
            (matrix.module.up.weight if family == "low-rank" else matrix.weight).zero_()
        assert importance == pytest.approx(float((loss(without) - loss(model)).abs()), abs=1e-6)
    assert max(found.values()) > 1e-3


def test_a_failure_leaves_the_weights_as_they_were():
    model, calls = tiny("bert"), iter([torch.tensor(1.0), torch.tensor(2.0)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StopIteration):
        zeroing_importance(candidates(model, SECTION), lambda: next(calls))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_most_important_are_taken_in_the_models_order():
    importance = {(1, "query"): 0.5, (1, "key"): 2.0, (2, "query"): 0.5, (2, "key"): 3.0}
    assert most_important(importance, 2) == [(1, "key"), (2, "key")]
    assert most_important(importance, 3) == [(1, "query"), (1, "key"), (2, "key")]


@pytest.mark.parametrize(
    "model", [tiny("bert"), tiny("modernbert"), low_rank()], ids=["bert", "modernbert", "low-rank"]
)
def test_only_the_chosen_matrices_become_chains(model: PreTrainedModel):
    chosen = [(2, "query"), (1, "ffn_in")]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    report = overparameterise(model, SECTION, chosen)
    names = {f"{row.block}.{row.matrix.partition('.')[0]}" for row in report.rows}
    assert names == {"2.query", "1.ffn_in"}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
