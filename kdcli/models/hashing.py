"""Names for models, tokenizers and data by their content."""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcli.data.rows import chunks_of
from kdcli.files import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

CONTENT = "content"
"""A column of features that names what a model reads of each, where its columns do not: images and their processor."""

_NOT_THE_FUNCTION = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "name_or_path",
    "problem_type",
    "transformers_version",
}
"""What a configuration says beside how the model computes."""


def hash_of_weights(model: "PreTrainedModel") -> str:
    """Return 16 hex digits over every tensor's name, type, shape and bytes."""
    return hash_of_tensors(model.state_dict())


def hash_of_tensors(tensors: "Mapping[str, Tensor]") -> str:
    """Return 16 hex digits over every tensor's name, type, shape and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        array = tensor.detach().cpu().contiguous()
        digest.update(array.view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()[:16]


def hash_of_model(model: "PreTrainedModel") -> str:
    """Return 16 hex digits over what a model computes: its weights, and what its configuration does with them.

    The weights alone do not tell: no tensor's shape says how many heads share it, or what stands between two of them.
    """
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_FUNCTION}
    return fingerprint({"weights": hash_of_weights(model), "config": settings})


def hash_of_tokenizer(tokenizer: Any) -> str:
    """Return 16 hex digits over how text becomes tokens, and conversations do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # What an earlier call cut or padded to is part of neither.
    found = {key: value for key, value in parts.items() if key not in ("truncation", "padding")}
    if getattr(tokenizer, "mask_token", None) is None:
        # Of a decoder: what ends a text, and how a conversation is written, stand beside all that.
        found["kdcli"] = [tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return fingerprint(found)


def hash_of_dataset(dataset: "Dataset", *, labels: bool = False) -> str:
    """Return 16 hex digits over the inputs of every feature, in order: all columns but the gold answers.

    labels: over these, too, where they say which tokens are predicted.
    """
    digest = hashlib.sha256()
    columns = {"index", CONTENT, "labels"} if CONTENT in dataset.column_names else set(dataset.column_names)
    for column in sorted(columns - {"length"} - (set() if labels else {"labels"})):
        digest.update(column.encode())
        for chunk in chunks_of(dataset, column):
            digest.update("".join(map(repr, chunk)).encode())
    return digest.hexdigest()[:16]
