"""Tokens that weigh equally over a whole step, however many each micro-batch and each process has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]

PREDICTED, REAL = "prediction_weights", "example_weights"
"""The weights that a batch brings with it, each of sum 1: of predicted tokens, and of examples by real tokens."""


def counts_of(batch: Batch) -> Tensor:
    """Return how many tokens of a batch are predicted, and how many are real: (2,), where the batch is."""
    real = batch["attention_mask"].sum()
    return torch.stack([torch.full_like(real, len(batch[PREDICTED])), real]).double()


def scaled(batch: Batch, factors: Tensor, rows: Tensor | None = None) -> Batch:
    """Return a batch with its weights times two factors, as in `counts_of`. rows: (batch,), a factor for each row."""
    new = {name: batch[name] * factor for name, factor in zip((PREDICTED, REAL), factors, strict=True)}
    if rows is not None:
        new[PREDICTED] = new[PREDICTED] * rows[batch["predicted_positions"] // batch["input_ids"].shape[1]]
        new[REAL] = new[REAL] * rows
    return {**batch, **{name: weights.to(batch[name].dtype) for name, weights in new.items()}}


def weigh_equally(batches: Sequence[Any], total: Callable[[Tensor], Tensor], processes: int) -> list[Batch]:
    """Return the micro-batches of a step with weights by which the mean of their losses is one over all their tokens.

    total: the sum over processes. Losses are means over micro-batches and processes: a micro-batch with n of the N
    tokens of a step in m micro-batches on each of p processes has the weight n m p / N.
    """
    counts = torch.stack([counts_of(batch) for batch in batches])
    factors = counts * (len(batches) * processes) / total(counts.sum(0)).clamp(min=1.0)
    return [scaled(batch, factor) for batch, factor in zip(batches, factors, strict=True)]
