"""The order of the training examples: seeded by epoch, grouped by length, whole batches only."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler

from kdcli.data.mixing import quotas, shares
from kdcli.data.rows import array_of
from kdcli.tasks.parts import PART

if TYPE_CHECKING:
    from datasets import Dataset

    from kdcli.training.settings import LoopSettings


class EpochSampler(Sampler[int]):
    """Yields example numbers so that every consecutive `batch_size` of them have similar lengths.

    The order depends on `seed` and the epoch alone, not on the number of processes or on any global random
    state, so that a resumed or a distributed run sees the same batches. The last batch is completed with
    examples from the epoch's start, so that all batches are equal and shares of a batch average to the whole.

    parts, temperature: of every example the number of its part, and how these are mixed (`data.mixing.shares`). An
    epoch has as many examples as there are, of each part its share. Those of a part come in passes over all of it,
    which go on from one epoch to the next: no example is taken twice before all others of its part were taken once.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int,
        group: bool = True,
        parts: np.ndarray | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.lengths = np.asarray(lengths, np.int32)
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self.epoch = 0
        self.parts: list[np.ndarray] = []
        self.quotas: list[int] = []
        if parts is not None:
            self.parts = [np.flatnonzero(parts == number).astype(np.int32) for number in np.unique(parts)]
            self.quotas = quotas(len(parts), shares([len(part) for part in self.parts], temperature))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        return map(int, self.order())

    def order(self) -> np.ndarray:
        """Return the epoch's example numbers, whole batches of them."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        indices = torch.randperm(len(self.lengths), generator=generator).numpy().astype(np.int32)
        if self.parts:
            indices = np.concatenate([self._drawn(number) for number in range(len(self.parts))])[indices]
        if self.group:
            indices = _grouped(indices, self.lengths, self.batch_size)
        batches = np.resize(indices, len(self)).reshape(-1, self.batch_size)
        if self.group:
            # Within a group the lengths fall: without this shuffle so would the batch lengths, step by step.
            batches = batches[torch.randperm(len(batches), generator=generator).numpy()]
        return batches.reshape(-1)

    def _drawn(self, number: int) -> np.ndarray:
        """Return the examples of part `number` in this epoch: those of its passes from where the last epoch ended."""
        part, quota = self.parts[number], self.quotas[number]
        first, last = self.epoch * quota, (self.epoch + 1) * quota
        passes = range(first // len(part), -(-last // len(part)))
        drawn = [part[np.random.default_rng([self.seed, number, each]).permutation(len(part))] for each in passes]
        skipped = first - passes.start * len(part)
        return np.concatenate([*drawn, part[:0]])[skipped : skipped + quota]


def sampler_of(features: "Dataset", loop: "LoopSettings") -> EpochSampler:
    """Return the sampler of encoded training rows, whose parts, if any, are mixed as the settings say."""
    parts = array_of(features, PART) if loop.mixing_temperature != 1.0 else None
    return EpochSampler(
        array_of(features, "length"),
        loop.batch_size,
        seed=loop.seed,
        group=loop.group_by_length,
        parts=parts,
        temperature=loop.mixing_temperature,
    )


def _grouped(indices: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """Return indices with those of every 50 batches (of a quarter, where there are less) in the order of their lengths.

    The longest first, and the longest of all at the very beginning, where it fails if memory is short. The order is
    that of transformers' get_length_grouped_indices, which works on lists.
    """
    size = max(1, min(len(indices) // (batch_size * 4), 50)) * batch_size
    found = np.empty_like(indices)
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        found[start : start + size] = part[np.argsort(-lengths[part], kind="stable")]
    longest = int(np.argmax(lengths[found[::size]])) * size
    found[[0, longest]] = found[[longest, 0]]
    return found
