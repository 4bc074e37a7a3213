"""A layer's weight as a chain of tensors, by PyTorch's parametrizations."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdcli.tensors.chain import ChainCache, contract_cached
from kdcli.tensors.factors import MPOShape
from kdcli.tensors.mpo import decompose


class MPOWeight(nn.Module):
    """A parametrization of `nn.Linear.weight` by a chain of tensors: the layer stays as it is.

    `right_inverse` decomposes a weight (out, in), `forward` contracts the chain.
    """

    def __init__(self, shape: MPOShape, gauge: str = "symmetric", svd_dtype: str = "float64") -> None:
        super().__init__()
        self.shape = shape
        self.gauge = gauge
        self.svd_dtype = svd_dtype
        self.cache = ChainCache()
        self.blank = False

    def forward(self, *chain: Tensor) -> Tensor:
        return contract_cached(chain, self.shape, self.cache)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        if self.blank:
            return tuple(weight.new_zeros(shape) for shape in self.shape.shapes())
        return decompose(weight, self.shape, gauge=self.gauge, dtype=getattr(torch, self.svd_dtype))


def chain_of(linear: nn.Module) -> MPOWeight | None:
    """Return the chain behind a layer's weight, or None when the weight is plain."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    found = linear.parametrizations["weight"][0]  # type: ignore[index, union-attr]
    return found if isinstance(found, MPOWeight) else None


def tensors_of(linear: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return the tensors of an over-parameterised layer, from left to right."""
    holder = linear.parametrizations["weight"]  # type: ignore[index, union-attr]
    return tuple(getattr(holder, f"original{k}") for k in range(holder.ntensors))  # type: ignore[arg-type, union-attr]


def chains_of(model: nn.Module) -> list[tuple[MPOShape, tuple[nn.Parameter, ...]]]:
    """Return the factor lists and the tensors of every chain in a model: once, however many layers share it."""
    found: dict[int, tuple[MPOShape, tuple[nn.Parameter, ...]]] = {}
    for module in model.modules():
        chain = chain_of(module)
        if chain is not None:
            found.setdefault(id(chain), (chain.shape, tensors_of(module)))
    return list(found.values())


def is_overparameterised(model: nn.Module) -> bool:
    """True when some layer's weight is a chain."""
    return any(chain_of(module) is not None for module in model.modules())


def forget_contractions(model: nn.Module) -> None:
    """Clear what every chain remembers of its last contraction: its tensors were written where that cannot be seen."""
    for module in model.modules():
        if isinstance(module, MPOWeight):
            module.cache.clear()


@torch.no_grad()
def plain_weight(layer: nn.Module, weight: nn.Parameter | None = None) -> nn.Parameter:
    """Give a layer a plain weight back (its own value, unless one is given), in its old place before the bias."""
    if weight is None:
        holder = layer.parametrizations["weight"]  # type: ignore[index, union-attr]
        trained = any(tensor.requires_grad for tensor in holder.parameters())  # type: ignore[union-attr]
        weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=trained)  # type: ignore[union-attr, operator]
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    del layer.weight
    biased = "bias" in layer._parameters
    bias = layer._parameters.pop("bias", None)
    layer.weight = weight
    if biased:
        layer.register_parameter("bias", bias)
    return weight
