"""The sizes of a model, under one name for every family."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcli.models.anatomy import anatomy_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer: blocks, widths, heads, vocabulary, positions."""

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab: int
    max_positions: int


def shape_of(config: "PretrainedConfig") -> ModelShape:
    """Return the sizes that a configuration says. Raises InputError for an unknown family."""
    anatomy = anatomy_of(config)
    return ModelShape(
        family=anatomy.family,
        layers=getattr(config, anatomy.layers),
        hidden=getattr(config, anatomy.hidden),
        heads=getattr(config, anatomy.heads),
        intermediate=getattr(config, anatomy.intermediate),
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )
