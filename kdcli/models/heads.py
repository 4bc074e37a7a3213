"""Changing what stands on a body: a general student becomes a classifier, or starts again from random weights."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdcli.models.anatomy import anatomy_of
from kdcli.models.load import HEADS
from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear, svd_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_classifier(
    model: "PreTrainedModel", *, num_labels: int, label_names: list[str] | None = None, problem_type: Any = None
) -> "PreTrainedModel":
    """Return a classifier with a copy of the body of `model` and a fresh head; `model` is not changed.

    The head comes from PyTorch's global random state. A body without a pooler gets a fresh one where its family's
    classifiers need one.
    """
    import transformers

    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    config.problem_type = problem_type
    anatomy_of(config)
    classifier = getattr(transformers, HEADS["sequence-classification"]).from_config(config)
    body = classifier.base_model
    for name, child in model.base_model.named_children():
        if child is not None and getattr(body, name, None) is not None:
            setattr(body, name, copy.deepcopy(child))
    return classifier.eval()


def reinitialise(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give every weight of `model` a fresh random value, in place: dense weights as its family does it.

    Factors get those of a random dense weight of the same shape, so that their product has its usual size.
    """
    for module in model.modules():
        if not any(True for _ in module.children()):
            for parameter in module.parameters(recurse=False):
                if hasattr(parameter, "_is_hf_initialized"):
                    parameter._is_hf_initialized = False
            module._is_hf_initialized = False  # type: ignore[assignment]
            model._init_weights(module)
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


def _fill(module: nn.Module, weight: torch.Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(weight)  # type: ignore[operator, union-attr]
