import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from kdcli.black_box.estimate import decision_probabilities, logits_from_decisions

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


@pytest.mark.parametrize(
    ("counts", "probabilities"),
    [
        ((10, 0), (0.957, 0.043)),
        ((9, 1), (0.859, 0.141)),
        ((10, 0, 0), (0.930, 0.035, 0.035)),
        ((6, 3, 1), (0.550, 0.306, 0.143)),
    ],
)
def test_known_decisions_give_known_softened_targets(counts, probabilities):
    logits = torch.from_numpy(logits_from_decisions(np.array([counts]))[0])
    assert logits.softmax(-1).tolist() == pytest.approx(probabilities, abs=1e-3)


@pytest.mark.parametrize(("first", "difference"), [(8, 1.189), (7, 0.741), (6, 0.358), (5, 0.0)])
def test_two_classes_differ_by_known_amounts(first, difference):
    found = logits_from_decisions(np.array([[first, 10 - first]]))[0]
    assert found[0] - found[1] == pytest.approx(difference, abs=1e-3)
    assert found.sum() == pytest.approx(0.0, abs=1e-12)


def test_many_examples_at_once_are_solved_one_by_one():
    counts = np.array([[6, 3, 1], [10, 0, 0], [6, 3, 1], [1, 3, 6]])
    together = logits_from_decisions(counts)
    alone = np.concatenate([logits_from_decisions(row[None]) for row in counts])
    assert together == pytest.approx(alone, abs=1e-12)


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


@pytest.mark.parametrize("classes", [2, 3, 4, 6, 10])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_probabilities_sum_to_one_for_any_number_of_classes(classes, sigma):
    logits = np.random.default_rng(classes).normal(size=(20, classes)) * 2
    found = decision_probabilities(logits, sigma)
    assert found.sum(1) == pytest.approx(np.ones(20), abs=1e-4)
    assert (found >= 0).all() and (found.argmax(1) == logits.argmax(1)).all()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_probabilities_of_two_classes_are_the_normal_distribution_function(sigma):
    difference = np.linspace(-3, 3, 13)
    found = decision_probabilities(np.stack([difference, np.zeros(13)], axis=1), sigma)
    assert found[:, 0] == pytest.approx(norm.cdf(difference / (np.sqrt(2) * sigma)), abs=1e-5)


def test_probabilities_do_not_notice_a_constant_or_a_common_scale():
    logits = np.random.default_rng(0).normal(size=(5, 4))
    plain = decision_probabilities(logits)
    assert decision_probabilities(logits + 7.0) == pytest.approx(plain, abs=1e-12)
    assert decision_probabilities(logits * 2.5, 2.5) == pytest.approx(plain, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10), min_size=2, max_size=5).filter(any), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_logits(counts, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    counts = np.array([counts])
    found = logits_from_decisions(counts)
    assert logits_from_decisions(counts[:, order])[0] == pytest.approx(found[0][order], abs=1e-9)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_equal_counts_say_nothing(classes):
    assert logits_from_decisions(np.full((1, classes), 4))[0] == pytest.approx(np.zeros(classes), abs=1e-9)


@pytest.mark.parametrize("counts", [(4, 3, 2, 1), (5, 3, 2), (7, 3)])
def test_more_rounds_and_a_finer_tolerance_explain_the_counts_exactly(counts):
    logits = logits_from_decisions(np.array([counts]), rounds=2000, tolerance=1e-10)
    assert decision_probabilities(logits)[0] == pytest.approx(np.array(counts) / 10, abs=1e-5)


def test_a_class_that_was_never_decided_goes_down_with_every_round():
    few, many = (logits_from_decisions(np.array([[10, 0]]), rounds=rounds)[0, 1] for rounds in (20, 200))
    assert few == pytest.approx(-1.550, abs=1e-3)
    assert many < few - 0.3
