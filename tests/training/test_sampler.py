import random

import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from kdcli.training.sampler import EpochSampler


def lengths(n: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randint(3, 60) for _ in range(n)]


def test_an_epoch_visits_every_example_and_fills_the_last_batch():
    sampler = EpochSampler(lengths(1003), 32, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == 1024
    assert set(order) == set(range(1003))


def test_the_order_depends_on_seed_and_epoch_only():
    first, second = EpochSampler(lengths(500), 16, seed=1), EpochSampler(lengths(500), 16, seed=1)
    assert list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)
    assert list(first) != list(EpochSampler(lengths(500), 16, seed=2))


def test_batches_hold_similar_lengths():
    sizes = lengths(3200)

    def padding(group: bool) -> int:
        order = list(EpochSampler(sizes, 32, seed=3, group=group))
        batches = [[sizes[i] for i in order[k : k + 32]] for k in range(0, len(order), 32)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(True) < 0.2 * padding(False)


def test_batch_lengths_do_not_fall_within_an_epoch():
    sizes = lengths(3200)
    order = list(EpochSampler(sizes, 32, seed=3))
    maxima = [max(sizes[i] for i in order[k : k + 32]) for k in range(0, len(order), 32)]
    half = len(maxima) // 2
    assert abs(sum(maxima[:half]) - sum(maxima[half:])) < 0.25 * sum(maxima)
    assert maxima != sorted(maxima, reverse=True)


def test_a_data_set_smaller_than_a_batch_gives_one_full_batch():
    assert len(list(EpochSampler([5, 6, 7], 8, seed=0))) == 8


@pytest.mark.parametrize(("count", "batch_size"), [(1003, 32), (6400, 8), (31, 8), (40, 8), (3, 8)])
def test_the_order_is_that_of_transformers_own_grouping(count: int, batch_size: int):
    sizes = lengths(count)
    sampler = EpochSampler(sizes, batch_size, seed=5)
    sampler.set_epoch(2)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 2)
    indices = get_length_grouped_indices(sizes, batch_size, generator=generator)
    while len(indices) < len(sampler):
        indices += indices[: len(sampler) - len(indices)]
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    expected = [i for number in torch.randperm(len(batches), generator=generator) for i in batches[number]]
    assert list(sampler) == expected and all(type(i) is int for i in sampler)
