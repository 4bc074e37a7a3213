"""From text to batches."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdcli.data.rows import batches_of, stored
from kdcli.errors import InputError
from kdcli.models.inputs import INPUTS

if TYPE_CHECKING:
    from datasets import Dataset


IDS = {"input_ids": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int8()), "token_type_ids": pa.list_(pa.int8())}


def encode(dataset: "Dataset", tokenizer: Any, max_length: int) -> "Dataset":
    """Return the columns index, input_ids, attention_mask, [token_type_ids, labels] and length, as `stored` keeps them.

    Pairs are cut from their longer side first, to `max_length` tokens with the special ones.
    """
    longest = longest_input(tokenizer, max_length)
    return stored(_encoded(batch, tokenizer, longest) for batch in batches_of(dataset))


def longest_input(tokenizer: Any, max_length: int) -> int:
    """Return the tokens of the longest input: `max_length`, or what the tokenizer's model takes, if that is less."""
    return min(max_length, getattr(tokenizer, "model_max_length", max_length))


def check_room(tokenizer: Any, max_length: int, *, pair: bool) -> None:
    """Raise InputError when `max_length` leaves no token for a text, or for each of a pair, beside the special ones.

    Below their number the library cuts nothing at all, without a word.
    """
    special, texts = tokenizer.num_special_tokens_to_add(pair), 2 if pair else 1
    longest = longest_input(tokenizer, max_length)
    if longest < special + texts:
        raise InputError(
            f"max_length {longest} leaves no room for text: {special} tokens of a {'pair' if pair else 'text'} are "
            "special ones",
            where="task.max_length",
            hint=f"use at least {special + texts}",
        )


def _encoded(batch: dict[str, list[Any]], tokenizer: Any, longest: int) -> pa.RecordBatch:
    columns = {"index": pa.array(batch["index"], pa.int64())}
    columns |= token_columns(tokenizer, batch["text"], batch.get("text_pair"), max_length=longest)
    if "label" in batch:
        columns["labels"] = pa.array(batch["label"])
    return pa.RecordBatch.from_pydict(columns)


def token_columns(
    tokenizer: Any, texts: list[str], pairs: list[str] | None = None, *, max_length: int
) -> dict[str, pa.Array]:
    """Return what a model reads of texts, or pairs: input_ids, attention_mask, [token_type_ids] and length."""
    encoded = tokenizer(texts, pairs, truncation="longest_first" if pairs is not None else True, max_length=max_length)
    columns = {name: pa.array(encoded[name], IDS[name]) for name in INPUTS if name in encoded}
    return {**columns, "length": pa.array([len(ids) for ids in encoded["input_ids"]], pa.int32())}


class Collator:
    """Pads encoded rows to the longest of the batch (a multiple of 8, where the model is that long) and stacks them."""

    def __init__(self, tokenizer: Any, *, multiple: int = 8) -> None:
        self.pad = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
            "segments": 0,
        }
        self.multiple = multiple
        self.limit = getattr(tokenizer, "model_max_length", math.inf)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return (batch, seq) tensors of ids, mask, types and segments, and (batch, ...) tensors of labels and index.

        Only packed rows have segments.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        # A model of 130 positions has none for 136.
        width = max(longest, int(min(-(-longest // self.multiple) * self.multiple, self.limit)))
        batch = {}
        for name, value in self.pad.items():
            if name in rows[0]:
                # NumPy takes a list in a tenth of the time: on a GPU's host this is a good part of a step.
                table = np.full((len(rows), width), value, np.int64)
                for i, row in enumerate(rows):
                    table[i, : len(row[name])] = row[name]
                batch[name] = torch.from_numpy(table)
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        batch["index"] = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return batch
