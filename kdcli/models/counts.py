"""Exact parameter counts of models."""

from torch import nn


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Return the number of parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)
