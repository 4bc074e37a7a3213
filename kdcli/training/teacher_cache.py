"""What a fixed teacher says about fixed inputs, computed once and kept on disk (`teacher.cache`)."""

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from kdcli.data.rows import array_of
from kdcli.files import cache_dir, fingerprint
from kdcli.models.hashing import hash_of_dataset, hash_of_model
from kdcli.tasks.predict import predict
from kdcli.tensor_file import keep_tensors, kept_tensors
from kdcli.training.distributed import main_does

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cached_logits(teacher: "PreTrainedModel", dataset: Dataset, collator: Any, **options: Any) -> Tensor:
    """Return the teacher's logits for an encoded data set, (largest index + 1, classes), fp32.

    Row i belongs to the example with index i. options: those of `cached_predictions`, which it raises the errors of.
    """
    logits = cached_predictions(teacher, dataset, collator, **options)
    index = torch.from_numpy(array_of(dataset, "index"))
    table = torch.zeros(int(index.max()) + 1, logits.shape[1])
    table[index] = logits
    return table


def cached_predictions(
    teacher: "PreTrainedModel",
    dataset: Dataset,
    collator: Any,
    *,
    batch_size: int,
    use_cache: bool = True,
    console: Console | None = None,
    owner: str = "the teacher",
    device: str = "auto",
) -> Tensor:
    """Return the teacher's logits for an encoded data set in its order, (n, classes), fp32; all of them finite.

    The file is named by the teacher's weights and configuration and the encoded inputs, holds fp32 as computed, and
    appears whole or not at all: another teacher, text, tokenizer or maximum length is another file. A file that
    is damaged is made again, and the console told. owner, device: as in `predict`.
    Raises NotFiniteError when the teacher's logits contain NaN or inf; they are never kept.
    """
    name = fingerprint({"model": hash_of_model(teacher), "inputs": hash_of_dataset(dataset), "format": 2})
    path = cache_dir() / "logits" / f"{name}.safetensors"
    shapes = {"logits": (len(dataset), teacher.config.num_labels)}
    kept = kept_tensors(path, shapes, of=name, console=console) if use_cache else None
    if kept is not None:
        logits = kept["logits"]
    else:
        found = predict(teacher, dataset, collator, batch_size=batch_size, owner=owner, device=device)
        logits = torch.from_numpy(found)
    if use_cache:
        # A process may find what another has just written: all of them wait here, whether they found it or not.
        main_does(lambda: keep_tensors(path, {"logits": logits}, of=name) if kept is None else None)
    return logits
