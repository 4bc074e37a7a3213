"""Views of a model: its blocks, their matrices, and the modules that give its hidden states."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.models.families import family_of
from kdcli.models.shape import shape_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from kdcli.signals import MatrixKey


def body_of(model: "PreTrainedModel") -> "nn.Module":
    """Return the encoder below the task's head (`model.bert`), or the model itself when it has no head."""
    return model.base_model


def blocks_of(model: "PreTrainedModel") -> "nn.ModuleList":
    """Return the list of transformer blocks that have weights of their own: one, where it is run several times."""
    from torch import nn

    blocks = body_of(model).get_submodule(family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def block_of(model: "PreTrainedModel", layer: int) -> "nn.Module":
    """Return block `layer` (1..L)."""
    return blocks_of(model)[0 if family_of(model.config).repeated else layer - 1]


def module_at(model: "PreTrainedModel", path: str | None) -> "nn.Module | None":
    """Return a module of a model's body; None where the model has none at `path`."""
    module: Any = body_of(model)
    for name in path.split(".") if path is not None else ():
        module = getattr(module, name, None)
    return module if path is not None else None


def embeddings_of(model: "PreTrainedModel") -> "nn.Module | None":
    """Return the module whose output is hidden[0], (batch, seq, hidden); None where no one module gives it."""
    family = family_of(model.config)
    if family.embeddings is None:
        return None
    return module_at(model, family.projection) or body_of(model).get_submodule(family.embeddings)


def hook_embeddings(model: "PreTrainedModel", hook: "Callable[[Tensor], Tensor | None]") -> Any:
    """Call `hook` with hidden[0] in every pass, and return the handle of the hook; what it returns takes its place.

    Where no one module gives hidden[0], it is what the first block gets.
    """
    if (module := embeddings_of(model)) is not None:
        return module.register_forward_hook(lambda module, inputs, output: hook(output))

    def before(block: "nn.Module", inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = hook(inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    return block_of(model, 1).register_forward_pre_hook(before)


def hidden_module(model: "PreTrainedModel", layer: int) -> "nn.Module":
    """Return the module whose output is hidden[layer] of a block 1..L, as the library numbers hidden states.

    Where a norm follows the last block, its output is the last hidden state.
    """
    if layer == shape_of(model.config).layers and (norm := module_at(model, family_of(model.config).final_norm)):
        return norm
    return block_of(model, layer)


@dataclass(frozen=True)
class BlockMatrix:
    """One linear map of a block: a module of its own, or one of equal shares of a fused module's output.

    holder, attribute: where the module is. names: of all maps of a fused module, in the order of its output.
    """

    holder: "nn.Module"
    attribute: str
    name: str
    names: tuple[str, ...]

    @property
    def is_fused(self) -> bool:
        """True while the map is a share of another module."""
        from torch import nn

        return len(self.names) > 1 and isinstance(getattr(self.holder, self.attribute), nn.Linear)

    @property
    def module(self) -> "nn.Module":
        """The map itself; the fused module while it is a share of one."""
        module = getattr(self.holder, self.attribute)
        return module if len(self.names) == 1 or self.is_fused else getattr(module, self.name)

    @property
    def weight(self) -> "Tensor":
        """(out features, in features), a view where the map is fused."""
        return self._share(self.module.weight, 0)  # type: ignore[arg-type]

    def of(self, output: "Tensor") -> "Tensor":
        """Return this map's part of the output of `module`, (..., out features)."""
        return self._share(output, -1)

    def on(self, x: "Tensor") -> "Tensor":
        """Return this map's output, with its bias, on any input (..., in features)."""
        return self.of(self.module(x))

    def _share(self, tensor: "Tensor", dim: int) -> "Tensor":
        return tensor.chunk(len(self.names), dim)[self.names.index(self.name)] if self.is_fused else tensor

    def linear(self) -> "nn.Module":
        """Return the map as a layer: itself, or a copy of its share of a fused one."""
        if not self.is_fused:
            return self.module
        from kdcli.models.fused import rows_of

        count = self.weight.shape[0]
        start = self.names.index(self.name) * count
        return rows_of(self.module, slice(start, start + count))  # type: ignore[arg-type]

    def replace(self, layer: "nn.Module") -> None:
        """Put a layer in the map's place; the other shares of a fused module become layers of their own."""
        from kdcli.models.fused import SplitLinear

        if self.is_fused:
            setattr(self.holder, self.attribute, SplitLinear.from_linear(self.module, self.names))  # type: ignore[arg-type]
        if len(self.names) > 1:
            setattr(getattr(self.holder, self.attribute), self.name, layer)
        else:
            setattr(self.holder, self.attribute, layer)


def block_matrix(model: "PreTrainedModel", layer: int, name: str) -> BlockMatrix:
    """Return one of the linear maps of block `layer` (1..L)."""
    family = family_of(model.config)
    matrix = family.matrices[name]
    path, _, attribute = matrix.path.rpartition(".")
    return BlockMatrix(block_of(model, layer).get_submodule(path), attribute, name, tuple(family.parts_of(matrix.path)))


def iter_block_matrices(model: "PreTrainedModel") -> "Iterator[tuple[MatrixKey, BlockMatrix]]":
    """Yield ((block, name), matrix) for every matrix of every block that has weights of its own, in their order."""
    names = family_of(model.config).matrices
    for layer in range(1, len(blocks_of(model)) + 1):
        for name in names:
            yield (layer, name), block_matrix(model, layer, name)
