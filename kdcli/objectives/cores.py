"""The tensor objective: the student's auxiliary tensors against the teacher's (OPDF, arXiv 2411.06448)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.signals import Signals, Wants
from kdcli.tensors.mpo import auxiliary_indices


def comparable(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[int]:
    """Return the places of the auxiliary tensors of which both chains have the same factors i_k and j_k."""
    if len(student) != len(teacher):
        return []
    return [k for k in auxiliary_indices(len(student)) if student[k].shape[1:3] == teacher[k].shape[1:3]]


def aux_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared difference of a chain's auxiliary tensors: element mean, then mean over tensors.

    student, teacher: chains of tensors (d_{k-1}, i_k, j_k, d_k). The central tensor is free. Where bonds
    differ, leading sub-blocks are compared: bonds are ordered by singular value. Tensors of other factors are
    left out; with none left the chains cannot be compared, which is a ValueError. The student's tensors are
    live: the released code compared detached copies, which has no gradient.
    """
    terms = []
    for k in comparable(student, teacher):
        a, b = student[k], teacher[k].detach()
        left, right = min(a.shape[0], b.shape[0]), min(a.shape[3], b.shape[3])
        terms.append((a[:left, ..., :right].float() - b[:left, ..., :right].float()).square().mean())
    if not terms:
        raise ValueError("the chains have no auxiliary tensor of the same factors")
    return torch.stack(terms).mean()


class TensorObjective(Objective):
    """L_aux over all chains that have a teacher: mean (default) or sum over matrices."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def student_wants(self) -> Wants:
        return Wants(factors=True)

    def teacher_wants(self) -> Wants:
        return Wants(factors=True)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        terms = torch.stack([aux_loss(student.factors[key], chain) for key, chain in teacher.factors.items()])
        return terms.mean() if self.reduction == "mean" else terms.sum()
