"""Logits of a model for a whole data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcli.data.rows import array_of
from kdcli.machine import computing_device
from kdcli.models.finite import check_finite
from kdcli.models.inputs import model_inputs

if TYPE_CHECKING:
    from datasets import Dataset


def predict(
    model: Any,
    dataset: "Dataset",
    collator: Any,
    *,
    batch_size: int = 64,
    owner: str = "the model",
    device: str = "auto",
) -> np.ndarray:
    """Return logits (n, classes) in the data set's order, fp32; all of them finite.

    model: a PyTorch model, or anything called with the batch's inputs that returns an object with `.logits`
    (an `OnnxModel`). Batches are sorted by length inside; a PyTorch model is put in eval mode for the time.
    owner: what an error calls the model. device: where a PyTorch model computes, "auto", "cpu" or "cuda" (as
    `train.device`); afterwards it is back where it was.
    Raises NotFiniteError when a logit is NaN or infinite: metrics would hide it behind an argmax.
    """
    order = np.argsort(array_of(dataset, "length"), kind="stable")[::-1]
    parts = []
    # Moved inside inference mode, a model could not be trained afterwards.
    with _placed(model, device) as place, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            # As PyTorch's loader reads them: all rows of a batch at once.
            batch = collator(dataset.__getitems__(order[start : start + batch_size].tolist()))
            inputs = {name: tensor.to(place) for name, tensor in model_inputs(model, batch).items()}
            parts.append(torch.as_tensor(model(**inputs).logits).float().cpu().numpy())
    sorted_logits = np.concatenate(parts)
    check_finite(sorted_logits, owner)
    logits = np.empty_like(sorted_logits)
    logits[order] = sorted_logits
    return logits


@contextmanager
def _placed(model: Any, wanted: str) -> Iterator[torch.device]:
    """Keep a PyTorch model in eval mode on the device that computes, and yield that; leave it as it was."""
    if not isinstance(model, torch.nn.Module):
        yield torch.device("cpu")
        return
    training, home, place = model.training, next(model.parameters()).device, torch.device(computing_device(wanted))
    try:
        model.eval().to(place)
        yield place
    finally:
        model.to(home).train(training)
