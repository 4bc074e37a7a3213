"""MiniLLM: its loss has the gradient of the reverse KL divergence between sequences."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.objectives.distribution import Categorical
from kdcli.objectives.reverse import SequenceKLObjective, mean_of_later
from kdcli.signals import Prediction, Signals

VOCABULARY, LENGTHS, SHARE = 11, (4, 1, 6), 0.2


class World:
    """Logits of both models at the tokens of three responses, and the batch that they belong to."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        n, seq = sum(LENGTHS), 9
        self.student, self.teacher = (torch.randn(n, VOCABULARY, generator=generator) * 2 for _ in range(2))
        self.tokens = torch.randint(0, VOCABULARY, (n,), generator=generator)
        positions = torch.cat([torch.arange(2, 2 + length) + row * seq for row, length in enumerate(LENGTHS)])
        self.batch = {"predicted_positions": positions, "labels": torch.zeros(len(LENGTHS), seq)}
        self.weights = torch.full((n,), 1.0 / n)

    def loss(self, objective: SequenceKLObjective, student: Tensor) -> Tensor:
        mask = torch.ones(len(LENGTHS), 9)
        own, other = (
            Signals(mask, 2, predictions=[Prediction(logits, self.weights, self.tokens)])
            for logits in (student, self.teacher)
        )
        return objective(own, other, self.batch)

    def gradient(self, *, training: bool = True, **options: Any) -> Tensor:
        objective = SequenceKLObjective(Categorical(), teacher_share=SHARE, **options).train(training)
        student = self.student.clone().requires_grad_()
        self.loss(objective, student).backward()
        assert student.grad is not None
        return student.grad


def dense(world: World, *, long_term: bool, share: float = SHARE) -> Tensor:
    """Return the gradient by the student's logits from equations 4 to 7, term by term, in fp64."""
    student = world.student.double().requires_grad_()
    log_q, log_p = student.log_softmax(-1), world.teacher.double().log_softmax(-1)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length in LENGTHS:
        for t in range(start, start + length):
            token = world.tokens[t]
            q, p = log_q[t].exp(), log_p[t].exp()
            w = (q[token] / ((1 - share) * q[token] + share * p[token])).detach()
            total = total + w * (q * (log_q[t] - log_p[t])).sum()
            later = range(t + 1, start + length)
            if long_term and len(later):
                rewards = [(log_p[s, world.tokens[s]] - log_q[s, world.tokens[s]]).detach() for s in later]
                total = total - w * (sum(rewards) / len(rewards)) * log_q[t, token]
        start += length
    (total / sum(LENGTHS)).backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.parametrize("long_term", [False, True])
def test_its_gradient_is_that_of_the_equations(long_term: bool) -> None:
    world = World()
    found, expected = world.gradient(long_term=long_term).double(), dense(world, long_term=long_term)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_outside_of_training_it_is_the_reverse_divergence() -> None:
    world = World()
    found = world.gradient(training=False, long_term=True).double()
    torch.testing.assert_close(found, dense(world, long_term=False, share=0.0), rtol=1e-4, atol=1e-6)


def test_both_parts_together_are_the_gradient_between_sequences() -> None:
    """All sequences of 3 tokens of a table of bigrams, drawn from the student alone: the mean gradient is exact.

    The mean of later rewards times their number is their sum, which the gradient has without length normalisation.
    """
    classes, length = 3, 3
    generator = torch.Generator().manual_seed(1)
    q_table, p_table = (torch.randn(classes + 1, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    exact, own = q_table.clone().requires_grad_(), q_table.clone().requires_grad_()
    divergence, surrogate = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    for sequence in itertools.product(range(classes), repeat=length):
        rows, tokens = torch.tensor([classes, *sequence[:-1]]), torch.tensor(sequence)
        log_q, log_p = exact.log_softmax(-1)[rows, tokens], p_table.log_softmax(-1)[rows, tokens]
        divergence = divergence + log_q.sum().exp() * (log_q.sum() - log_p.sum())
        table = own.log_softmax(-1)[rows]
        nll = -table.gather(1, tokens[:, None])[:, 0]
        later = mean_of_later(log_p + nll.detach(), torch.zeros(length)) * torch.arange(length - 1, -1, -1)
        single = (table.exp() * (table - p_table.log_softmax(-1)[rows])).sum(-1)
        surrogate = surrogate + (-nll.sum()).exp().detach() * (single + nll * later).sum()
    divergence.backward()
    surrogate.backward()
    torch.testing.assert_close(own.grad, exact.grad)
