"""What a fixed teacher gives for fixed inputs, computed once and kept on disk (`teacher.cache`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
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


@dataclass
class KnownOutputs:
    """What a fixed teacher gives for each example, by its index, on the device that trains.

    tables: the head's outputs by name; (largest index + 1, ...), or where each token has a row of its own the rows of
    all examples one after the other, those of example i from `starts[i]` on.
    """

    tables: dict[str, Tensor]
    starts: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move everything to `device`."""
        self.tables = {name: table.to(device) for name, table in self.tables.items()}
        self.starts = self.starts.to(device) if self.starts is not None else None

    def of(self, batch: Mapping[str, Tensor]) -> SimpleNamespace:
        """Return the outputs for a batch, as a forward pass gives them; without a synchronisation.

        Where tokens have rows, those behind an example's last token mean nothing.
        """
        index = batch["index"]
        if self.starts is not None:
            width = batch["input_ids"].shape[1]
            index = self.starts[index][:, None] + torch.arange(width, device=index.device)
        tables = self.tables.items()
        return SimpleNamespace(**{name: table[index.clamp(max=len(table) - 1)] for name, table in tables})


def known_outputs(teacher: "PreTrainedModel", dataset: Dataset, collator: Any, **options: Any) -> KnownOutputs:
    """Return the teacher's outputs for an encoded data set, fp32.

    options: those of `cached_predictions`, which it raises the errors of.
    """
    logits = cached_predictions(teacher, dataset, collator, **options)
    index = torch.from_numpy(array_of(dataset, "index"))
    table = torch.zeros(int(index.max()) + 1, logits.shape[1])
    table[index] = logits
    return KnownOutputs({"logits": table})


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
