"""Exact parameter counts, from models or from configurations alone."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from kdcli.models.blocks import iter_block_matrices

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Return the number of parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def count_from_config(config: "PretrainedConfig") -> int:
    """Return the number of parameters of the bare model (embeddings, blocks, pooler) without making weights."""
    from transformers import AutoModel

    with torch.device("meta"):
        return count_parameters(AutoModel.from_config(config))


def block_weight_count(model: "PreTrainedModel") -> int:
    """Return the number of weights in all block matrices, without biases."""
    return sum(p.numel() for _, module in iter_block_matrices(model) for p in module.parameters() if p.ndim > 1)
