"""The tensor objective: the student's auxiliary tensors against the teacher's (OPDF, arXiv 2411.06448)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcli.objectives.base import Objective
from kdcli.signals import Request, Signals
from kdcli.tensors.mpo import auxiliary_indices


def comparable(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[int]:
    """Return the places of the auxiliary tensors of which both chains have the same factors i_k and j_k."""
    if len(student) != len(teacher):
        return []
    return [k for k in auxiliary_indices(len(student)) if student[k].shape[1:3] == teacher[k].shape[1:3]]


def _weighted_squares(chains: Sequence[tuple[float, Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """Return the weighted sum over (weight, student, teacher) of the squared difference of their auxiliary tensors.

    That is the element mean, then the mean over tensors (d_{k-1}, i_k, j_k, d_k). The central tensor is free. Where
    bonds differ, leading sub-blocks are compared: bonds are ordered by singular value. Tensors of other factors are
    left out; with none left the chains cannot be compared, which is a ValueError. The student's tensors are live: the
    released code compared detached copies, which has no gradient.
    """
    weights: list[float] = []
    own: list[Tensor] = []
    other: list[Tensor] = []
    for weight, student, teacher in chains:
        places = comparable(student, teacher)
        if not places:
            raise ValueError("the chains have no auxiliary tensor of the same factors")
        for k in places:
            a, b = student[k], teacher[k].detach()
            if a.shape != b.shape:
                left, right = min(a.shape[0], b.shape[0]), min(a.shape[3], b.shape[3])
                a, b = a[:left, ..., :right], b[:left, ..., :right]
            weights.append(weight / len(places) / a.numel())
            own.append(a.float())
            other.append(b.float())
    return _SquaredDifferences.apply(weights, *own, *other)


class _SquaredDifferences(torch.autograd.Function):
    """sum_k w_k |a_k - b_k|^2 for many pairs of tensors.

    All pairs in one operation: a model has hundreds of them, and on a GPU each operation costs a launch.
    """

    @staticmethod
    def forward(ctx: Any, weights: list[float], *tensors: Tensor) -> Tensor:
        differences = torch._foreach_sub(tensors[: len(weights)], tensors[len(weights) :])
        ctx.save_for_backward(*differences)
        ctx.weights = weights
        norms = torch._foreach_norm(differences)
        torch._foreach_mul_(norms, [weight**0.5 for weight in weights])
        return torch.stack(norms).square_().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = torch._foreach_mul(ctx.saved_tensors, [2.0 * weight for weight in ctx.weights])
        torch._foreach_mul_(found, gradient)
        return None, *found, *[None] * len(found)


class TensorObjective(Objective):
    """L_aux over all chains that have a teacher: mean (default) or sum over matrices."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def student_request(self) -> Request:
        return Request(factors=True)

    def teacher_request(self) -> Request:
        return Request(factors=True)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        if not teacher.factors:
            return torch.zeros((), device=student.mask.device)
        weight = 1.0 / len(teacher.factors) if self.reduction == "mean" else 1.0
        return _weighted_squares([(weight, student.factors[key], chain) for key, chain in teacher.factors.items()])
