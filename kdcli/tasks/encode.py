"""From text to batches."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcli.models.inputs import INPUTS

if TYPE_CHECKING:
    from datasets import Dataset


def encode(dataset: "Dataset", tokenizer: Any, max_length: int) -> "Dataset":
    """Return the columns index, input_ids, attention_mask, [token_type_ids], labels and length, in memory.

    Pairs are cut from their longer side first, to `max_length` tokens with the special ones.
    """
    pair = dataset["text_pair"] if "text_pair" in dataset.column_names else None
    longest = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    encoded = tokenizer(
        list(dataset["text"]),
        list(pair) if pair is not None else None,
        truncation="longest_first" if pair is not None else True,
        max_length=longest,
    )
    columns: dict[str, Any] = {"index": list(dataset["index"])}
    for name in INPUTS:
        if name in encoded:
            columns[name] = encoded[name]
    columns["labels"] = list(dataset["label"])
    columns["length"] = [len(ids) for ids in encoded["input_ids"]]
    from datasets import Dataset

    return Dataset.from_dict(columns)


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
        """Return (batch, seq) tensors of ids, mask, types and segments, and (batch,) tensors of labels and index.

        Only packed rows have segments.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        # A model of 130 positions has none for 136.
        width = max(longest, int(min(-(-longest // self.multiple) * self.multiple, self.limit)))
        batch = {}
        for name, value in self.pad.items():
            if name in rows[0]:
                table = torch.full((len(rows), width), value, dtype=torch.long)
                for i, row in enumerate(rows):
                    table[i, : len(row[name])] = torch.as_tensor(row[name])
                batch[name] = table
        labels = [row["labels"] for row in rows]
        kind = torch.float32 if isinstance(labels[0], float) else torch.long
        batch["labels"] = torch.tensor(labels, dtype=kind)
        batch["index"] = torch.tensor([row["index"] for row in rows], dtype=torch.long)
        return batch
