"""The output objective: the student's prediction against the teacher's (Hinton et al., 2015)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcli.objectives.base import Objective
from kdcli.signals import Signals, Wants


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, scale: bool = True
) -> Tensor:
    """Return T^2 KL(teacher || student) at temperature T, mean over the batch, sum over classes.

    student_logits, teacher_logits: (batch, classes). With `scale=False` the factor T^2 is left out (LGTM,
    AD-KD). Zero when the logits agree up to a constant. Source: Hinton et al. 2015, eq. 2-4.
    """
    student = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.float() / temperature, dim=-1)
    value = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return value * temperature**2 if scale else value


class OutputObjective(Objective):
    """T^2 KL of the logits; for regression the squared difference of the predictions."""

    def __init__(self, kind: str = "classification", temperature: float = 1.0, *, scale: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.temperature = temperature
        self.scale = scale

    def student_wants(self) -> Wants:
        return Wants(logits=True)

    def teacher_wants(self) -> Wants:
        return Wants(logits=True)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        assert student.logits is not None and teacher.logits is not None
        # Attribution keeps the teacher's graph alive; this term must not run back through it.
        target = teacher.logits.detach()
        if self.kind == "regression":
            return nn.functional.mse_loss(student.logits.float(), target.float())
        return kl_divergence(student.logits, target, self.temperature, scale=self.scale)


class AnnealedOutputObjective(OutputObjective):
    """KL at temperature T without T^2, or the squared difference of z / T; T may fall to 1 epoch by epoch (AD-KD).

    With `anneal`, epoch e of E (from 0) has the temperature T + (1 - T) e / (E - 1): T in the first, 1 in the last.
    One single epoch keeps T. The gradient is that of the soft cross-entropy. Source: Wu et al. 2023 (AD-KD).
    """

    def __init__(self, kind: str = "classification", temperature: float = 1.0, *, anneal: bool = False) -> None:
        super().__init__(kind, temperature, scale=False)
        self.start = temperature
        self.anneal = anneal

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        if self.anneal and epochs > 1:
            self.temperature = self.start + (1.0 - self.start) * min(epoch, epochs - 1) / (epochs - 1)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        value = super().forward(student, teacher, batch)
        return value / self.temperature**2 if self.kind == "regression" else value
