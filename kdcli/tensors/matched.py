"""Steps on the tensors of a chain that move its weight as far as a step on the weight itself would."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kdcli.tensors.chain import from_right
from kdcli.tensors.factors import MPOShape

Tensors = list[Tensor] | tuple[Tensor, ...]

COLUMNS = 32
"""Random directions that a weight's movement is measured in: exact up to so many columns, else within a few percent."""

LARGEST = 10.0
"""The most that a step is lengthened: where the tensors around it vanish, the first order says nothing about it."""


@cache
def _directions(columns: int, device: torch.device) -> Tensor:
    """Return orthogonal directions Z (columns, at most COLUMNS), the same in every run, with E[Z Z^T] = 1."""
    count = min(columns, COLUMNS)
    drawn = torch.randn(columns, count, dtype=torch.float64, generator=torch.Generator().manual_seed(columns))
    return (torch.linalg.qr(drawn).Q * (columns / count) ** 0.5).to(device, torch.float32)


def first_order_movement(chain: Sequence[Tensor], moves: Sequence[Tensor], shape: MPOShape) -> Tensor:
    """Return the root mean square, over the weight's entries, of how far `moves` of a chain's tensors move its weight.

    That is dW = sum_k contract(T_1 .. dT_k .. T_n), without the products of two moves and more: one forward-mode
    product through the chain. dW is not formed; it is measured in COLUMNS directions at the small end, which costs
    COLUMNS / r of a contraction with bonds of r. Returns a scalar on the tensors' device.
    """
    pairs = [(tensor.float(), move.float()) for tensor, move in zip(chain, moves, strict=True)]
    # The same loop from the other end: the chain of the mirrored axes has the same entries.
    pairs = pairs[::-1] if from_right(shape) else [(t.permute(3, 1, 2, 0), m.permute(3, 1, 2, 0)) for t, m in pairs]
    value, change = (side.reshape(side.shape[0], -1) for side in pairs[0])
    for tensor, move in pairs[1:]:
        if value.shape[1] > COLUMNS:
            directions = _directions(value.shape[1], value.device)
            value, change = value @ directions, change @ directions
        near, moved = (side.reshape(-1, side.shape[-1]) for side in (tensor, move))
        value, change = (
            (near @ value).reshape(tensor.shape[0], -1),
            (moved @ value).addmm_(near, change).reshape(tensor.shape[0], -1),
        )
    out_features, in_features = shape.matrix
    return torch.linalg.vector_norm(change) / (out_features * in_features) ** 0.5


@torch.no_grad()
def match_step(shape: MPOShape, before: Tensors, after: Tensors, *, trained: int) -> None:
    """Scale the step from `before` to `after` of a chain's tensors, in `after`: its weight moves as a dense one would.

    trained: how many of the tensors' entries train; the others do not move.
    What is matched, to first order, is the root mean square of the weight's movement. Adam moves a dense weight by
    lr m / (sqrt(v) + eps): by lr while its gradient keeps its sign, by less the noisier the gradient is. The
    gradients of a chain's tensors are linear images of its weight's gradient, as noisy as that is, so the root mean
    square of Adam's step over all trained tensors of the chain, at the learning rate of a dense weight, stands for
    that of its step on the weight. (The learning rate alone would not: noise would move the weight in full steps.)

    The factor of every step follows from the step alone, on the tensors' device; nothing is remembered.
    """
    moves = torch._foreach_sub(after, before)
    step = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(moves))) / trained**0.5
    found = first_order_movement(before, moves, shape)
    # Where nothing moves (no gradient in this step, a learning rate of 0) both are zero.
    factor = (step / found.clamp_min(torch.finfo(found.dtype).tiny)).clamp_max(LARGEST)
    torch._foreach_mul_(moves, factor)
    torch._foreach_copy_(after, torch._foreach_add(before, moves))
