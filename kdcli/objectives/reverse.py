"""The gradient of the reverse KL divergence between sequences, from sequences that were drawn (MiniLLM)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.distribution import Distribution
from kdcli.objectives.term import Divergence
from kdcli.signals import Logits, Request, Signals

ELEMENTS = 2**24
"""Logits that are looked at together."""


class SequenceKLObjective(Objective):
    """Loss whose gradient is that of KL(q || p) between whole responses, drawn from a mixture of both models.

    Its single-step part is sum_t w_t KL(q_t || p_t), exact over the vocabulary; w_t = q(y_t) / ((1 - a) q(y_t) +
    a p(y_t)) is the importance weight of a token that was drawn with the teacher's share a. With `long_term` it has the
    rest, too: -sum_t w_t R_t log q(y_t), where R_t is the mean of log p(y_s) / q(y_s) over the tokens s > t of the
    response (length normalisation). No gradient passes through w and R. Sums are means over tokens, as all losses.
    Responses are used once, right after they were drawn: the ratio that PPO clips would be 1. Outside of training,
    where responses were not drawn, it is the reverse KL divergence alone, with w = 1.
    Source: Gu, Dong, Wei, Huang 2024, equations 4 to 7 (arXiv 2306.08543, section 2.2).
    """

    def __init__(self, distribution: Distribution, *, teacher_share: float, long_term: bool = False) -> None:
        super().__init__()
        self.distribution = distribution.compared_by(Divergence("reverse-kl"))
        self.teacher_share = teacher_share
        self.long_term = long_term

    def student_request(self) -> Request:
        return Request(logits=True)

    def teacher_request(self) -> Request:
        return Request(logits=True)

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        (own,), (other,) = student.predictions, teacher.predictions
        weights = own.weights
        assert weights is not None and own.target is not None
        if not self.training:
            return self.distribution.divergence(own.logits, other.logits, weights)
        log_q = log_probabilities(own.logits, own.target)
        log_p = log_probabilities(other.logits, own.target.to(other.logits.device)).to(log_q.device)
        share = self.teacher_share
        weights = weights / ((1.0 - share) + share * (log_p - log_q).exp())
        loss = self.distribution.divergence(own.logits, other.logits, weights)
        if self.long_term:
            example = batch["predicted_positions"] // batch["labels"].shape[1]
            rewards = mean_of_later(log_p - log_q, example)
            loss = loss + self.distribution.nll(own.logits, own.target, weights * rewards)
        return loss


@torch.no_grad()
def log_probabilities(logits: Logits, tokens: Tensor) -> Tensor:
    """Return the log-probability of one class of each row, (n,), fp32."""
    chunk, found = max(1, ELEMENTS // logits.shape[1]), []
    for start in range(0, len(tokens), chunk):
        table = logits[start : start + chunk].float()
        target = tokens[start : start + chunk]
        found.append(table.gather(1, target[:, None]).squeeze(1) - table.logsumexp(-1))
    return torch.cat(found)


def mean_of_later(values: Tensor, example: Tensor) -> Tensor:
    """Return the mean of the later values of the same example, (n,), 0 for the last.

    example: (n,), the number of each value's example, in order.
    """
    last = torch.searchsorted(example, example, right=True) - 1
    total = values.double().cumsum(0)
    count = last - torch.arange(len(values), device=values.device)
    return ((total[last] - total) / count.clamp(min=1)).to(values.dtype)
