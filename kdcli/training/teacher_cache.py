"""What a fixed teacher gives for fixed inputs, computed once and kept on disk (`teacher.cache`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from kdcli.data.rows import array_of
from kdcli.files import cache_dir, fingerprint
from kdcli.models.hashing import hash_of_dataset, hash_of_model
from kdcli.tasks.predict import Outputs, predict
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


def known_outputs(
    teacher: "PreTrainedModel", dataset: Dataset, collator: Any, *, per_token: bool = False, **options: Any
) -> KnownOutputs:
    """Return the teacher's outputs for an encoded data set, fp32.

    options: those of `cached_predictions`, which it raises the errors of.
    """
    found = cached_predictions(teacher, dataset, collator, per_token=per_token, **options)
    index = torch.from_numpy(array_of(dataset, "index"))
    if len(index.unique()) < len(index):
        raise ValueError("two features have one index: what the teacher gives for them could not be told apart")
    size = int(index.max()) + 1
    if per_token:
        lengths = torch.from_numpy(array_of(dataset, "length"))
        starts = torch.zeros(size, dtype=torch.long)
        starts[index] = lengths.cumsum(0) - lengths
        return KnownOutputs(_tensors(found, per_token), starts)
    tables = {}
    for name, rows in found.items():
        tables[name] = torch.zeros(size, *rows.shape[1:])
        tables[name][index] = torch.from_numpy(rows)
    return KnownOutputs(tables)


def cached_predictions(
    teacher: "PreTrainedModel",
    dataset: Dataset,
    collator: Any,
    *,
    batch_size: int,
    outputs: Sequence[str] = ("logits",),
    per_token: bool = False,
    use_cache: bool = True,
    console: Console | None = None,
    owner: str = "the teacher",
    device: str = "auto",
) -> Outputs:
    """Return the teacher's outputs for an encoded data set in its order, as `predict` does; all of them finite.

    The file is named by the teacher's weights and configuration and the encoded inputs, holds fp32 as computed, and
    appears whole or not at all: another teacher, text or image, processor or maximum length is another file. A file
    that is damaged is made again, and the console told. owner, device: as in `predict`.
    Raises NotFiniteError when the teacher's outputs contain NaN or inf; they are never kept.
    """
    name, path = _named(teacher, dataset, outputs)
    lengths = array_of(dataset, "length") if per_token else None
    rows = len(dataset) if lengths is None else int(lengths.sum())
    kept = kept_tensors(path, dict.fromkeys(outputs, (rows,)), of=name, console=console) if use_cache else None
    if kept is not None:
        tables = {output: tensor.numpy() for output, tensor in kept.items()}
        found: Outputs = tables if lengths is None else {key: _by_row(table, lengths) for key, table in tables.items()}
    else:
        found = predict(
            teacher,
            dataset,
            collator,
            outputs=outputs,
            per_token=per_token,
            batch_size=batch_size,
            owner=owner,
            device=device,
        )
    if use_cache:
        # A process may find what another has just written: all of them wait here, whether they found it or not.
        main_does(lambda: keep_tensors(path, _tensors(found, per_token), of=name) if kept is None else None)
    return found


def keep_predictions(found: Outputs, teacher: "PreTrainedModel", dataset: Dataset, *, per_token: bool = False) -> None:
    """Keep what a teacher's pass over a data set gave, in its order, for `cached_predictions` to find."""
    name, path = _named(teacher, dataset, list(found))
    if not path.exists():
        keep_tensors(path, _tensors(found, per_token), of=name)


def _named(teacher: "PreTrainedModel", dataset: Dataset, outputs: Sequence[str]) -> tuple[str, Path]:
    """Return the name of what is kept, and its file."""
    of = {"model": hash_of_model(teacher), "inputs": hash_of_dataset(dataset), "outputs": list(outputs), "format": 3}
    name = fingerprint(of)
    return name, cache_dir() / "logits" / f"{name}.safetensors"


def _by_row(table: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(table, np.cumsum(lengths)[:-1])


def _tensors(found: Outputs, per_token: bool) -> dict[str, Tensor]:
    """Return outputs as tensors: the rows of tokens one after the other."""
    return {name: torch.from_numpy(np.concatenate(rows) if per_token else rows) for name, rows in found.items()}
