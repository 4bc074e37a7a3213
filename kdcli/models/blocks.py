"""The blocks of a model, their matrices, and what is below them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from kdcli.signals import MatrixKey
from kdcli.models.families import BLOCK_MATRICES, anatomy_of


def body_of(model: "PreTrainedModel") -> "nn.Module":
    """Return the encoder below the task's head (`model.bert`), or the model itself when it has no head."""
    return model.base_model


def blocks_of(model: "PreTrainedModel") -> "nn.ModuleList":
    """Return the list of transformer blocks."""
    from torch import nn

    blocks = body_of(model).get_submodule(anatomy_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def embeddings_of(model: "PreTrainedModel") -> "nn.Module":
    """Return the module whose output is hidden[0], (batch, seq, hidden)."""
    anatomy, body = anatomy_of(model.config), body_of(model)
    if anatomy.projection is not None and hasattr(body, anatomy.projection):
        return body.get_submodule(anatomy.projection)
    return body.get_submodule(anatomy.embeddings)


def block_matrix(model: "PreTrainedModel", layer: int, name: str) -> "nn.Module":
    """Return one of the six linear maps of block `layer` (1..L)."""
    return blocks_of(model)[layer - 1].get_submodule(anatomy_of(model.config).matrices[name])


def set_block_matrix(model: "PreTrainedModel", layer: int, name: str, module: "nn.Module") -> None:
    """Put `module` in the place of one of the six linear maps of block `layer` (1..L)."""
    path, _, attribute = anatomy_of(model.config).matrices[name].rpartition(".")
    setattr(blocks_of(model)[layer - 1].get_submodule(path), attribute, module)


def iter_block_matrices(model: "PreTrainedModel") -> "Iterator[tuple[MatrixKey, nn.Module]]":
    """Yield ((block, name), module) for every matrix of every block, from the first block on."""
    for layer in range(1, len(blocks_of(model)) + 1):
        for name in BLOCK_MATRICES:
            yield (layer, name), block_matrix(model, layer, name)
