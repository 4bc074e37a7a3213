"""Models that start again from random weights."""

from typing import TYPE_CHECKING

from kdcli.models.families import family_of
from kdcli.models.timm_models import start_body

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def reinitialise(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give every weight of `model` a fresh random value, in place: dense weights as its family does it.

    Factors get those of a random dense weight of the same shape, so that their product has its usual size.
    """
    start_again(model, model)
    if family_of(model.config).wraps is not None:
        # The library only knows how its classifier starts.
        start_body(model)
    import torch

    from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear, svd_factors

    spread = model.config.initializer_range
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            up, down = svd_factors(torch.randn(module.out_features, module.in_features) * spread, module.rank)
            _fill(module.up, up)
            _fill(module.down, down)
        elif isinstance(module, LowRankEmbedding):
            down, up = svd_factors(torch.randn(module.num_embeddings, module.embedding_dim) * spread, module.rank)
            _fill(module.down, down)
            _fill(module.up, up.T)
    return model


def start_again(model: "PreTrainedModel", part: "nn.Module") -> None:
    """Give a part of `model` the random values that its family starts with, in place: inner modules before outer ones.

    Outer modules may have another start for what is inside them.
    """

    def start(module: "nn.Module") -> None:
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "_is_hf_initialized"):
                parameter._is_hf_initialized = False
        module._is_hf_initialized = False  # type: ignore[assignment]
        model._init_weights(module)

    part.apply(start)


def _fill(module: "nn.Module", weight: "Tensor") -> None:
    import torch

    with torch.no_grad():
        module.weight.copy_(weight)  # type: ignore[operator, union-attr]
