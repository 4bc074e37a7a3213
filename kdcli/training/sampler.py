"""The order of the training examples: seeded by epoch, grouped by length, whole batches only."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Yields example numbers so that every consecutive `batch_size` of them have similar lengths.

    The order depends on `seed` and the epoch alone, not on the number of processes or on any global random
    state, so that a resumed or a distributed run sees the same batches. The last batch is completed with
    examples from the epoch's start, so that all batches are equal and shares of a batch average to the whole.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, *, seed: int, group: bool = True) -> None:
        self.lengths = np.asarray(lengths, np.int32)
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self.epoch = 0

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
        if self.group:
            indices = _grouped(indices, self.lengths, self.batch_size)
        batches = np.resize(indices, len(self)).reshape(-1, self.batch_size)
        if self.group:
            # Within a group the lengths fall: without this shuffle so would the batch lengths, step by step.
            batches = batches[torch.randperm(len(batches), generator=generator).numpy()]
        return batches.reshape(-1)


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
