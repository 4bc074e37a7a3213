"""Plain text: documents packed into blocks, and masked differently in every epoch."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdcli.data.rows import BATCH, chunks_of, stored
from kdcli.errors import InputError
from kdcli.tasks.encode import IDS, Collator

if TYPE_CHECKING:
    from datasets import Dataset


def pack(documents: Iterable[str], tokenizer: Any, max_length: int, *, closed: bool = True) -> "Dataset":
    """Return blocks of at most `max_length` tokens: index, input_ids, attention_mask, segments and length.

    Documents follow each other with a separator between them, so that no block but the last has room left. Each
    block has the tokenizer's usual special tokens around it, unless `closed` before it only: where an end of text is
    predicted, the end of a block is none. `segments` numbers the documents of a block from 0:
    objectives that compare how tokens relate stay within one, but models attend over the whole block, as they did
    when they were pre-trained.
    Raises InputError when there is not one token.
    """
    before, after = frame_of(tokenizer)
    after = after if closed else []
    blocks = enumerate(_packed(documents, tokenizer, max_length, len(before) + len(after)))
    return stored(
        _batch_of_blocks(chunk, before, after) for chunk in iter(lambda: list(itertools.islice(blocks, BATCH)), [])
    )


def _batch_of_blocks(
    blocks: list[tuple[int, tuple[list[int], list[int]]]], before: list[int], after: list[int]
) -> pa.RecordBatch:
    rows = [before + block + after for _, (block, _) in blocks]
    # The special tokens around a block go with the documents that they stand beside, as if these were alone; so does
    # a separator with the document that it ends. A block of one document is one segment with all its tokens.
    segments = [
        np.pad(np.array(owners, dtype=np.int32) - owners[0], (len(before), len(after)), mode="edge")
        for _, (_, owners) in blocks
    ]
    return pa.RecordBatch.from_pydict(
        {
            "index": pa.array([number for number, _ in blocks], pa.int64()),
            "input_ids": pa.array(rows, IDS["input_ids"]),
            "attention_mask": pa.array([[1] * len(row) for row in rows], IDS["attention_mask"]),
            "segments": pa.array(segments, pa.list_(pa.int32())),
            "length": pa.array([len(row) for row in rows], pa.int32()),
        }
    )


def check_packing(documents: Iterable[str], tokenizer: Any, max_length: int) -> None:
    """Raise InputError where `pack` would; reads no more documents than the first block needs."""
    before, after = frame_of(tokenizer)
    next(_packed(documents, tokenizer, max_length, len(before) + len(after)))


def _packed(
    documents: Iterable[str], tokenizer: Any, max_length: int, framed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield blocks without the special tokens around them, `framed` of each, and the documents of their tokens."""
    room = max_length - framed
    if room < 2:
        raise InputError(f"max_length {max_length} leaves no room for text", where="task.max_length")
    separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    blocks = _blocks(_tokens(documents, tokenizer, separator), room)
    first = next(blocks, None)
    if first is None:
        raise InputError("the text has no token that the tokenizer knows", where="task")
    yield first
    yield from blocks


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a sequence."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    first = special.index(0) if 0 in special else len(ids)
    last = len(special) - special[::-1].index(0) if 0 in special else len(ids)
    return ids[:first], ids[last:]


def _tokens(documents: Iterable[str], tokenizer: Any, separator: int | None) -> Iterator[list[int]]:
    batch: list[str] = []

    def encode(texts: list[str]) -> Iterator[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for ids in encoded["input_ids"]:
            yield [*ids, separator] if separator is not None else ids

    for document in documents:
        batch.append(document)
        if len(batch) == 256:
            yield from encode(batch)
            batch = []
    if batch:
        yield from encode(batch)


def _blocks(documents: Iterable[list[int]], room: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield blocks: their tokens, and the number of the document that each token is of."""
    waiting: list[int] = []
    owners: list[int] = []
    for number, ids in enumerate(documents):
        waiting.extend(ids)
        owners.extend([number] * len(ids))
        full = len(waiting) // room * room
        for start in range(0, full, room):
            yield waiting[start : start + room], owners[start : start + room]
        waiting, owners = waiting[full:], owners[full:]
    if len(waiting) > 1:
        # The separator after the very last document separates nothing.
        yield waiting[:-1], owners[:-1]


IGNORED = -100
"""The label of a token that was not masked."""


class Masker:
    """Masks tokens: of those chosen 80% become the mask, 10% a random token, 10% stay.

    Every token but the special ones is chosen with `probability` (0.15); with `smoothing` above 0 in proportion to
    count^-smoothing of its type, so that rare tokens are masked more often (DistilBERT: 0.7). What is drawn
    depends on seed, epoch and the row's number alone: a resumed or a distributed run masks the same tokens.
    Source: BERT (Devlin et al. 2019), section 3.1.
    """

    def __init__(
        self,
        tokenizer: Any,
        probability: float = 0.15,
        smoothing: float = 0.0,
        *,
        seed: int,
        counts: Tensor | None = None,
    ) -> None:
        """counts: (vocabulary,), how often each token occurs; needed for smoothing."""
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token, so no token can be masked", where="teacher.tokenizer")
        size = len(tokenizer)
        special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self.mask = int(tokenizer.mask_token_id)
        self.seed = seed
        self.probability = torch.full((size,), probability)
        if smoothing > 0:
            assert counts is not None
            counts = counts.double().index_fill(0, special, 0.0)
            weights = counts.clamp(min=1.0).pow(-smoothing)
            # On average over the text as many tokens are masked as without smoothing.
            scale = probability * counts.sum() / (counts * weights).sum()
            self.probability = (weights * scale).clamp(max=1.0).float()
        self.probability[special] = 0.0
        ordinary = torch.ones(size, dtype=torch.bool)
        ordinary[special] = False
        self.ordinary = ordinary.nonzero().squeeze(-1)

    def __call__(self, ids: Tensor, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the row's ids with some masked, and its labels (-100 elsewhere). ids: (seq,)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 10_000_019 + index)
        draws = torch.rand(2, len(ids), generator=generator)
        chosen = draws[0] < self.probability[ids]
        labels = torch.where(chosen, ids, IGNORED)
        random_tokens = self.ordinary[torch.randint(len(self.ordinary), (len(ids),), generator=generator)]
        masked = torch.where(chosen & (draws[1] < 0.8), self.mask, ids)
        return torch.where(chosen & (draws[1] >= 0.8) & (draws[1] < 0.9), random_tokens, masked), labels


class TextCollator:
    """Pads blocks and masks tokens in them; rows that bring labels with them are masked already.

    Beside ids, mask, segments and labels a batch has flat positions into (batch x seq): `masked_positions`, which
    have a label, and `real_positions`, all that is not padding; `masked_among_real` are the places of the former
    among the latter.
    """

    def __init__(self, tokenizer: Any, masker: Masker | None = None, *, multiple: int = 8) -> None:
        self.collate = Collator(tokenizer, multiple=multiple)
        self.masker = masker
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        """Mask other tokens from now on."""
        self.epoch = epoch

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        masked = []
        for row in rows:
            if "labels" in row:
                ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            else:
                assert self.masker is not None
                ids, labels = self.masker(torch.tensor(row["input_ids"]), row["index"], self.epoch)
            masked.append((ids, labels))
        batch = self.collate(
            [{**row, "input_ids": ids, "labels": 0} for row, (ids, _) in zip(rows, masked, strict=True)]
        )
        table = torch.full_like(batch["input_ids"], IGNORED)
        for i, (_, labels) in enumerate(masked):
            table[i, : len(labels)] = labels
        batch["labels"] = table
        batch["masked_positions"] = (table.flatten() != IGNORED).nonzero().squeeze(-1)
        batch["real_positions"] = batch["attention_mask"].flatten().nonzero().squeeze(-1)
        batch["masked_among_real"] = torch.searchsorted(batch["real_positions"], batch["masked_positions"])
        return batch


def mask_once(blocks: "Dataset", masker: Masker) -> "Dataset":
    """Return blocks with their tokens masked once and for all, for losses that can be compared."""
    return stored(_masked(batch, masker) for batch in blocks.with_format("arrow").iter(BATCH))


def _masked(batch: pa.Table, masker: Masker) -> pa.RecordBatch:
    rows = zip(batch.column("input_ids").to_pylist(), batch.column("index").to_pylist(), strict=True)
    masked = [masker(torch.tensor(ids), index, -1) for ids, index in rows]
    columns = {name: batch.column(name).combine_chunks() for name in batch.column_names if name != "input_ids"}
    columns["input_ids"] = pa.array([ids.tolist() for ids, _ in masked], IDS["input_ids"])
    columns["labels"] = pa.array([answers.tolist() for _, answers in masked], IDS["input_ids"])
    return pa.RecordBatch.from_pydict(columns)


def token_counts(blocks: "Dataset", size: int) -> Tensor:
    """Return how often each of `size` tokens occurs, (size,)."""
    counts = np.zeros(size, np.int64)
    for chunk in chunks_of(blocks, "input_ids"):
        counts += np.bincount(np.concatenate([np.asarray(row) for row in chunk]), minlength=size)
    return torch.from_numpy(counts).float()
