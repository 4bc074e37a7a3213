"""From a task to what a model reads: sentences one by one, or plain text in blocks."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from kdcli.data.rows import values_of
from kdcli.tasks.base import Task
from kdcli.tasks.encode import Collator, check_room, encode
from kdcli.tasks.packing import Masker, TextCollator, check_packing, hide_once, pack, token_counts


@dataclass(frozen=True)
class Encoded:
    """A task as a model reads it. collator: from rows of either set to a batch."""

    train: Dataset
    selection: Dataset
    collator: Any


def check_encoding(task: Task, tokenizer: Any, max_length: int) -> None:
    """Raise InputError where a task cannot be encoded, or nothing of its texts would be left; encodes a few at most."""
    if task.masking is None:
        check_room(tokenizer, max_length, pair=task.is_pair)
        return
    Masker(tokenizer, task.masking, seed=0, counts=torch.ones(len(tokenizer)))
    for rows in (task.train, task.selection):
        check_packing(values_of(rows, "text"), tokenizer, max_length)


def encode_task(task: Task, tokenizer: Any, max_length: int, *, seed: int = 0) -> Encoded:
    """Return a task's rows, encoded: sentences one by one, plain text packed into blocks.

    seed: of the words that are hidden in plain text.
    """
    if task.masking is None:
        return Encoded(
            encode(task.train, tokenizer, max_length),
            encode(task.selection, tokenizer, max_length),
            Collator(tokenizer),
        )
    train = pack(values_of(task.train, "text"), tokenizer, max_length)
    counts = token_counts(train, len(tokenizer)) if task.masking.smoothing > 0 else None
    masker = Masker(tokenizer, task.masking, seed=seed, counts=counts)
    # The held-out words that are asked are the same for every model and every seed.
    held_masker = Masker(tokenizer, task.masking, seed=0, counts=counts)
    held = hide_once(pack(values_of(task.selection, "text"), tokenizer, max_length), held_masker)
    return Encoded(train, held, TextCollator(tokenizer, masker))
