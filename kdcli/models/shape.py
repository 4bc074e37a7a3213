"""The sizes of a model, under one name for every family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.models.families import family_of
from kdcli.models.heads import SENTENCE_SETTINGS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer: blocks, widths, heads, vocabulary, positions.

    kv_heads: heads of keys and values, each shared by heads / kv_heads heads of queries. head: the width of a head.
    gated: whether blocks have a gate. causal: whether tokens attend to none after them. embedding: the width of a
    text's embedding; None for a model that gives none.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocab: int
    max_positions: int
    gated: bool = False
    causal: bool = False
    embedding: int | None = None

    def width_of(self, matrix: str) -> int:
        """Return how many features one of a block's linear maps gives."""
        if matrix in ("key", "value"):
            return self.kv_heads * self.head
        if matrix == "query":
            return self.heads * self.head
        return self.intermediate if matrix in ("ffn_in", "ffn_gate") else self.hidden


def longest_input(config: "PretrainedConfig") -> int | None:
    """Return how many tokens a model has positions for; None where it needs none of its own."""
    family = family_of(config)
    if family.positions_if is not None and not getattr(config, family.positions_if):
        return None
    positions = getattr(config, family.sizes.positions)
    if family.first_position == "zero":
        return positions
    return positions - 1 - (config.pad_token_id if family.padding is None else family.padding)


def shape_of(config: "PretrainedConfig") -> ModelShape:
    """Return the sizes that a configuration says. Raises InputError for an unknown family."""
    family = family_of(config)
    names = family.sizes
    hidden, heads = getattr(config, names.hidden), getattr(config, names.heads)
    return ModelShape(
        family=family.name,
        layers=getattr(config, names.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=_given(config, names.kv_heads) or heads,
        head=_given(config, names.head) or hidden // heads,
        intermediate=_given(config, names.intermediate) or (names.times or 0) * hidden,
        vocab=getattr(config, names.vocabulary),
        max_positions=getattr(config, names.positions),
        gated=family.ffn_gate is not None,
        causal=family.causal and not (family.both_ways is not None and getattr(config, family.both_ways, False)),
        embedding=_embedding(config, hidden),
    )


def _given(config: "PretrainedConfig", name: str | None) -> int | None:
    return getattr(config, name, None) if name is not None else None


def attention_of(config: "PretrainedConfig") -> dict[str, Any]:
    """Return what `Signals` says of a model's attention: its heads, and what its scores are formed like."""
    shape, family = shape_of(config), family_of(config)
    return {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "causal": shape.causal,
        "score_cap": getattr(config, family.score_cap) if family.score_cap is not None else None,
    }


def _embedding(config: "PretrainedConfig", hidden: int) -> int | None:
    settings = getattr(config, SENTENCE_SETTINGS, None)
    if settings is None:
        return None
    widths = [module["out_features"] for module in settings["modules"] if "out_features" in module]
    return widths[-1] if widths else len(settings["pooling"]) * hidden


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
