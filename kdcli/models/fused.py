"""Linear maps of a block that are one module in the library: as layers of their own, and as one again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcli.tensors.parametrization import chain_of


class SplitLinear(nn.Module):
    """A fused linear map as one layer a part, by name; their outputs stand side by side.

    It takes the fused module's place only where a part is to be another layer than a plain one.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        return torch.cat([part(x) for part in self.children()], dim=-1)

    @property
    def weight(self) -> Tensor:
        """The whole matrix, (out, in), formed on demand."""
        return torch.cat([part.weight for part in self.children()])  # type: ignore[misc]

    @property
    def is_plain(self) -> bool:
        """True when all parts are plain layers, so that nothing is lost when they become one."""
        return all(type(part) is nn.Linear and chain_of(part) is None for part in self.children())

    @classmethod
    def from_linear(cls, linear: nn.Linear, names: Sequence[str]) -> "SplitLinear":
        """Return equal shares of the output of `linear` as layers of their own, in its order."""
        rows = linear.out_features // len(names)
        return cls(names, [rows_of(linear, slice(k * rows, (k + 1) * rows)) for k in range(len(names))])

    def merged(self) -> nn.Linear:
        """Return the fused layer that plain parts equal."""
        parts: list[nn.Linear] = list(self.children())  # type: ignore[arg-type]
        first = parts[0]
        with torch.device(first.weight.device):
            fused = nn.Linear(first.in_features, sum(p.out_features for p in parts), bias=first.bias is not None)
        with torch.no_grad():
            fused.weight.copy_(torch.cat([part.weight for part in parts]))
            if first.bias is not None:
                fused.bias.copy_(torch.cat([part.bias for part in parts]))
        return _like(fused, first)


def rows_of(linear: nn.Linear, rows: slice) -> nn.Linear:
    """Return a layer of its own that gives some features of the output of `linear`."""
    weight = linear.weight[rows]
    with torch.device(weight.device):
        part = nn.Linear(linear.in_features, weight.shape[0], bias=linear.bias is not None)
    with torch.no_grad():
        part.weight.copy_(weight)
        if linear.bias is not None:
            part.bias.copy_(linear.bias[rows])
    return _like(part, linear)


def _like(made: nn.Linear, source: nn.Linear) -> nn.Linear:
    made.to(source.weight.dtype).train(source.training)
    return made.requires_grad_(any(parameter.requires_grad for parameter in source.parameters()))


def merge_split(model: nn.Module) -> None:
    """Put the fused layer back where all parts of a `SplitLinear` are plain again, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, SplitLinear) and child.is_plain:
                setattr(module, name, child.merged())
