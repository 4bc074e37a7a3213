"""Which parameters the optimizer trains at which rate: matrices, vectors, and chains of tensors by their length."""

from typing import Any

from torch import nn

from kdcli.tensors.parametrization import chains_of
from kdcli.training.settings import LoopSettings


def chains_by_length(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """Return the trainable tensors of a model's chains by the number of middle tensors of their chain, in its order."""
    found: dict[int, list[nn.Parameter]] = {}
    for shape, chain in chains_of(model):
        found.setdefault(shape.length, []).extend(tensor for tensor in chain if tensor.requires_grad)
    return dict(sorted(found.items()))


def parameter_groups(model: nn.Module, loop: LoopSettings) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices with weight decay, vectors without, and chains of each length at their rate."""
    chains = chains_by_length(model)
    ours = {id(tensor) for tensors in chains.values() for tensor in tensors}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": loop.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        # Decay would shrink a chain by (1 - lr wd)^n and pull its identities to zero.
        *(
            {"params": tensors, "weight_decay": 0.0, "lr": loop.chain_rate(length)}
            for length, tensors in chains.items()
        ),
    ]
    return [group for group in groups if group["params"]]
