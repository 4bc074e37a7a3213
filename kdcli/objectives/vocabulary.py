"""What a language model predicts at single positions: the teacher's distribution, or the hidden word itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kdcli.objectives.base import Objective
from kdcli.signals import Signals, Wants

IGNORED = -100
"""The label of a position that was not masked."""


CHUNK_ELEMENTS = 2**22
"""Predictions that are worked on at a time: what is held beside them stays in the processor's reach."""


class _VocabularyKL(torch.autograd.Function):
    """sum_i w_i T^2 KL(teacher_i || student_i), some positions at a time.

    Its gradient is formed along with the value: of all that lies between, as large as the predictions themselves and
    several times over, nothing is kept.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, temperature: float, chunk: int) -> Tensor:
        value = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            weight = weights[part, None]
            own = torch.log_softmax(student[part].float() / temperature, dim=-1)
            target = torch.log_softmax(teacher[part].float() / temperature, dim=-1)
            probabilities = target.exp()
            value = value + (target.sub_(own).mul_(probabilities).sum(-1, keepdim=True) * weight).sum()
            if gradient is not None:
                gradient[part] = own.exp_().sub_(probabilities).mul_(weight * temperature)
        ctx.save_for_backward(gradient)
        return value * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None, None, None


def vocabulary_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Return T^2 KL(teacher || student) over the vocabulary, weighted sum over positions; by default their mean.

    student_logits, teacher_logits: (positions, vocabulary); weights: (positions,), with sum 1 or less.
    Source: DistilBERT (Sanh et al. 2019); Udagawa et al. 2023, OD transfer.
    """
    positions, size = student_logits.shape
    if weights is None:
        weights = torch.full((positions,), 1.0 / max(positions, 1), device=student_logits.device)
    chunk = max(1, CHUNK_ELEMENTS // size)
    return _VocabularyKL.apply(student_logits, teacher_logits.detach(), weights, temperature, chunk)


def masked_lm_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of logits (positions, vocabulary) with labels (positions,), weighted like the KL."""
    return _weighted(functional.cross_entropy(logits.float(), labels, reduction="none"), weights)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows.sum() / max(len(rows), 1)
    return (rows * weights).sum()


def position_weights(positions: Tensor, batch: int, seq: int) -> Tensor:
    """Return weights (positions,) that make a sum the mean over each example's positions, then over examples.

    positions: (positions,), into batch x seq laid flat. An example without a position counts as zero.
    """
    example = positions // seq
    counts = torch.zeros(batch, device=positions.device).index_add_(0, example, torch.ones_like(example).float())
    return 1.0 / (counts[example] * batch)


def at_positions(signals: Signals, batch: Mapping[str, Tensor], *, masked: bool) -> tuple[Tensor, Tensor]:
    """Return logits (positions, vocabulary) and flat positions: the masked ones, or all real ones.

    Takes logits (batch, seq, vocabulary), or those of some positions only, which are passed on without a copy when
    they are the wanted ones.
    """
    assert signals.logits is not None
    labels = batch["labels"].flatten()
    if signals.logits.ndim == 3:
        wanted = labels != IGNORED if masked else signals.mask.flatten() != 0
        positions = wanted.nonzero().squeeze(-1)
        return signals.logits.flatten(0, 1)[positions], positions
    assert signals.positions is not None
    known = batch.get("masked_positions")
    if not masked or (known is not None and known.shape == signals.positions.shape):
        return signals.logits, signals.positions
    if known is not None:
        # Both are in order; to ask which labels are masked would hold up the host of a GPU.
        keep = torch.searchsorted(signals.positions, known)
        return signals.logits[keep], known
    keep = labels[signals.positions] != IGNORED
    return signals.logits[keep], signals.positions[keep]


class VocabularyObjective(Objective):
    """T^2 KL of the distributions over the vocabulary, at masked positions or (`all_positions`) all real tokens."""

    def __init__(self, temperature: float = 1.0, *, all_positions: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.all_positions = all_positions

    def student_wants(self) -> Wants:
        return Wants(logits=True, all_positions=self.all_positions)

    def teacher_wants(self) -> Wants:
        return Wants(logits=True, all_positions=self.all_positions)

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        logits, positions = at_positions(student, batch, masked=not self.all_positions)
        target, _ = at_positions(teacher, batch, masked=not self.all_positions)
        return vocabulary_kl(logits, target, self.temperature, position_weights(positions, *student.mask.shape))


class MaskedLMObjective(Objective):
    """Cross-entropy with the words behind the masks: batch["labels"], (batch, seq), -100 where nothing is masked."""

    def student_wants(self) -> Wants:
        return Wants(logits=True)

    def teacher_wants(self) -> Wants:
        return Wants()

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        logits, positions = at_positions(student, batch, masked=True)
        labels = batch["labels"].flatten()[positions]
        return masked_lm_loss(logits, labels, position_weights(positions, *student.mask.shape))
