"""Contracting a chain while it trains: at the cost of its FLOPs, and once per optimizer step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdcli.tensors.factors import MPOShape
from kdcli.tensors.mpo import rearrange, restore


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


_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# Fused optimizers write into parameters without raising their versions; that a step was made is all there is.
register_optimizer_step_post_hook(_count_step)


class ChainCache:
    """The last contraction of one chain: the weight, and the partial products that its backward pass needs.

    It holds for one state of the tensors: their places in memory, their versions (which every in-place change
    such as `copy_`, a broadcast or loading raises) and the number of optimizer steps so far. Under gradient
    accumulation and in evaluation a chain is therefore contracted once per optimizer step. What cannot be seen
    is a write through `.data` outside of an optimizer step: call `clear` after one.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the contraction and give its memory back."""
        self._key: tuple[Any, ...] | None = None
        # Holding on to the tensors keeps another one from getting the same place in memory.
        self._held: tuple[Tensor, ...] = ()
        self._weight: Tensor | None = None
        self._partials: list[Tensor] = []

    def read(self, chain: tuple[Tensor, ...], shape: MPOShape) -> tuple[Tensor, list[Tensor]]:
        """Return the matrix (out, in) of a chain, and its partial products from the starting end; no gradient."""
        # Tensors made in inference mode could not be used in a later training step; these outlive the mode.
        with torch.inference_mode(False), torch.no_grad():
            key = self._key_of(chain)
            if key is None or key != self._key or self._weight is None:
                self.clear()
                held = tuple(tensor.detach() for tensor in chain)
                products = _products(tuple(_wide(tensor) for tensor in held), shape, from_right(shape))
                self._weight = restore(products[-1], shape).to(chain[0].dtype)
                self._partials = products[:-1]
                self._held = held
                # Taken after the work: `_weight` is new, and the tensors have not changed in between.
                self._key = self._key_of(chain)
            return self._weight, self._partials

    def _key_of(self, chain: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        if any(tensor.is_inference() for tensor in chain):
            return None
        # The weight's own version: it is handed out, and it may be written into.
        own = None if self._weight is None else self._weight._version
        places = ((t.data_ptr(), t._version, t.dtype, t.device) for t in chain)
        return (_steps, own, *places)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChainCache":
        return ChainCache()

    def __reduce__(self) -> Any:
        return ChainCache, ()


def _wide(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in fp32: a bf16 chain of n tensors would lose about n 2^-8."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, on devices that have it (the meta device has not)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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
        weight, ctx.partials = cache.read(chain, shape)
        ctx.shape = shape
        ctx.save_for_backward(*chain)
        # A fresh alias: autograd marks it as this node's output, and the cached tensor stays free.
        return weight.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        chain: tuple[Tensor, ...] = ctx.saved_tensors
        with _full_precision(chain[0].device):
            grads = _gradients(rearrange(_wide(gradients[0]), ctx.shape), chain, ctx.partials, ctx.shape)
        needed = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(
                grad.reshape(tensor.shape).to(tensor.dtype) if need else None
                for grad, tensor, need in zip(grads, chain, needed, strict=True)
            ),
        )


def _gradients(grad: Tensor, chain: tuple[Tensor, ...], partials: list[Tensor], shape: MPOShape) -> list[Tensor]:
    """Return the gradient of every tensor from that of the rearranged matrix: the contraction, backwards."""
    n = len(shape)
    result: list[Tensor] = [grad] * n
    if from_right(shape):
        for k in range(n - 1):
            # The product right of tensor k, and the gradient of the product that starts at tensor k.
            product = partials[n - 2 - k]
            grad = grad.reshape(-1, product.shape[1])
            result[k] = grad @ product.T
            grad = _wide(chain[k]).reshape(-1, chain[k].shape[-1]).T @ grad
        result[n - 1] = grad
    else:
        for k in range(n - 1, 0, -1):
            product = partials[k - 1]
            grad = grad.reshape(product.shape[0], -1)
            result[k] = product.T @ grad
            grad = grad @ _wide(chain[k]).reshape(chain[k].shape[0], -1).T
        result[0] = grad
    return result


def contract_cached(chain: tuple[Tensor, ...], shape: MPOShape, cache: ChainCache) -> Tensor:
    """Return the matrix (out, in) of a chain in the tensors' own type, differentiable once.

    Autocast is off inside: products of the tensors are formed in fp32 at least.
    """
    with _full_precision(chain[0].device):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in chain):
            return _Contract.apply(shape, cache, *chain)
        return cache.read(chain, shape)[0].detach()
