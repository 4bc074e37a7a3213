"""What a language model predicts at single positions: the teacher's distribution, or the hidden word itself."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kdcli.objectives.base import Objective, Signals, Wants

IGNORED = -100
"""The label of a position that was not masked."""


def vocabulary_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Return T^2 KL(teacher || student) over the vocabulary, weighted sum over positions; by default their mean.

    student_logits, teacher_logits: (positions, vocabulary); weights: (positions,), with sum 1 or less.
    Source: DistilBERT (Sanh et al. 2019); methods 6.1 and 10.
    """
    student = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    rows = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return _weighted(rows, weights) * temperature**2


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
