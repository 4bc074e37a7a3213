"""Losses that are sums over the rows of a table of logits, some rows at a time.

Where all rows of logits would take more memory than everything else of a step (a row a token, over a vocabulary),
these sums form those of some rows, every loss on them with its derivative, and what that gives for the gradient of what
the logits are formed from; then the next ones take their place. All losses on one table share its logits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcli.objectives.base import times
from kdcli.signals import Logits, Prediction, TopTokens, VocabularyLogits

CHUNK_ELEMENTS = 2**22
"""Logits that are worked on at a time on a processor: what is held beside them stays in its reach."""

GPU_CHUNK_ELEMENTS = 2**25
"""The same of a GPU: products of fewer rows would not fill it."""


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T) of each row."""
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)


class Rows:
    """Some rows of the student's logits, and what several losses need of them."""

    def __init__(self, logits: Tensor, part: slice) -> None:
        """logits: (m, classes), fp32, the rows `part` of the table."""
        self.logits = logits
        self.part = part
        self._log_probabilities: dict[float, Tensor] = {}

    def log_probabilities(self, temperature: float = 1.0) -> Tensor:
        """Return log softmax(logits / T), shared by all losses: it must not be changed."""
        if temperature not in self._log_probabilities:
            self._log_probabilities[temperature] = log_softmax(self.logits, temperature)
        return self._log_probabilities[temperature]


def chunk_of(logits: Logits) -> int:
    """Return the number of rows that are worked on at a time."""
    most = GPU_CHUNK_ELEMENTS if logits.device.type == "cuda" else CHUNK_ELEMENTS
    return max(1, most // logits.shape[1])


RowFunction = Callable[[Rows, bool], tuple[Tensor, Tensor | None]]
"""From some rows to the loss of each, (m,), and if the second argument is true to its derivative by their logits."""


@dataclass(frozen=True)
class RowLoss:
    """A weighted sum of a loss of each row of `logits`. weights: (n,); None: the mean."""

    logits: Logits
    function: RowFunction
    weights: Tensor | None = None


def formed_in_parts(tables: Iterable[Prediction]) -> bool:
    """Return whether the logits of all tables are formed some rows at a time."""
    return all(isinstance(table.logits, VocabularyLogits) for table in tables)


def row_sum(loss: RowLoss) -> Tensor:
    """Return a loss, a scalar in fp32."""
    return row_sums([(1.0, loss)])[0]


def row_sums(losses: Sequence[tuple[float, RowLoss]]) -> tuple[Tensor, Tensor]:
    """Return sum_k factor_k loss_k of losses on the same logits, and every loss (k,), which has no gradient."""
    logits = losses[0][1].logits
    assert not isinstance(logits, TopTokens), "a student's logits are all known"
    n, chunk = len(logits), chunk_of(logits)
    even = torch.full((n,), 1.0 / max(n, 1), device=logits.device)
    weights = torch.stack([(loss.weights if loss.weights is not None else even).float() for _, loss in losses])
    factors = [factor for factor, _ in losses]
    functions = [loss.function for _, loss in losses]
    tensors: tuple[Tensor | None, ...] = (logits,) if isinstance(logits, Tensor) else logits.parts
    source = _Table if isinstance(logits, Tensor) else partial(_Formed, logits)
    with torch.autocast(logits.device.type, enabled=False):
        return _RowSums.apply(source, functions, factors, weights, chunk, torch.is_grad_enabled(), *tensors)  # type: ignore[no-any-return]


class _Table:
    """Logits that are there, and their gradient."""

    def __init__(self, needed: Sequence[bool], logits: Tensor) -> None:
        self.logits = logits
        self.gradients = [torch.empty_like(logits) if needed[0] else None]

    def form(self, part: slice) -> Tensor:
        return self.logits[part].float()

    def add(self, part: slice, logits: Tensor, slope: Tensor) -> None:
        (gradient,) = self.gradients
        assert gradient is not None
        gradient[part] = slope


class _Formed:
    """Logits that are formed some rows at a time, and the gradients of states, weight and bias."""

    def __init__(
        self, logits: VocabularyLogits, needed: Sequence[bool], states: Tensor, weight: Tensor, bias: Tensor | None
    ) -> None:
        dtype = logits.dtype or states.dtype
        self.cap = logits.cap
        self.logits = VocabularyLogits(states.to(dtype), weight.to(dtype), bias, logits.cap, dtype)
        # Sums of many parts: in half precision the small ones would be lost.
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.gradients = [
            torch.empty_like(states) if needed[0] else None,
            torch.zeros_like(weight, dtype=wide) if needed[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None,
        ]

    def form(self, part: slice) -> Tensor:
        return self.logits[part].float()

    def add(self, part: slice, logits: Tensor, slope: Tensor) -> None:
        if self.cap is not None:
            slope = slope * (1.0 - (logits / self.cap).square())
        states, weight, bias = self.gradients
        half = slope.to(self.logits.states.dtype)
        if states is not None:
            states[part] = half @ self.logits.weight
        if weight is not None and weight.dtype == half.dtype:
            weight.addmm_(half.T, self.logits.states[part])
        elif weight is not None:
            weight.add_(half.T @ self.logits.states[part])
        if bias is not None:
            bias.add_(slope.sum(0))


class _RowSums(torch.autograd.Function):
    """The sums, whose gradients are formed along with the values: nothing is formed twice, and no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Callable[..., "_Table | _Formed"],
        functions: Sequence[RowFunction],
        factors: Sequence[float],
        weights: Tensor,
        chunk: int,
        differentiable: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needed = [differentiable and need for need in ctx.needs_input_grad[6:]]
        table, slopes = source(needed, *tensors), any(needed)
        values = torch.zeros(len(functions), device=weights.device)
        for start in range(0, weights.shape[1], chunk):
            part = slice(start, start + chunk)
            rows, total = Rows(table.form(part), part), None
            for k, function in enumerate(functions):
                value, slope = function(rows, slopes)
                values[k] += (value * weights[k, part]).sum()
                if slope is not None:
                    slope.mul_(weights[k, part, None] * factors[k])
                    total = slope if total is None else total.add_(slope)
            if total is not None:
                table.add(part, rows.logits, total)
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in tensors]
        ctx.save_for_backward(*table.gradients)
        ctx.mark_non_differentiable(values)
        return torch.stack([value * factor for value, factor in zip(values, factors, strict=True)]).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            times(gradient, outer).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, None, None, None, None, *gradients
