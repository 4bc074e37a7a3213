"""Contracting a chain while it trains: at the cost of its FLOPs, and once per optimizer step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdcli.tensors.factors import MPOShape
from kdcli.tensors.mpo import restore


def _sizes(shape: MPOShape) -> list[int]:
    return [i * j for i, j in zip(shape.out_factors, shape.in_factors, strict=True)]


def _cost(shape: MPOShape, *, from_right: bool) -> int:
    """Return the multiply-adds of contracting from one end to the other."""
    sizes, bonds, n = _sizes(shape), shape.bond_dims(), len(shape)
    total, done = 0, 1
    for k in reversed(range(n)) if from_right else range(n):
        near, far = (bonds[k + 1], bonds[k]) if from_right else (bonds[k], bonds[k + 1])
        if done > 1:
            total += far * sizes[k] * near * done
        done *= sizes[k]
    return total


def from_right(shape: MPOShape) -> bool:
    """True when contracting from the right end is no dearer than from the left: start at the small end."""
    return _cost(shape, from_right=True) <= _cost(shape, from_right=False)


def chain_flops(shape: MPOShape, *, backward: bool = True) -> int:
    """Return the floating-point operations of one contraction; its backward pass costs twice as many again."""
    forward = 2 * min(_cost(shape, from_right=True), _cost(shape, from_right=False))
    return forward * 3 if backward else forward


_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


@dataclass
class ChainCache:
    """The last contraction of one chain: the weight, and the partial products that the backward pass needs.

    It holds for one state of the tensors: `key` is their places in memory, their versions (which every in-place
    change such as `copy_` or a broadcast raises) and the number of optimizer steps so far (fused optimizers do
    not raise versions). Under gradient accumulation and in evaluation the chain is therefore contracted once
    per optimizer step, and never stale.
    """

    key: tuple[Any, ...] = ()
    weight: Tensor | None = None
    partials: list[Tensor] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChainCache":
        return ChainCache()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _products(chain: tuple[Tensor, ...], shape: MPOShape, right: bool) -> list[Tensor]:
    """Return the partial products from the starting end: the last one is the whole rearranged matrix.

    From the right, product k is (d_{k-1}, everything right of it); from the left (everything left, d_k).
    """
    if right:
        products = [chain[-1].reshape(chain[-1].shape[0], -1)]
        for tensor in reversed(chain[:-1]):
            matrix = tensor.reshape(-1, tensor.shape[-1])
            products.append((matrix @ products[-1]).reshape(tensor.shape[0], -1))
    else:
        products = [chain[0].reshape(-1, chain[0].shape[-1])]
        for tensor in chain[1:]:
            matrix = tensor.reshape(tensor.shape[0], -1)
            products.append((products[-1] @ matrix).reshape(-1, tensor.shape[-1]))
    return products


class _Contract(torch.autograd.Function):
    """W = contract(T_1..T_n). Backward costs two products a tensor, as the chain rule needs, and no more."""

    @staticmethod
    def forward(ctx: Any, shape: MPOShape, cache: ChainCache, *chain: Tensor) -> Tensor:
        key = (_steps, *((tensor.data_ptr(), tensor._version, tensor.device) for tensor in chain))
        right = from_right(shape)
        if cache.key != key or cache.weight is None:
            products = _products(tuple(t.detach() for t in chain), shape, right)
            cache.weight = restore(products[-1], shape)
            cache.partials = products[:-1]
            cache.key = key
        ctx.shape, ctx.right, ctx.partials = shape, right, cache.partials
        ctx.save_for_backward(*chain)
        # A fresh view: autograd must not see the cached tensor as an output twice.
        return cache.weight.view_as(cache.weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        chain: tuple[Tensor, ...] = ctx.saved_tensors
        shape: MPOShape = ctx.shape
        n = len(shape)
        axes = [axis for k in range(n) for axis in (k, n + k)]
        grad = gradients[0].reshape(*shape.out_factors, *shape.in_factors).permute(axes)
        result: list[Tensor] = [grad] * n
        if ctx.right:
            grad = grad.reshape(1, -1)
            for k in range(n - 1):
                tensor, product = chain[k], ctx.partials[n - 2 - k]
                # grad: (d_{k-1}, i j rest) of the product that starts at tensor k
                grad = grad.reshape(-1, product.shape[1])
                result[k] = (grad @ product.T).reshape(tensor.shape)
                grad = tensor.reshape(-1, tensor.shape[-1]).T @ grad
            result[n - 1] = grad.reshape(chain[n - 1].shape)
        else:
            grad = grad.reshape(-1, 1)
            for k in range(n - 1, 0, -1):
                tensor, product = chain[k], ctx.partials[k - 1]
                grad = grad.reshape(product.shape[0], -1)
                result[k] = (product.T @ grad).reshape(tensor.shape)
                grad = grad @ tensor.reshape(tensor.shape[0], -1).T
            result[0] = grad.reshape(chain[0].shape)
        return (None, None, *result)


def contract_cached(chain: tuple[Tensor, ...], shape: MPOShape, cache: ChainCache) -> Tensor:
    """Return the matrix (out, in) of a chain in the tensors' own type, differentiable once.

    Autocast is off inside: a bf16 chain of n tensors would lose about n 2^-8 (methods 3.7).
    """
    with torch.autocast(chain[0].device.type, enabled=False):
        return _Contract.apply(shape, cache, *chain)
