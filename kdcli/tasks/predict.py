"""Logits of a model for a whole data set."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcli.data.rows import array_of
from kdcli.models.finite import check_finite
from kdcli.models.inputs import model_inputs

if TYPE_CHECKING:
    from datasets import Dataset


@torch.inference_mode()
def predict(
    model: Any, dataset: "Dataset", collator: Any, *, batch_size: int = 64, owner: str = "the model"
) -> np.ndarray:
    """Return logits (n, classes) in the data set's order, fp32; all of them finite.

    model: a PyTorch model, or anything called with the batch's inputs that returns an object with `.logits`
    (an `OnnxModel`). Batches are sorted by length inside; a PyTorch model is put in eval mode for the time.
    owner: what an error calls the model.
    Raises NotFiniteError when a logit is NaN or infinite: metrics would hide it behind an argmax.
    """
    order = np.argsort(array_of(dataset, "length"), kind="stable")[::-1]
    training = getattr(model, "training", False)
    device = torch.device("cpu")
    if isinstance(model, torch.nn.Module):
        model.eval()
        device = next(model.parameters()).device
    parts = []
    for start in range(0, len(order), batch_size):
        rows = [dataset[int(i)] for i in order[start : start + batch_size]]
        batch = collator(rows)
        inputs = {name: tensor.to(device) for name, tensor in model_inputs(model, batch).items()}
        parts.append(torch.as_tensor(model(**inputs).logits).float().cpu().numpy())
    if training:
        model.train()
    sorted_logits = np.concatenate(parts)
    check_finite(sorted_logits, owner)
    logits = np.empty_like(sorted_logits)
    logits[order] = sorted_logits
    return logits
