"""The sizes of a model, under one name for every family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcli.errors import InputError
from kdcli.models.families import anatomy_of

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


def longest_input(config: "PretrainedConfig") -> int | None:
    """Return how many tokens a model has positions for; None where it needs none of its own."""
    if not getattr(config, "position_biased_input", True):
        return None
    # RoBERTa counts positions from the padding token's id on.
    skipped = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return config.max_position_embeddings - skipped


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


def check_lengths(configs: Mapping[str, "PretrainedConfig"], lengths: Sequence[int], where: str) -> None:
    """Raise InputError when some model has no positions for texts of these lengths. configs: by the models' names."""
    for name, config in configs.items():
        positions = longest_input(config)
        if positions is not None and max(lengths) > positions:
            raise InputError(
                f"{max(lengths)} tokens are more than the {positions} that the {name} can read",
                where=where,
                hint=f"use at most {positions}",
            )
