"""What a fixed teacher says about fixed inputs, computed once and kept on disk (`teacher.cache`)."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from datasets import Dataset
from torch import Tensor

from kdcli.evaluation.predict import predict
from kdcli.files import cache_dir, fingerprint
from kdcli.training.distributed import main_does
from kdcli.training.hashing import hash_of_dataset, hash_of_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cached_logits(
    teacher: "PreTrainedModel", dataset: Dataset, collator: Any, *, batch_size: int, use_cache: bool = True
) -> Tensor:
    """Return the teacher's logits for an encoded data set, (largest index + 1, classes), fp32.

    Row i belongs to the example with index i.
    """
    return _by_index(
        cached_predictions(teacher, dataset, collator, batch_size=batch_size, use_cache=use_cache), dataset
    )


def cached_predictions(
    teacher: "PreTrainedModel", dataset: Dataset, collator: Any, *, batch_size: int, use_cache: bool = True
) -> Tensor:
    """Return the teacher's logits for an encoded data set in its order, (n, classes), fp32.

    The file is named by the teacher's weights and configuration and the encoded inputs, holds fp32 as computed, and
    appears whole or not at all: another teacher, text, tokenizer or maximum length is another file. A file that
    cannot be read is made again.
    """
    name = fingerprint({"model": hash_of_model(teacher), "inputs": hash_of_dataset(dataset), "format": 1})
    path = cache_dir() / "logits" / f"{name}.safetensors"
    found = _read(path, len(dataset)) if use_cache else None
    logits = found
    if logits is None:
        logits = torch.from_numpy(predict(teacher, dataset, collator, batch_size=batch_size))
    if use_cache:
        # A process may find what another has just written: all of them wait here, whether they found it or not.
        main_does(lambda: _write(path, logits) if found is None else None)
    return logits


def _by_index(logits: Tensor, dataset: Dataset) -> Tensor:
    index = torch.tensor(dataset["index"], dtype=torch.long)
    table = torch.zeros(int(index.max()) + 1, logits.shape[1])
    table[index] = logits
    return table


def _read(path: Path, rows: int) -> Tensor | None:
    try:
        logits = safetensors.torch.load_file(path)["logits"]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    return logits if len(logits) == rows else None


def _write(path: Path, logits: Tensor) -> None:
    # The cache only saves time: a full or read-only disk must not end the run.
    with contextlib.suppress(OSError, safetensors.SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        try:
            safetensors.torch.save_file({"logits": logits.contiguous()}, temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
