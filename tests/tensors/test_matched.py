"""Matched steps of a chain: how far they move its weight, against forward-mode autodiff and a dense weight's step."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from kdcli.tensors.factors import MPOShape, auto_factors
from kdcli.tensors.matched import COLUMNS, LARGEST, first_order_movement, match_step
from kdcli.tensors.mpo import contract, decompose

LENGTHS = [0, 1, 3, 8]
TALL = MPOShape((2, 1, 1, 6), (2, 1, 1, 4))  # contracted from the left


def chain_shape(out_features: int, in_features: int, length: int) -> MPOShape:
    (a, b), (c, d) = auto_factors(out_features), auto_factors(in_features)
    return MPOShape((a, *[1] * length, b), (c, *[1] * length, d))


OTHERS = [
    chain_shape(384, 1536, 3),
    chain_shape(1536, 384, 1),
    MPOShape((8, 2, 4, 6), (3, 4, 2, 9)),
    MPOShape((6, 2, 5), (4, 7, 8)),
    MPOShape((64, 1), (1, 48)),
]


def make(shape: MPOShape, *, rate: float = 1e-5, rank: int = 4, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return the chain of a random weight, and Adam's first step on it under a loss with a gradient of that rank."""
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = shape.matrix
    chain = [t.requires_grad_() for t in decompose(0.04 * torch.randn(shape.matrix, generator=generator), shape)]
    gradient = torch.randn(out_features, rank, generator=generator) @ torch.randn(
        rank, in_features, generator=generator
    )
    gradients = torch.autograd.grad((contract(chain, shape) * gradient).sum(), chain)
    return [t.detach() for t in chain], [-rate * g.sign() for g in gradients]


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def movement(shape: MPOShape, chain: Sequence[Tensor], moves: Sequence[Tensor]) -> float:
    """Return what `first_order_movement` is about, by forward-mode autodiff."""

    def weight(*tensors: Tensor) -> Tensor:
        return contract(tensors, shape)

    wide = [tuple(t.double() for t in tensors) for tensors in (chain, moves)]
    return rms(torch.func.jvp(weight, *wide)[1])


@pytest.mark.parametrize("shape", [*(chain_shape(32, 32, length) for length in LENGTHS), TALL], ids=str)
def test_the_movement_is_that_of_forward_mode_autodiff(shape: MPOShape):
    chain, moves = make(shape)
    assert float(first_order_movement(chain, moves, shape)) == pytest.approx(movement(shape, chain, moves), rel=1e-4)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
def test_with_more_columns_than_directions_it_is_measured_within_a_few_percent(shape: MPOShape):
    assert max(shape.out_factors[k] * shape.in_factors[k] for k in (0, -1)) > COLUMNS
    chain, moves = make(shape)
    assert float(first_order_movement(chain, moves, shape)) == pytest.approx(movement(shape, chain, moves), rel=0.06)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("sizes", "within"), [((32, 32), 1e-3), ((384, 384), 0.04)])
def test_a_matched_step_moves_the_weight_as_far_as_one_on_the_weight(
    sizes: tuple[int, int], within: float, length: int
):
    shape, rate = chain_shape(*sizes, length), 1e-5
    chain, moves = make(shape, rate=rate)
    after = [tensor + move for tensor, move in zip(chain, moves, strict=True)]
    match_step(shape, chain, after, trained=shape.parameter_count())
    moved = contract([t.double() for t in after], shape) - contract([t.double() for t in chain], shape)
    # Every entry of every tensor has moved by the rate, as every entry of a dense weight would in Adam's first step.
    assert rms(moved) == pytest.approx(rate, rel=within)
    # The direction is still Adam's: every tensor's step by one common factor.
    factors = [(a - t).norm() / m.norm() for a, t, m in zip(after, chain, moves, strict=True)]
    assert max(factors) == pytest.approx(float(min(factors)), rel=0.05)


def test_noise_shortens_a_matched_step_as_it_does_a_dense_one():
    """Adam on gradients that are noise alone: the chain's weight moves as far as a dense one, not by the rate."""
    shape, rate = chain_shape(32, 32, 3), 1e-6
    dense = nn.Parameter(torch.zeros(shape.matrix))
    chain = [nn.Parameter(t) for t in make(shape)[0]]
    optimizer = torch.optim.Adam([dense, *chain], lr=rate)
    generator = torch.Generator().manual_seed(0)
    moved: list[tuple[float, float]] = []
    for _ in range(40):
        noise = torch.randn(shape.matrix, generator=generator)
        dense.grad = noise
        for tensor, grad in zip(chain, torch.autograd.grad((contract(chain, shape) * noise).sum(), chain), strict=True):
            tensor.grad = grad
        before = [t.detach().clone() for t in [dense, *chain]]
        optimizer.step()
        match_step(shape, before[1:], chain, trained=shape.parameter_count())
        weight = contract([t.double() for t in chain], shape) - contract([t.double() for t in before[1:]], shape)
        moved.append((rms(dense.detach() - before[0]), rms(weight.detach())))
    late = torch.tensor(moved[20:]).mean(0) / rate
    assert 0.2 < late[0] < 0.5
    assert late[1] == pytest.approx(float(late[0]), rel=0.2)


def test_a_frozen_tensor_stays_and_does_not_count():
    shape, rate = chain_shape(32, 32, 3), 1e-5
    chain, moves = make(shape, rate=rate)
    after = [t + (m if k != 2 else 0.0) for k, (t, m) in enumerate(zip(chain, moves, strict=True))]
    match_step(shape, chain, after, trained=shape.parameter_count() - chain[2].numel())
    assert torch.equal(after[2], chain[2])
    moved = contract([t.double() for t in after], shape) - contract([t.double() for t in chain], shape)
    assert rms(moved) == pytest.approx(rate, rel=1e-3)


def test_without_a_step_nothing_moves_and_a_vanishing_chain_is_not_thrown_far():
    shape = chain_shape(32, 32, 1)
    chain, moves = make(shape)
    still = [t.clone() for t in chain]
    match_step(shape, chain, still, trained=shape.parameter_count())
    assert all(torch.equal(a, b) for a, b in zip(still, chain, strict=True))
    zeros = [torch.zeros_like(t) for t in chain]
    after = [m.clone() for m in moves]
    match_step(shape, zeros, after, trained=shape.parameter_count())
    assert all(torch.allclose(a, LARGEST * m) for a, m in zip(after, moves, strict=True))
