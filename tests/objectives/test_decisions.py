import numpy as np
import pytest
import torch
from scipy.stats import norm

from kdcli.objectives.decisions import counts_of, decision_probabilities, logits_from_decisions

VECTORS = [
    ((10, 0), (1.550, -1.550)),
    ((9, 1), (0.905, -0.905)),
    ((10, 0, 0), (2.187, -1.094, -1.094)),
    ((8, 1, 1), (1.101, -0.550, -0.550)),
    ((6, 3, 1), (0.644, 0.058, -0.702)),
    ((10, 0, 0, 0), (2.554, -0.851, -0.851, -0.851)),
    ((4, 3, 2, 1), (0.430, 0.203, -0.093, -0.540)),
]


@pytest.mark.parametrize(("counts", "logits"), VECTORS)
def test_known_decisions_give_known_logits(counts, logits):
    found = logits_from_decisions(np.array([counts]))[0]
    assert found == pytest.approx(logits, abs=2e-3)


@pytest.mark.parametrize("first", [8, 7, 6, 5])
def test_two_classes_agree_with_the_closed_form(first):
    found = logits_from_decisions(np.array([[first, 10 - first]]))[0]
    assert found[0] - found[1] == pytest.approx(np.sqrt(2) * norm.ppf(first / 10), abs=6e-3)


def test_probabilities_sum_to_one_and_agree_with_sampling():
    logits = np.array([[0.3, -0.2, 1.1, 0.0]])
    exact = decision_probabilities(logits)
    assert exact.sum() == pytest.approx(1.0, abs=1e-6)
    noise = np.random.default_rng(0).standard_normal((200_000, 4))
    sampled = np.bincount((logits + noise).argmax(1), minlength=4) / 200_000
    assert exact[0] == pytest.approx(sampled, abs=5e-3)


def test_permuting_the_classes_permutes_the_logits():
    counts = np.array([[5, 3, 2]])
    order = [2, 0, 1]
    assert logits_from_decisions(counts[:, order])[0] == pytest.approx(logits_from_decisions(counts)[0][order])


def test_equal_counts_say_nothing():
    assert logits_from_decisions(np.array([[4, 4, 4]]))[0] == pytest.approx(np.zeros(3), abs=1e-9)


def test_decisions_are_counted_by_class():
    assert counts_of(torch.tensor([[0, 2, 2], [1, 1, 1]]), 3).tolist() == [[1, 0, 2], [0, 3, 0]]
