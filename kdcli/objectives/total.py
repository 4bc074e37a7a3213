"""The loss of a step: the weighted sum of its terms, those on the same logits formed together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.rows import RowLoss, row_sums
from kdcli.signals import Signals


def total_loss(
    objectives: Mapping[str, Objective],
    weights: Mapping[str, float],
    student: Signals,
    teacher: Signals,
    batch: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the terms, and the value of each by name, which has no gradient."""
    total = torch.zeros((), device=student.mask.device)
    values: dict[str, Tensor] = {}
    shared: dict[int, list[tuple[str, float, RowLoss]]] = {}
    for name, objective in objectives.items():
        losses = objective.row_losses(student, teacher)
        if losses is None:
            value = objective(student, teacher, batch)
            total = total + weights[name] * value
            values[name] = value.detach()
        else:
            values[name] = torch.zeros_like(total)
            for factor, loss in losses:
                shared.setdefault(id(loss.logits), []).append((name, factor, loss))
    for found in shared.values():
        value, each = row_sums([(weights[name] * factor, loss) for name, factor, loss in found])
        total = total + value
        for (name, factor, _), one in zip(found, each, strict=True):
            values[name] = values[name] + factor * one
    return total, values
