"""What an objective sees: the signals of a forward pass, and what it asks a forward pass to capture."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcli.signals import Request, Signals

if TYPE_CHECKING:
    from kdcli.objectives.rows import RowLoss


class Objective(nn.Module):
    """One differentiable term that compares student and teacher.

    It sees tensors and masks, never a model or a recipe. Parameters of its own (bridges between widths)
    are trained with the student and thrown away at the end, but for `kept`.

    Every reduction is a mean over the real tokens of each example, then over the examples of the batch:
    padding does not change it, and equal shares of a batch on several devices average to the whole. Where examples
    have weights (`Signals.weights`) these are in the place of the latter mean.
    """

    @property
    def kept(self) -> nn.Linear | None:
        """A trained map from the student's embedding to the teacher's width that becomes a part of the student."""
        return None

    def student_request(self) -> Request:
        """What must be captured from the student."""
        raise NotImplementedError

    def teacher_request(self) -> Request:
        """What must be captured from the teacher; empty when it needs none."""
        raise NotImplementedError

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the term as a scalar in fp32."""
        raise NotImplementedError

    def row_losses(self, student: Signals, teacher: Signals) -> "list[tuple[float, RowLoss]] | None":
        """Return the term as factors of sums over rows, to be formed beside others on the same logits.

        None where it is no such sum, or the logits are there and `forward` costs no more.
        """
        return None

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Take note that epoch `epoch` (from 0) of `epochs` begins; for terms that change over time."""


def times(saved: Tensor, factor: Tensor) -> Tensor:
    """Return a product in a backward pass: in the place of `saved`, unless the graph, which has it, is kept.

    The gradients of all terms exist at the same time: a second copy of them would cost more than the product.
    """
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return saved * factor if kept() else saved.mul_(factor)


def example_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` (..., batch, seq) over each example's real tokens, (..., batch)."""
    mask = mask.to(values.dtype)
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)


def token_mean(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean of `values` (..., batch, seq) over each example's real tokens, then over all others: a scalar.

    weights: (batch,), of the examples, see `Signals`.
    """
    means = example_mean(values, mask)
    return means.mean() if weights is None else (means * weights).sum(-1).mean()


def own_keys(mask: Tensor, segments: Tensor | None = None, window: Tensor | None = None) -> Tensor:
    """Return the keys that a row of scores is about: real ones, of the row's own segment and window. Boolean.

    mask, segments: (batch, seq); window: (batch, 1, seq, seq), see `common_window`. The result is
    (batch, 1, seq, seq), or (batch, 1, 1, seq) without segments and window.
    """
    keys = (mask != 0)[:, None, None, :]
    if segments is not None:
        keys = keys & (segments[:, None, :, None] == segments[:, None, None, :])
    return keys if window is None else keys & window


def common_window(*sides: tuple[Signals, Iterable[int]]) -> Tensor | None:
    """Return the keys that all these blocks attend to, (batch or 1, 1, seq, seq); None where these are all real ones.

    sides: the signals of a model, and its blocks; without any, only whether its tokens attend to later ones counts.
    """
    windows = [signals.windows[layer] for signals, layers in sides for layer in layers if layer in signals.windows]
    if causal := [signals.mask for signals, _ in sides if signals.causal]:
        seq = causal[0].shape[1]
        windows.append(torch.ones(1, 1, seq, seq, dtype=torch.bool, device=causal[0].device).tril())
    return reduce(torch.logical_and, windows) if windows else None


def key_bias(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what scores get added before a softmax over `keys` only: 0 there, elsewhere the lowest finite number."""
    return torch.zeros_like(keys, dtype=dtype).masked_fill(~keys, torch.finfo(dtype).min)


def masked_log_softmax(scores: Tensor, keys: Tensor) -> Tensor:
    """Return log-softmax of `scores` (batch, heads, seq, seq) over `keys` only; all others are about -inf."""
    return torch.log_softmax(scores + key_bias(keys, scores.dtype), dim=-1)
