"""The tensor objective: the student's auxiliary tensors against the teacher's (OPDF, arXiv 2411.06448, eq. 8)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcli.objectives.base import Objective, Signals, Wants
from kdcli.tensors.mpo import auxiliary_indices


def aux_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the squared difference of a chain's auxiliary tensors: element mean, then mean over tensors.

    student, teacher: chains of tensors (d_{k-1}, i_k, j_k, d_k). The central tensor is free. Where bonds
    differ, leading sub-blocks are compared: bonds are ordered by singular value. The student's tensors are
    live: the released code compared detached copies, which has no gradient (methods 3.9).
    """
    terms = []
    for k in auxiliary_indices(len(student)):
        a, b = student[k], teacher[k]
        if a.shape != b.shape:
            left, right = min(a.shape[0], b.shape[0]), min(a.shape[3], b.shape[3])
            a, b = a[:left, :, :, :right], b[:left, :, :, :right]
        terms.append((a.float() - b.detach().float()).square().mean())
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
