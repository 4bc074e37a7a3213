"""Names for models and data by their content."""

import hashlib
from typing import TYPE_CHECKING

from datasets import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hash_of_weights(model: "PreTrainedModel") -> str:
    """Return 16 hex digits over every tensor's name, type, shape and bytes, and the configuration's size."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        array = tensor.detach().cpu().contiguous()
        digest.update(array.view(-1).numpy().tobytes() if array.numel() else b"")
    return digest.hexdigest()[:16]


def hash_of_dataset(dataset: Dataset) -> str:
    """Return 16 hex digits over the encoded inputs of every row, in order."""
    digest = hashlib.sha256()
    for column in ("input_ids", "token_type_ids", "index"):
        if column in dataset.column_names:
            digest.update(column.encode())
            for row in dataset[column]:
                digest.update(repr(row).encode())
    return digest.hexdigest()[:16]
