"""Augmentations: what torchvision's transforms give, drawn from seed, epoch and index alone."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from kdcli.tasks.image_augment import Augment, operations, uniforms
from kdcli.tasks.image_fields import AugmentFields


def images(count: int = 16, height: int = 12, width: int = 10, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def augment(seed: int = 5, **fields) -> Augment:
    return Augment(AugmentFields(**fields), seed, 10)


EVERYTHING = {"flip": True, "crop": 2, "rand_augment": True}


def test_uniform_numbers_are_uniform_and_independent():
    drawn = uniforms([1, 2, 3], np.arange(20_000), 2)
    assert drawn.shape == (20_000, 2) and drawn.min() >= 0 and drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 0.001
    others = [drawn[1:, 0], drawn[:-1, 1], uniforms([1, 3, 3], np.arange(19_999), 1)[:, 0]]
    assert all(abs(np.corrcoef(drawn[:-1, 0], other)[0, 1]) < 0.03 for other in others)


@pytest.mark.parametrize("fields", [EVERYTHING, {"random_resized_crop": [0.3, 1.0]}], ids=["crop", "resized"])
def test_an_image_depends_on_its_seed_epoch_and_index_alone(fields):
    batch, index = images(), np.arange(16) * 7
    whole = augment(**fields)(batch, index, 3)
    order = [5, 11, 2]
    assert torch.equal(augment(**fields)(batch[order], index[order], 3), whole[order])
    for other in (augment(**fields)(batch, index, 4), augment(6, **fields)(batch, index, 3)):
        assert (other != whole).flatten(1).any(1).sum() > 8
    before = torch.random.get_rng_state()
    augment(**fields)(batch, index, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_transform_draws_the_same_whatever_others_there_are():
    batch, index = images(), np.arange(16)
    flipped = augment(flip=True)(batch, index, 0)
    both = augment(flip=True, crop=1)(batch, index, 0)
    turned = (flipped == batch.flip(-1)).flatten(1).all(1)
    cropped = augment(crop=1)(batch, index, 0)
    assert 3 < turned.sum() < 13
    assert torch.equal(both, torch.where(turned[:, None, None, None], cropped.flip(-1), cropped))


def test_a_crop_is_a_window_of_the_padded_image_each_as_often():
    batch = images(1).expand(4000, -1, -1, -1)
    padded = transforms.pad(batch[0], [1])
    windows = [padded[:, t : t + 12, x : x + 10] for t in range(3) for x in range(3)]
    found = augment(crop=1)(batch, np.arange(4000), 0)
    counts = [(found == window).flatten(1).all(1).sum().item() for window in windows]
    assert sum(counts) == 4000
    assert stats.chisquare(counts).pvalue > 0.001


def test_resized_crops_have_the_shares_and_shapes_that_are_asked_for():
    # Coordinates as values: corners of a part tell where it is from.
    ramp = torch.arange(100).float()
    image = torch.stack([ramp[:, None].expand(100, 100), ramp.expand(100, 100)]).to(torch.uint8)
    image = torch.cat([image, image[:1]])
    batch = image.expand(300, -1, -1, -1)
    found = augment(random_resized_crop=[0.2, 0.5])(batch, np.arange(300), 0).float()
    assert found.shape == batch.shape
    high, wide = (found[:, c].flatten(1).max(1).values - found[:, c].flatten(1).min(1).values + 1 for c in (0, 1))
    area, ratio = high * wide / 100**2, wide / high
    assert 0.18 < area.min() < 0.24 and 0.46 < area.max() < 0.54
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.42
    whole = augment(random_resized_crop=[1.0, 1.0])(batch[:4], np.arange(4), 0)
    assert torch.equal(whole, batch[:4])


@pytest.mark.parametrize(("magnitude", "channels"), [(9, 3), (30, 3), (4, 1)])
def test_operations_are_those_of_torchvision(magnitude: int, channels: int):
    batch = images(4, channels=channels)
    table = operations(magnitude, 12, 10)
    assert len(table) == 14
    ours = {change(batch).numpy().tobytes() for signs in table for change in signs}
    theirs = set()
    transform = v2.RandAugment(num_ops=1, magnitude=magnitude)
    with torch.random.fork_rng():
        for seed in range(300):
            torch.manual_seed(seed)
            theirs.add(transform(batch).numpy().tobytes())
    assert ours == theirs


def test_each_image_gets_its_own_operations_each_as_often():
    batch, index = images(1).expand(3000, -1, -1, -1), np.arange(3000)
    found = augment(rand_augment={"operations": 1, "magnitude": 9})(batch, index, 0)
    every = [change(batch[:1])[0] for signs in operations(9, 12, 10) for change in signs]
    shares = [1 / len(signs) / 14 for signs in operations(9, 12, 10) for _ in signs]
    counts, expected = {}, {}
    for result, share in zip(every, shares, strict=True):
        key = result.numpy().tobytes()
        counts[key] = int((found == result).flatten(1).all(1).sum())
        expected[key] = expected.get(key, 0) + share * 3000
    assert sum(counts.values()) == 3000
    assert stats.chisquare(list(counts.values()), list(expected.values())).pvalue > 0.001
    twice = augment(rand_augment=True)(batch, index, 0)
    assert (twice != found).flatten(1).any(1).float().mean() > 0.5


def test_mixup_is_a_share_of_two_examples():
    pixels, labels, index = torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 1, 9, 4, 4]), np.arange(6)
    mixed, shares = augment(mixup=0.4).mixed(pixels, labels, index, 1)
    assert shares.shape == (6, 10) and torch.allclose(shares.sum(1), torch.ones(6))
    own = shares[0, 0]
    assert 0 < own < 1
    assert torch.allclose(mixed, own * pixels + (1 - own) * pixels[[1, 2, 3, 4, 5, 0]], atol=1e-6)
    assert torch.allclose(shares[3], own * torch.eye(10)[9] + (1 - own) * torch.eye(10)[4])
    assert shares[1, 1] == 1 and shares[4, 4] == 1
    again, _ = augment(mixup=0.4).mixed(pixels, labels, index, 1)
    assert torch.equal(again, mixed)
    drawn = [augment(mixup=0.4).mixed(pixels[:2], labels[:2], index[:2], epoch)[1][0, 0] for epoch in range(400)]
    assert stats.kstest(drawn, stats.beta(0.4, 0.4).cdf).pvalue > 0.001


def test_fields_are_checked():
    assert AugmentFields().augmented_by == []
    assert AugmentFields(**EVERYTHING, mixup=0.2).augmented_by == ["flip", "crop", "rand_augment", "mixup"]
    for wrong in (
        {"crop": 0},
        {"crop": 1.5},
        {"random_resized_crop": [1.0, 0.5]},
        {"random_resized_crop": [0.0, 0.5]},
        {"random_resized_crop": [0.5]},
        {"rand_augment": {"magnitude": 31}},
        {"rand_augment": {"ops": 2}},
        {"mixup": 0.0},
        {"flip": 1},
    ):
        with pytest.raises(ValidationError):
            AugmentFields(**wrong)
