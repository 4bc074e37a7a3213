"""Linear maps of a block that are one module in the library: as layers of their own, and as one again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcli.tensors.parametrization import chain_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """How linear maps share the output of one module: their names and widths, in its order.

    heads: where their features alternate head by head, the number of heads; 1 where each map's are side by side.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    heads: int = 1

    def share(self, tensor: Tensor, name: str, dim: int) -> Tensor:
        """Return the part of `tensor` that is one map's; dim: of the features, the first or the last (0 or -1)."""
        number = self.names.index(name)
        parts = tensor.unflatten(dim, (self.heads, -1)) if self.heads > 1 else tensor
        start, width = sum(self.widths[:number]) // self.heads, self.widths[number] // self.heads
        if self.heads == 1:
            return tensor.narrow(dim, start, width)
        return parts.narrow(dim + 1 if dim >= 0 else dim, start, width).flatten(*((0, 1) if dim >= 0 else (-2, -1)))

    def joined(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Return the tensor that has these parts, of all maps in their order."""
        if self.heads == 1:
            return torch.cat(list(parts), dim=dim)
        by_head = [part.unflatten(dim, (self.heads, -1)) for part in parts]
        return torch.cat(by_head, dim=dim + 1 if dim >= 0 else dim).flatten(*((0, 1) if dim >= 0 else (-2, -1)))


class SplitLinear(nn.Module):
    """A fused linear map as one layer a part, by name.

    It takes the fused module's place only where a part is to be another layer than a plain one.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[nn.Module], heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        for name, part in zip(names, parts, strict=True):
            self.add_module(name, part)

    @property
    def layout(self) -> Layout:
        """How the parts stand in the output."""
        parts: dict[str, Any] = dict(self.named_children())
        return Layout(tuple(parts), tuple(part.out_features for part in parts.values()), self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        return self.layout.joined([part(x) for part in self.children()], -1)

    @property
    def weight(self) -> Tensor:
        """The whole matrix, (out, in), formed on demand."""
        return self.layout.joined([part.weight for part in self.children()], 0)  # type: ignore[misc]

    @property
    def is_plain(self) -> bool:
        """True when all parts are plain layers, so that nothing is lost when they become one."""
        return all(is_plain(part) for part in self.children())

    @classmethod
    def from_module(cls, module: nn.Module, layout: Layout) -> "SplitLinear":
        """Return the shares of a module's output as layers of their own."""
        return cls(layout.names, [share_of(module, layout, name) for name in layout.names], layout.heads)

    def merged(self) -> nn.Linear:
        """Return the fused layer that plain parts equal."""
        parts: list[nn.Linear] = list(self.children())  # type: ignore[arg-type]
        biases = [part.bias for part in parts if part.bias is not None]
        return _layer(self.weight, self.layout.joined(biases, 0) if biases else None, parts[0])


def is_plain(layer: nn.Module) -> bool:
    """True for a linear layer without a chain or factors."""
    return type(layer) is nn.Linear and chain_of(layer) is None


def is_transposed(module: nn.Module) -> bool:
    """True for a linear map whose weight is kept as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def weight_of(module: Any) -> Tensor:
    """Return a linear map's weight as (out, in), a view."""
    weight: Tensor = module.weight
    return weight.T if is_transposed(module) else weight


def share_of(module: Any, layout: Layout | None, name: str) -> nn.Linear:
    """Return a layer of its own that gives what one map has of a module's output; of the whole without a layout."""
    weight, bias = weight_of(module), module.bias
    if layout is not None:
        weight, bias = layout.share(weight, name, 0), layout.share(bias, name, 0) if bias is not None else None
    return _layer(weight, bias, module)


def transposed(linear: nn.Linear) -> nn.Module:
    """Return the library's module that keeps the weight of a linear layer as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    with torch.device(linear.weight.device):
        made = Conv1D(linear.out_features, linear.in_features)
    with torch.no_grad():
        made.weight.copy_(linear.weight.T)
        made.bias.copy_(linear.bias)
    return _like(made, linear)


def _layer(weight: Tensor, bias: Tensor | None, source: nn.Module) -> nn.Linear:
    with torch.device(weight.device):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return _like(made, source)


def _like(made: Any, source: nn.Module) -> Any:
    parameters = list(source.parameters())
    made.to(parameters[0].dtype).train(source.training)
    return made.requires_grad_(any(parameter.requires_grad for parameter in parameters))


def make_layers(model: "PreTrainedModel", paths: Iterable[str]) -> None:
    """Let a linear layer stand at each of these paths, in place: fused modules are split, transposed ones turned."""
    from kdcli.models.blocks import iter_block_matrices

    wanted = list(paths)
    names = {module: name for name, module in model.named_modules()}
    for _, matrix in iter_block_matrices(model):
        place = f"{names[matrix.holder]}.{matrix.attribute}"
        if matrix.is_view and any(path == place or path.startswith(f"{place}.") for path in wanted):
            matrix.replace(matrix.linear())


def merge_split(model: "PreTrainedModel") -> None:
    """Put the library's own module back where all parts of a block's linear map are plain again, in place."""
    from kdcli.models.blocks import iter_block_matrices

    for _, matrix in iter_block_matrices(model):
        module = getattr(matrix.holder, matrix.attribute)
        if isinstance(module, SplitLinear) and module.is_plain:
            module = module.merged()
            setattr(matrix.holder, matrix.attribute, module)
        if matrix.transposed and is_plain(module):
            setattr(matrix.holder, matrix.attribute, transposed(module))
