"""The order of the training examples: seeded by epoch, grouped by length, whole batches only."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Yields example numbers so that every consecutive `batch_size` of them have similar lengths.

    The order depends on `seed` and the epoch alone, not on the number of processes or on any global random
    state, so that a resumed or a distributed run sees the same batches. The last batch is completed with
    examples from the epoch's start, so that all batches are equal and shares of a batch average to the whole.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, group: bool = True) -> None:
        self.lengths = list(lengths)
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
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.group:
            indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        else:
            indices = torch.randperm(len(self.lengths), generator=generator).tolist()
        while len(indices) < len(self):
            indices = indices + indices[: len(self) - len(indices)]
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        if self.group:
            # Within a group the lengths fall: without this shuffle so would the batch lengths, step by step.
            order = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in order]
        return iter([i for batch in batches for i in batch])
