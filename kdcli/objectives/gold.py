"""The task objective: the student's prediction against the gold label."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from kdcli.objectives.base import Objective
from kdcli.signals import Signals, Wants


def task_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Return cross-entropy of logits (batch, classes), or for regression the squared error of (batch, 1)."""
    if kind == "regression":
        return functional.mse_loss(logits.float().view(-1), labels.float().view(-1))
    return functional.cross_entropy(logits.float(), labels)


class TaskObjective(Objective):
    """Cross-entropy or squared error with the gold labels."""

    def __init__(self, kind: str = "classification") -> None:
        super().__init__()
        self.kind = kind

    def student_wants(self) -> Wants:
        return Wants(logits=True)

    def teacher_wants(self) -> Wants:
        return Wants()

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        assert student.logits is not None
        return task_loss(student.logits, batch["labels"], self.kind)
