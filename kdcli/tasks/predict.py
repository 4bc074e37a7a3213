"""Outputs of a model for a whole data set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcli.data.rows import array_of
from kdcli.machine import computing_device
from kdcli.models.finite import check_finite
from kdcli.models.inputs import model_inputs
from kdcli.models.placement import place as put
from kdcli.models.placement import take_home

if TYPE_CHECKING:
    from datasets import Dataset

Outputs = dict[str, Any]
"""By name an array (n, ...); where each token has a row, a list of n arrays (tokens, ...)."""


def predict(
    model: Any,
    dataset: "Dataset",
    collator: Any,
    *,
    outputs: Sequence[str] = ("logits",),
    per_token: bool = False,
    batch_size: int = 64,
    owner: str = "the model",
    device: str = "auto",
    reduce: Callable[[Any, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
) -> Outputs:
    """Return a model's outputs in the data set's order, fp32; all of them finite.

    model: a PyTorch model, or anything called with the batch's inputs that returns an object with the outputs as
    attributes (an `OnnxModel`). per_token: each token has a row of its own. Batches are sorted by length inside; a
    PyTorch model is put in eval mode for the time. owner: what an error calls the model. device: where a PyTorch model
    computes, "auto", "cpu" or "cuda" (as `train.device`); afterwards it is back where it was. reduce: makes of an
    output and its batch what is kept in its place, by name, with a row an example: for what is too much to be held.
    Raises NotFiniteError when a number is NaN or infinite: metrics would hide it behind an argmax.
    """
    lengths, order = array_of(dataset, "length"), by_length(dataset)
    found: dict[str, list[np.ndarray]] = {}
    # Moved inside inference mode, a model could not be trained afterwards.
    with placed(model, device) as place, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            # As PyTorch's loader reads them: all rows of a batch at once.
            batch = collator(dataset.__getitems__(order[start : start + batch_size].tolist()))
            if reduce is not None:
                batch = {name: tensor.to(place) for name, tensor in batch.items()}
            inputs = model_inputs(model, batch)
            output = model(**{name: x.to(place) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
            kept = {name: getattr(output, name) for name in outputs} if reduce is None else reduce(output, batch)
            for name, values in kept.items():
                found.setdefault(name, []).append(torch.as_tensor(values).float().cpu().numpy())
    return {name: in_order(parts, order, lengths if per_token else None, owner) for name, parts in found.items()}


def by_length(dataset: "Dataset") -> np.ndarray:
    """Return the order in which a data set is read for a model: the longest rows first."""
    return np.argsort(array_of(dataset, "length"), kind="stable")[::-1]


def in_order(parts: list[np.ndarray], order: np.ndarray, lengths: np.ndarray | None, owner: str) -> Any:
    """Return outputs in the data set's order. lengths: of each row, where tokens have rows of their own."""
    if lengths is None:
        joined = np.concatenate(parts)
        check_finite(joined, owner)
        table = np.empty_like(joined)
        table[order] = joined
        return table
    rows = [row[: lengths[place]] for row, place in zip((row for part in parts for row in part), order, strict=True)]
    for row in rows:
        check_finite(row, owner)
    return [rows[place] for place in np.argsort(order)]


@contextmanager
def placed(model: Any, wanted: str) -> Iterator[torch.device]:
    """Keep a PyTorch model in eval mode on the device that computes, and yield that; leave it as it was."""
    if not isinstance(model, torch.nn.Module):
        yield torch.device("cpu")
        return
    training, home, place = model.training, next(model.parameters()).device, torch.device(computing_device(wanted))
    try:
        put(model.eval(), place)
        yield place
    finally:
        take_home(model, home)
        model.train(training)
