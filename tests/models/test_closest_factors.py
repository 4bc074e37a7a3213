"""The closest factors of a matrix: for real inputs, for weighed outputs, and how ranks are spread by their worth."""

import itertools

import pytest
import torch
from families import tiny
from torch import Tensor, nn

from kdcli.models.blocks import iter_block_matrices
from kdcli.models.factoriser import Factoriser, decompose_by_inputs
from kdcli.models.lowrank import LEAST, LowRankLinear, factored_count, factorise, spread_ranks, svd_factors
from kdcli.models.statistics import Statistics
from kdcli.recipe.schema import StudentSection
from kdcli.signals import MatrixKey

KEY = (1, "query")
SIZES = [(6, 5), (5, 8), (9, 3)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(width: int, count: int = 400) -> Tensor:
    """Return inputs (count, width) that prefer some directions by far, around a mean that is not zero."""
    spread = torch.diag(torch.logspace(0, -1.5, width, dtype=torch.float64)) @ draw(1, width, width)
    return draw(2, count, width) @ spread + 0.7 * draw(3, width)


def moments_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def statistics_of(inputs: Tensor, **others: Tensor) -> Statistics:
    return Statistics(inputs.mean(0).float(), torch.cov(inputs.T, correction=0).float(), **others)


def error(weight: Tensor, factors: tuple[Tensor, Tensor], inputs: Tensor, rows: Tensor | None = None) -> Tensor:
    gap = inputs @ (weight - factors[0] @ factors[1]).T
    return (gap.square() * (torch.ones(len(weight)) if rows is None else rows)).sum(1).mean()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("weighed", [False, True])
def test_no_factors_of_that_rank_are_closer(size: tuple[int, int], weighed: bool):
    weight, inputs = draw(4, *size), inputs_of(size[1])
    rows = draw(5, size[0]).exp() if weighed else None
    found = decompose_by_inputs(weight, moments_of(inputs), rows)
    for rank in (1, min(size) - 1):
        closed = error(weight, found.cut(rank), inputs, rows)
        assert closed < 0.999 * error(weight, svd_factors(weight, rank), inputs, rows)
        best = torch.tensor(torch.inf)
        for seed in range(2):
            # Searched for from the SVD's factors, moved a little.
            start = [f + 0.1 * draw(10 + seed, *f.shape) for f in svd_factors(weight, rank)]
            factors = [factor.contiguous().requires_grad_() for factor in start]
            search = torch.optim.LBFGS(factors, lr=1.0, max_iter=150, line_search_fn="strong_wolfe")

            def value(search: torch.optim.Optimizer = search, factors: list[Tensor] = factors) -> float:
                search.zero_grad()
                loss = error(weight, (factors[0], factors[1]), inputs, rows)
                loss.backward()
                return float(loss.detach())

            search.step(value)
            best = torch.minimum(best, error(weight, (factors[0], factors[1]), inputs, rows).detach())
        assert closed <= best * (1 + 1e-6)
        assert closed == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_terms_are_balanced_and_all_of_them_are_the_matrix(size: tuple[int, int]):
    weight, inputs = draw(4, *size), inputs_of(size[1])
    for moments, rows in ((None, None), (moments_of(inputs), None), (moments_of(inputs), draw(5, size[0]).exp())):
        found = decompose_by_inputs(weight, moments, rows)
        torch.testing.assert_close(found.left @ found.right, weight)
        torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1))
        assert (found.losses.diff() <= 1e-12).all()
        if rows is None:
            # What is cut off is what the error is.
            seen = inputs if moments is not None else torch.eye(size[1], dtype=torch.float64) * size[1] ** 0.5
            for rank in range(1, min(size)):
                cut = found.losses[rank:].sum()
                torch.testing.assert_close(error(weight, found.cut(rank), seen), cut, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inputs_without_a_direction_give_the_svd(size: tuple[int, int]):
    weight = draw(4, *size)
    for moments, rows in ((None, None), (torch.eye(size[1]), None), (None, torch.ones(size[0]))):
        for rank in range(1, min(size)):
            left, right = decompose_by_inputs(weight, moments, rows).cut(rank)
            a, b = svd_factors(weight, rank)
            torch.testing.assert_close(left @ right, a @ b)
            torch.testing.assert_close(left, a)


def linear_of(weight: Tensor, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear


def test_the_bias_gives_back_the_mean_of_what_is_left_out():
    weight, inputs = draw(4, 6, 5), inputs_of(5).float()
    linear = linear_of(weight)
    factoriser = Factoriser(by_inputs=True, statistics={KEY: statistics_of(inputs.double())})
    errors = []
    for shift in (factoriser.shift(KEY, linear, 2), None):
        layer = LowRankLinear.from_linear(linear, 2, factoriser.factors(KEY, linear, 2), shift)
        gap = (linear(inputs) - layer(inputs)).detach()
        if shift is not None:
            torch.testing.assert_close(gap.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
        errors.append(gap.square().sum(1).mean())
    # With a bias the factors are chosen for what goes beyond the mean: no others, with a bias of their own, are closer.
    others = decompose_by_inputs(linear.weight, moments_of(inputs.double())).cut(2)
    rest = inputs.double() @ (linear.weight.detach().double() - others[0] @ others[1]).T
    assert errors[0] < 0.999 * (rest - rest.mean(0)).square().sum(1).mean() < errors[1]


def test_without_a_bias_the_mean_counts():
    inputs = inputs_of(5)
    linear = linear_of(draw(4, 6, 5), bias=False)
    factoriser = Factoriser(by_inputs=True, statistics={KEY: statistics_of(inputs)})
    found = factoriser.decomposition(KEY, linear)
    expected = decompose_by_inputs(linear.weight, moments_of(inputs))
    torch.testing.assert_close(found.left @ found.right[:, :1], expected.left @ expected.right[:, :1])
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_terms_worth_is_the_mean_square_of_what_it_adds_weighed_by_the_loss(bias: bool):
    inputs, linear = inputs_of(5), linear_of(draw(4, 6, 5), bias=bias)
    sensitivity = draw(6, 6).exp().float()
    statistics = statistics_of(inputs, importance=draw(7, 6).exp().float(), sensitivity=sensitivity)
    factoriser = Factoriser(by_inputs=True, statistics={KEY: statistics})
    terms, found = factoriser.decomposition(KEY, linear), factoriser.losses({KEY: linear})[KEY]
    seen = inputs - inputs.mean(0) if bias else inputs
    for k in range(5):
        added = (seen @ terms.right[k])[:, None] * terms.left[:, k]
        torch.testing.assert_close(found[k], (added.square() * sensitivity).sum(1).mean(), rtol=1e-4, atol=1e-7)


def test_each_aspect_chooses_as_it_is_told():
    inputs, linear = inputs_of(5), linear_of(draw(4, 6, 5))
    importance = draw(7, 6).exp().float()
    statistics = statistics_of(inputs, importance=importance, sensitivity=torch.ones(6))
    covariance = torch.cov(inputs.T, correction=0).float()
    for by_inputs, by_gradients in itertools.product((False, True), repeat=2):
        factoriser = Factoriser(by_inputs, by_gradients, {KEY: statistics})
        expected = decompose_by_inputs(
            linear.weight, covariance if by_inputs else None, importance if by_gradients else None
        )
        for found, wanted in zip(factoriser.factors(KEY, linear, 3), expected.cut(3), strict=True):
            torch.testing.assert_close(found, wanted.float())


def test_blocks_in_turn_are_looked_at_behind_the_factors_of_those_before():
    model = tiny("bert", layers=3)
    matrices = dict(iter_block_matrices(model))
    plain = {key: statistics_of(inputs_of(matrix.weight.shape[1])) for key, matrix in matrices.items()}
    fresh = {key: statistics_of(inputs_of(matrix.weight.shape[1]).flip(1)) for key, matrix in matrices.items()}
    seen: list[tuple[int, list[int]]] = []

    def look_again(student: nn.Module, layer: int) -> dict[MatrixKey, Statistics]:
        factored = {key[0] for key, m in iter_block_matrices(student) if isinstance(m.module, LowRankLinear)}
        seen.append((layer, sorted(factored)))
        return {key: of for key, of in fresh.items() if key[0] == layer}

    linears = {key: matrix.linear() for key, matrix in matrices.items()}
    factorise(model, StudentSection(form="low-rank", rank=8), None, Factoriser(True, False, dict(plain), look_again))
    assert seen == [(2, [1]), (3, [1, 2])]
    for key, matrix in iter_block_matrices(model):
        used = plain if key[0] == 1 else fresh
        expected = Factoriser(True, False, {key: used[key]}).factors(key, linears[key], 8)
        assert torch.equal(matrix.module.up.weight, expected[0]) and torch.equal(matrix.module.down.weight, expected[1])


# --- ranks -----------------------------------------------------------------------------------------------------------

SHAPES = {(1, "query"): (24, 24), (1, "key"): (24, 24), (2, "query"): (24, 24)}


def falling(seed: int, count: int = 24) -> Tensor:
    return draw(seed, count).exp().sort(descending=True).values


def left_over(losses: dict[MatrixKey, Tensor], ranks: dict[MatrixKey, int | None]) -> float:
    return sum(float(losses[key][rank:].sum()) for key, rank in ranks.items() if rank is not None)


@pytest.mark.parametrize("seed", range(4))
def test_ranks_of_matrices_of_one_size_are_the_best_there_are(seed: int):
    losses = {key: falling(10 * seed + number) * 3.0**number for number, key in enumerate(SHAPES)}
    allowed = 12 * 48
    found = spread_ranks(SHAPES, dict.fromkeys(SHAPES, 4), allowed, losses, 1)
    assert sum(factored_count(SHAPES[key], rank) for key, rank in found.items()) <= allowed
    # From the least that each keeps to where factors save nothing any more.
    choices = [
        dict(zip(SHAPES, ranks, strict=True))
        for ranks in itertools.product(range(int(4 * LEAST), 12), repeat=3)
        if sum(ranks) <= 12
    ]
    assert left_over(losses, found) == pytest.approx(min(left_over(losses, ranks) for ranks in choices))
    assert len(set(found.values())) > 1


def test_the_budget_goes_where_a_weight_is_worth_most():
    shapes = {(1, "query"): (64, 64), (1, "key"): (32, 16)}
    # A rank of the larger matrix is worth twice as much, and costs more than twice as much.
    losses = {(1, "query"): torch.full((64,), 2.0), (1, "key"): torch.full((16,), 1.0)}
    allowed = 8 * 128 + 4 * 48
    found = spread_ranks(shapes, {(1, "query"): 8, (1, "key"): 4}, allowed, losses, 1)
    # As factors it may have up to 10, dense it costs two thirds more than these.
    assert found[(1, "key")] is None or found[(1, "key")] == 10
    assert found[(1, "query")] is not None and found[(1, "query")] < 8


def test_ranks_keep_a_minimum_their_multiple_and_the_budget():
    shapes = {(1, "query"): (64, 64), (1, "ffn_in"): (128, 64), (1, "ffn_out"): (64, 128), (2, "query"): (64, 64)}
    losses = {key: falling(number, 64) for number, key in enumerate(shapes)}
    losses[(1, "query")] = torch.zeros(64)
    losses[(1, "ffn_out")] = losses[(1, "ffn_out")] * 100.0
    even = dict.fromkeys(shapes, 16)
    allowed = sum(factored_count(shape, 16) for shape in shapes.values())
    for multiple in (1, 4):
        found = spread_ranks(shapes, even, allowed, losses, multiple)
        ranks = {key: rank for key, rank in found.items() if rank is not None}
        assert all(rank % multiple == 0 for rank in ranks.values())
        assert sum(factored_count(shapes[key], rank) for key, rank in found.items()) <= allowed
        # What is worth nothing gets the least, and what is worth most more than its share.
        smallest = -(-LEAST * 16 // multiple) * multiple
        assert ranks[(1, "query")] == smallest == min(ranks.values())
        assert ranks.get((1, "ffn_out"), 64) > 16
        assert left_over(losses, found) < left_over(losses, even)


def test_factors_of_a_table_are_the_closest_where_tokens_are_frequent():
    generator = torch.Generator().manual_seed(4)
    table, counts = torch.randn(10_000, 12, generator=generator), torch.zeros(10_000)
    table[9_500:] = torch.randn(500, 4, generator=generator) @ torch.randn(4, 12, generator=generator)
    counts[9_500:] = 5_000.0
    factors = Factoriser(counts=counts).table_factors(table, 4)
    assert factors is not None
    closest = decompose_by_inputs(table, rows=counts + 1).cut(4)
    weight = (counts + 1)[:, None]
    errors = [float((weight * (table - left @ right).square()).sum()) for left, right in (factors, closest)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    plain = svd_factors(table, 4)
    assert errors[0] < 0.7 * float((weight * (table - plain[0] @ plain[1]).square()).sum())
    # Both sides have vectors of one length.
    torch.testing.assert_close(factors[0].norm(dim=0), factors[1].norm(dim=1), rtol=1e-3, atol=0)
    whole = Factoriser(counts=counts).table_factors(table, 12)
    assert whole is not None
    torch.testing.assert_close(whole[0] @ whole[1], table, rtol=0, atol=1e-4)
    assert Factoriser().table_factors(table, 4) is None
