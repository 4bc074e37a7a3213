"""How much each part of a task is trained on, and in which order its examples come."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.data.mixing import apportioned, quotas, shares
from kdcli.training.sampler import EpochSampler, sampler_of
from kdcli.training.settings import LoopSettings

SIZES = [7, 40, 353]
PARTS = np.repeat(np.arange(3), SIZES)
LENGTHS = np.random.default_rng(0).integers(3, 60, len(PARTS))


def mixed(temperature: float, *, seed: int = 1, batch_size: int = 16) -> EpochSampler:
    return EpochSampler(LENGTHS, batch_size, seed=seed, parts=PARTS, temperature=temperature)


def epoch_of(sampler: EpochSampler, epoch: int) -> np.ndarray:
    sampler.set_epoch(epoch)
    return sampler.order()


def test_shares_are_those_of_the_papers():
    # Lample and Conneau 2019, section 3.1, written out for alpha = 0.5 and two sets of 900 and 100.
    assert shares([900, 100], 2.0) == pytest.approx([30 / 40, 10 / 40])
    counts = np.array([3, 50, 700])
    for exponent in (0.3, 0.7):
        q = (counts / counts.sum()) ** exponent
        assert shares(counts, 1 / exponent) == pytest.approx(q / q.sum())
    assert shares([900, 100], 1.0) == pytest.approx([0.9, 0.1])
    assert shares([900, 100], 1e6) == pytest.approx([0.5, 0.5], abs=1e-5)


@given(st.integers(0, 5000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_quotas_sum_up_and_are_off_by_less_than_one(total: int, weights: list[float]):
    found = quotas(total, weights)
    assert sum(found) == total
    exact = total * np.array(weights) / sum(weights)
    assert np.abs(np.array(found) - exact).max() < 1 + 1e-6


def test_a_total_keeps_the_shares_and_leaves_no_part_out():
    assert apportioned(100, [600, 300, 100]) == [60, 30, 10]
    assert apportioned(None, [6, 3]) == apportioned(9, [6, 3]) == [6, 3]
    assert apportioned(10, [1000, 1]) == [10, 1]


def test_temperature_1_gives_the_order_of_one_set():
    features = Dataset.from_dict({"length": LENGTHS, "part": PARTS})
    loop = LoopSettings(16, "fp32", "cpu", group_by_length=True, workers=0, select="best", seed=1)
    whole = EpochSampler(LENGTHS, 16, seed=1)
    for epoch in range(3):
        assert (epoch_of(sampler_of(features, loop), epoch) == epoch_of(whole, epoch)).all()
    hot = sampler_of(features, replace(loop, mixing_temperature=3.0))
    assert (epoch_of(hot, 2) == epoch_of(mixed(3.0), 2)).all()
    assert (epoch_of(hot, 2) != epoch_of(whole, 2)).any()


@pytest.mark.parametrize("temperature", [1.43, 3.33, 1e6])
def test_an_epoch_is_as_long_as_before_and_has_each_part_s_share(temperature: float):
    sampler = mixed(temperature)
    order = epoch_of(sampler, 4)
    assert len(order) == len(sampler) == len(EpochSampler(LENGTHS, 16, seed=1))
    found = np.bincount(PARTS[order[: len(PARTS)]], minlength=3)
    assert np.abs(found - len(PARTS) * shares(SIZES, temperature)).max() < 1


def test_each_example_comes_once_before_any_of_its_part_comes_twice():
    # A batch of one: no example is there to complete the last batch.
    sampler = mixed(3.33, batch_size=1)
    seen: Counter[int] = Counter()
    for epoch in range(12):
        seen.update(epoch_of(sampler, epoch).tolist())
        for part in range(3):
            times = [seen[example] for example in np.flatnonzero(part == PARTS)]
            assert max(times) - min(times) <= 1
    small, large = (np.mean([seen[example] for example in np.flatnonzero(part == PARTS)]) for part in (0, 2))
    assert small > 12 > large


def test_the_mixture_depends_on_seed_and_epoch_only():
    first, second = mixed(3.33), mixed(3.33)
    ahead = epoch_of(first, 5)
    assert (ahead == epoch_of(second, 5)).all()
    assert (ahead != epoch_of(second, 6)).any()
    assert (ahead != epoch_of(mixed(3.33, seed=2), 5)).any()


def test_parts_of_a_batch_are_mixed():
    order = epoch_of(mixed(1e6, batch_size=32), 0)
    shares_of_batches = [np.bincount(PARTS[order[k : k + 32]], minlength=3) / 32 for k in range(0, len(order), 32)]
    assert np.std(shares_of_batches, axis=0).max() < 0.25
