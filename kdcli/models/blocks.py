"""Views of a model: its blocks, their matrices, and the modules that give its hidden states."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.models.classes import classifier_names
from kdcli.models.families import family_of
from kdcli.models.shape import need_blocks, shape_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from kdcli.models.fused import Layout
    from kdcli.signals import MatrixKey


def body_of(model: "PreTrainedModel") -> "nn.Module":
    """Return the encoder below the task's head (`model.bert`), or the model itself when it has no head."""
    return model.base_model


def blocks_of(model: "PreTrainedModel") -> "nn.ModuleList":
    """Return the list of transformer blocks that have weights of their own: one, where it is run several times."""
    from torch import nn

    need_blocks(family_of(model.config), "this")
    blocks = body_of(model).get_submodule(family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def blocks_prefix(model: "PreTrainedModel") -> str:
    """Return what the names of all weights inside blocks begin with, before the number of the block."""
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    return f"{body}{family_of(model.config).blocks}."


def block_of(model: "PreTrainedModel", layer: int) -> "nn.Module":
    """Return block `layer` (1..L)."""
    return blocks_of(model)[0 if family_of(model.config).repeated else layer - 1]


def scale_of(block: "nn.Module", path: str | None) -> "Tensor | None":
    """Return the vector in a block that multiplies a matrix's output; None where there is none at `path`."""
    from torch import Tensor

    found: Any = block
    for name in path.split(".") if path is not None else ():
        found = getattr(found, name, None)
    return found if path is not None and isinstance(found, Tensor) else None


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


def by_row(states: "Tensor", mask: "Tensor | None") -> "Tensor":
    """Return states as (batch, seq, width): some layers get all tokens of a batch in one list.

    mask: (batch, seq), that of the batch; None where it has none, and no layer gets such a list.
    """
    if mask is None or states.ndim != 2 or len(states) != mask.numel():
        return states
    return states.view(*mask.shape, -1)


@dataclass(frozen=True)
class BlockMatrix:
    """One linear map of a block: a module of its own, or a share of a fused module's output.

    holder, attribute: where the module is. layout: of a fused module's output; None where the map is the whole of it.
    transposed: the library's module there keeps its weight as (in, out).
    """

    holder: "nn.Module"
    attribute: str
    name: str
    layout: "Layout | None" = None
    transposed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All maps that the library's module holds, in the order of its output."""
        return (self.name,) if self.layout is None else self.layout.names

    @property
    def is_fused(self) -> bool:
        """True while the map is a share of another module."""
        from kdcli.models.fused import SplitLinear

        return self.layout is not None and not isinstance(getattr(self.holder, self.attribute), SplitLinear)

    @property
    def is_view(self) -> bool:
        """True while the map is no linear layer of its own: a share of another module, or a transposed one."""
        from kdcli.models.fused import is_transposed

        return self.is_fused or is_transposed(getattr(self.holder, self.attribute))

    @property
    def module(self) -> "nn.Module":
        """The map itself; the fused module while it is a share of one."""
        module = getattr(self.holder, self.attribute)
        return module if self.layout is None or self.is_fused else getattr(module, self.name)

    @property
    def weight(self) -> "Tensor":
        """(out features, in features), a view where the map is a share whose features are side by side."""
        from kdcli.models.fused import weight_of

        return self._share(weight_of(self.module), 0)

    def of(self, output: "Tensor") -> "Tensor":
        """Return this map's part of the output of `module`, (..., out features)."""
        return self._share(output, -1)

    def on(self, x: "Tensor") -> "Tensor":
        """Return this map's output, with its bias, on any input (..., in features)."""
        return self.of(self.module(x))

    def _share(self, tensor: "Tensor", dim: int) -> "Tensor":
        return self.layout.share(tensor, self.name, dim) if self.layout is not None and self.is_fused else tensor

    def linear(self) -> "nn.Module":
        """Return the map as a linear layer: itself, or a copy of what is no layer of its own."""
        from kdcli.models.fused import share_of

        return share_of(self.module, self.layout, self.name) if self.is_view else self.module

    def replace(self, layer: "nn.Module") -> None:
        """Put a layer in the map's place; the other shares of a fused module become layers of their own."""
        from kdcli.models.fused import SplitLinear

        if self.is_fused and self.layout is not None:
            setattr(self.holder, self.attribute, SplitLinear.from_module(self.module, self.layout))
        if self.layout is not None:
            setattr(getattr(self.holder, self.attribute), self.name, layer)
        else:
            setattr(self.holder, self.attribute, layer)


def block_matrix(model: "PreTrainedModel", layer: int, name: str) -> BlockMatrix:
    """Return one of the linear maps of block `layer` (1..L)."""
    from kdcli.models.fused import Layout

    family = family_of(model.config)
    matrix = family.matrices[name]
    path, _, attribute = matrix.path.rpartition(".")
    layout = None
    if len(names := family.parts_of(matrix.path)) > 1:
        shape = shape_of(model.config)
        widths = tuple(shape.width_of(part) for part in names)
        layout = Layout(tuple(names), widths, shape.heads if matrix.by_head else 1)
    holder = block_of(model, layer).get_submodule(path)
    return BlockMatrix(holder, attribute, name, layout, matrix.transposed)


def iter_block_matrices(model: "PreTrainedModel") -> "Iterator[tuple[MatrixKey, BlockMatrix]]":
    """Yield ((block, name), matrix) for every matrix of every block that has weights of its own, in their order.

    Of a model of which only outputs are seen these are its linear layers, but for classifiers: a block is what stands
    at one place of a list inside it, and a name is the path of a layer there, such as "attn/qkv".
    """
    family = family_of(model.config)
    if family.outputs_only is not None:
        yield from _linear_layers(model)
        return
    names = family.matrices
    for layer in range(1, len(blocks_of(model)) + 1):
        for name in names:
            yield (layer, name), block_matrix(model, layer, name)


def _linear_layers(model: "PreTrainedModel") -> "Iterator[tuple[MatrixKey, BlockMatrix]]":
    from torch import nn

    blocks: dict[str, int] = {}
    heads = {id(model.get_submodule(name)) for name in classifier_names(model)}
    for path, module in list(body_of(model).named_modules()):
        if not isinstance(module, nn.Linear) or id(module) in heads:
            continue
        parts = path.split(".")
        inside = max((number for number, part in enumerate(parts, 1) if part.isdecimal()), default=0)
        block = blocks.setdefault(".".join(parts[:inside]), len(blocks) + 1)
        name = "/".join(parts[inside:])
        holder = body_of(model).get_submodule(".".join(parts[:-1]))
        yield (block, name), BlockMatrix(holder, parts[-1], name)


def pairs_of_alike(model: "PreTrainedModel", other: "PreTrainedModel") -> list[tuple[int, int]]:
    """Return (block, block), from 1, of two models of which only outputs are seen and whose linear layers are alike."""
    own, theirs = (
        {key: tuple(matrix.weight.shape) for key, matrix in iter_block_matrices(each)} for each in (model, other)
    )
    return [(layer, layer) for layer in dict.fromkeys(layer for layer, _ in own)] if own == theirs else []


def query_factor(config: "PretrainedConfig", layer: int, origin: int) -> float:
    """Return what queries of block `origin` (1..L) are multiplied by, to give the same scores in block `layer`."""
    field = family_of(config).scores_by_number
    return layer / origin if field is not None and getattr(config, field) else 1.0


def scale_queries(model: "PreTrainedModel", origins: "Sequence[int]") -> None:
    """Let blocks with weights of another model's attend as they do there, in place.

    origins: the block, from 0, that each of the model's first blocks has its weights from. Where a family divides its
    scores by the number of a block, the queries' weight and bias make up for another number.
    """
    for layer, origin in enumerate(origins, 1):
        if (factor := query_factor(model.config, layer, origin + 1)) != 1.0:
            query = block_matrix(model, layer, "query")
            for tensor in (query.weight, query.of(query.module.bias)):  # type: ignore[arg-type]
                tensor.detach().mul_(factor)
