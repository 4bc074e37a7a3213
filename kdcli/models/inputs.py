"""Which of a batch's tensors a model takes: the one place that says so, for training, scores, export and latency."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcli.models.families import family_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PIXELS = ("pixel_values",)


def inputs_of(config: "PretrainedConfig") -> tuple[str, ...]:
    """Return the inputs that a model takes. Where all tokens are of one type, types say nothing and are left out."""
    if family_of(config).reads == "images":
        return PIXELS
    return INPUTS if _types(config) > 1 else INPUTS[:2]


def model_inputs(model: Any, batch: Mapping[str, "Tensor"]) -> dict[str, Any]:
    """Return the part of a batch that the forward pass of `model` takes; types that it does not have become 0.

    Pixels get the type of a PyTorch model's weights. A decoder of PyTorch is told to keep no keys and values for tokens
    that follow: nothing reads them.
    model: anything with a `config`, or else all is given. A tokenizer may know more types than a model has embeddings
    for: that of a BERT, for example, beside a RoBERTa.
    """
    config = getattr(model, "config", None)
    inputs: dict[str, Any] = {
        name: batch[name] for name in ((*INPUTS, *PIXELS) if config is None else inputs_of(config)) if name in batch
    }
    if config is not None and "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        inputs["token_type_ids"] = types.where(types < _types(config), 0)
    for name in inputs.keys() & set(PIXELS):
        # Not every model of the library does so itself.
        inputs[name] = inputs[name].to(getattr(model, "dtype", None) or inputs[name].dtype)
    if config is not None and family_of(config).causal and hasattr(model, "base_model"):
        inputs["use_cache"] = False
    return inputs


def main_input(batch: Mapping[str, "Tensor"]) -> "Tensor":
    """Return what every model takes of a batch, a row an example: the ids of tokens, or pixels."""
    return next(batch[name] for name in (*INPUTS, *PIXELS) if name in batch)


def mask_of(batch: Mapping[str, "Tensor"], like: "Tensor | None" = None) -> "Tensor":
    """Return the real tokens of a batch as ones, (batch, seq): of images these are all.

    like: what was captured of a model, (batch, seq, width), which says how many tokens it makes of an image; None where
    nothing was, and a batch counts as one token an image.
    """
    import torch

    if "attention_mask" in batch:
        return batch["attention_mask"]
    read = main_input(batch)
    shape = like.shape[:2] if like is not None else (len(read), 1)
    return torch.ones(shape, dtype=torch.long, device=read.device)


def _types(config: "PretrainedConfig") -> int:
    name = family_of(config).sizes.types
    return getattr(config, name) if name is not None else 0
