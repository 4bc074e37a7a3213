"""Factors that are closest for real inputs: the optimum of their error, the SVD where inputs say nothing."""

import pytest
import torch
from families import NAMES, tiny
from torch import Tensor, nn

from kdcli.models.blocks import iter_block_matrices
from kdcli.models.factoriser import Factoriser, decompose_by_inputs
from kdcli.models.lowrank import factorise, spread_ranks
from kdcli.models.probe import probe
from kdcli.models.statistics import Statistics, collect_statistics
from kdcli.recipe.schema import StudentSection
from kdcli.signals import MatrixKey

KEY: MatrixKey = (1, "query")


@pytest.fixture
def world() -> tuple[nn.Linear, Tensor, Statistics]:
    """A layer, inputs (n, in) with a mean and unequal directions, and their statistics."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 14)
    inputs = torch.randn(400, 10) @ torch.diag(torch.logspace(0, -2, 10)) @ torch.randn(10, 10) + torch.randn(10)
    covariance = torch.cov(inputs.T.double(), correction=0).float()
    return linear, inputs, Statistics(inputs.mean(0), covariance, torch.rand(14), torch.rand(14))


def error(up: Tensor, down: Tensor, wanted: Tensor, inputs: Tensor, rows: Tensor) -> Tensor:
    """Return the mean weighed squared error of A B x, without its mean where `inputs` are centred."""
    return ((wanted - inputs @ (up @ down).T).square() * rows).sum(1).mean()


def test_weights_of_rows_are_those_of_fwsvd():
    torch.manual_seed(2)
    weight, importance = torch.randn(9, 5, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.1
    scale = torch.diag(importance.sqrt())
    left, values, right = torch.linalg.svd(scale @ weight, full_matrices=False)
    wanted = torch.linalg.inv(scale) @ left[:, :2] @ torch.diag(values[:2]) @ right[:2]
    up, down = decompose_by_inputs(weight, rows=importance).cut(2)
    torch.testing.assert_close(up @ down, wanted)


def test_what_is_lost_is_what_the_losses_of_the_terms_add_up_to(world: tuple[nn.Linear, Tensor, Statistics]):
    linear, inputs, of = world
    found = decompose_by_inputs(linear.weight, of.moments)
    up, down = found.cut(4)
    wanted = (inputs @ linear.weight.T).detach().double()
    lost = float(error(up, down, wanted, inputs.double(), torch.ones(14)))
    assert lost == pytest.approx(float(found.losses[4:].sum()), rel=1e-3)
    assert (found.losses.diff() <= 0).all()


def test_directions_that_no_input_has_are_ordered_by_the_weight():
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    moments = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    up, down = decompose_by_inputs(weight, moments).cut(2)
    torch.testing.assert_close(up @ down, torch.diag(torch.tensor([1.0, 0.0, 0.0, 4.0])).double())


@pytest.mark.parametrize("family", NAMES)
def test_full_rank_factors_from_statistics_give_the_same_logits(family: str):
    model = tiny(family)
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(5, 200, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    before = probe(model)
    statistics = collect_statistics(model, [batch], lambda b: model(**b).logits.square().mean())
    assert set(statistics) == {key for key, _ in iter_block_matrices(model)}
    for _, of in statistics.items():
        assert of.importance is not None and (of.importance >= 0).all() and of.importance.sum() > 0
    factoriser = Factoriser(True, True, statistics)
    for key, matrix in iter_block_matrices(model):
        linear: nn.Linear = matrix.linear()  # type: ignore[assignment]
        up, down = factoriser.factors(key, linear, min(linear.weight.shape))
        with torch.no_grad():
            matrix.weight.copy_(up @ down)
    torch.testing.assert_close(probe(model), before, atol=1e-4, rtol=1e-4)


def test_factors_of_a_model_are_closer_for_its_inputs_than_the_svd():
    teacher = tiny("bert", hidden=48)
    torch.manual_seed(3)
    ids = torch.randint(5, 40, (64, 12))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]
    statistics = collect_statistics(teacher, batches)
    others = {"input_ids": torch.randint(5, 40, (32, 12))}
    errors = []
    for factoriser in (Factoriser(), Factoriser(by_inputs=True, statistics=statistics)):
        student = tiny("bert", hidden=48)
        factorise(student, StudentSection(form="low-rank", budget=0.5), factoriser=factoriser)
        with torch.no_grad():
            errors.append(float((student(**others).logits - teacher(**others).logits).square().mean()))
    assert errors[1] < 0.8 * errors[0]


SHAPES: dict[MatrixKey, tuple[int, int]] = {(1, "query"): (16, 16), (1, "ffn_in"): (32, 16), (1, "ffn_out"): (16, 32)}


def falling(start: float, share: float) -> Tensor:
    return start * share ** torch.arange(16.0)


def test_ranks_that_chains_cannot_be_made_of_are_passed_over():
    losses = {key: falling(1.0, 0.9) for key in SHAPES}
    ranks = spread_ranks(SHAPES, dict.fromkeys(SHAPES, 4), 600, losses, 1, lambda key, rank: rank in (None, 4, 6, 9))
    assert set(ranks.values()) <= {None, 4, 6, 9}


def test_the_matrix_of_another_model_is_another_matrix(world: tuple[nn.Linear, Tensor, Statistics]):
    linear, _, of = world
    other = nn.Linear(10, 14)
    factoriser = Factoriser(by_inputs=True, statistics={KEY: of})
    first = factoriser.factors(KEY, linear, 3)
    second = factoriser.factors(KEY, other, 3)
    fresh = Factoriser(by_inputs=True, statistics={KEY: of}).factors(KEY, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(second, fresh, strict=True))
    assert not torch.allclose(first[0] @ first[1], second[0] @ second[1])
