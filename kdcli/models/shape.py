"""The sizes of a model, under one name for every family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.models.families import Family, SizeNames, family_of
from kdcli.models.heads import SENTENCE_SETTINGS

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer: blocks, widths, heads, and what it reads.

    vocab, max_positions: of a model that reads text. image, patch: side of a model's images, or their height and
    width, in pixels; channels: of a pixel; tokens: of patches and before them that one such image becomes; any_size:
    images of other sizes may be given as they are. What does not belong to a model is None.
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
    vocab: int | None
    max_positions: int | None
    gated: bool = False
    causal: bool = False
    embedding: int | None = None
    image: int | tuple[int, int] | None = None
    patch: int | tuple[int, int] | None = None
    channels: int | None = None
    tokens: int | None = None
    any_size: bool = False

    @property
    def uneven(self) -> bool:
        """True where hidden states are sums that grow from block to block, and some tokens' outweigh all others."""
        return self.causal or self.tokens is not None

    def width_of(self, matrix: str) -> int:
        """Return how many features one of a block's linear maps gives."""
        if matrix in ("key", "value"):
            return self.kv_heads * self.head
        if matrix == "query":
            return self.heads * self.head
        return self.intermediate if matrix in ("ffn_in", "ffn_gate") else self.hidden


INSIDE = ("layers", "hidden", "heads", "kv_heads", "head", "intermediate")
"""Sizes of what stands inside a model."""


class UnseenError(InputError):
    """A size is asked for of what kdcli does not see. title: of the family; reason: why its outputs alone are seen."""

    def __init__(self, title: str, reason: str, **place: Any) -> None:
        super().__init__(f"of {title} only outputs can be compared, because {reason}", **place)
        self.title, self.reason = title, reason


@dataclass(frozen=True)
class OuterShape(ModelShape):
    """The shape of a model of which only outputs are seen: whoever asks for a size inside it is refused."""

    title: str = ""
    reason: str = ""

    def __getattribute__(self, name: str) -> Any:
        if name in INSIDE:
            raise UnseenError(self.title, self.reason, hint=OTHER_FAMILY)
        return super().__getattribute__(name)


OTHER_FAMILY = "choose a model of another family: `kdcli families` lists them"


def need_blocks(family: Family, what: str, where: str | None = None, hint: str = OTHER_FAMILY) -> None:
    """Raise InputError where `what`, as the start of a sentence, needs blocks, and the models of a family show none."""
    if family.outputs_only is not None:
        raise InputError(
            f"{what} needs blocks, and of {family.title} kdcli sees outputs only, because {family.outputs_only}",
            where=where,
            hint=hint,
        )


def longest_input(config: "PretrainedConfig") -> int | None:
    """Return how many tokens a model has positions for; None where it needs none of its own, or reads images."""
    family = family_of(config)
    if family.sizes.positions is None:
        return None
    if family.positions_if is not None and not getattr(config, family.positions_if):
        return None
    positions: int = getattr(config, family.sizes.positions)
    if family.first_position == "zero":
        return positions
    return positions - 1 - (config.pad_token_id if family.padding is None else family.padding)


def shape_of(config: "PretrainedConfig") -> ModelShape:
    """Return the sizes that a configuration says. Raises InputError for an unknown family."""
    family = family_of(config)
    names = family.sizes
    if family.outputs_only is not None:
        return _outer(config, family)
    hidden, heads = getattr(config, names.hidden), getattr(config, names.heads)
    image, patch = (_side(_given(config, name)) for name in (names.image, names.patch))
    return ModelShape(
        family=family.name,
        layers=getattr(config, names.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=_given(config, names.kv_heads) or heads,
        head=_given(config, names.head) or hidden // heads,
        intermediate=_intermediate(config, names, hidden),
        vocab=_given(config, names.vocabulary),
        max_positions=_given(config, names.positions),
        gated=family.ffn_gate is not None,
        causal=family.causal and not (family.both_ways is not None and getattr(config, family.both_ways, False)),
        embedding=_embedding(config, hidden),
        image=image,
        patch=patch,
        channels=_given(config, names.channels),
        tokens=_tokens(family, image, patch, _given(config, names.registers) or 0),
    )


def _intermediate(config: "PretrainedConfig", names: SizeNames, hidden: int) -> int:
    if names.ratio is not None:
        return ffn_width(names, hidden, getattr(config, names.ratio))
    return _given(config, names.intermediate) or (names.times or 0) * hidden


def ffn_width(names: SizeNames, hidden: int, ratio: int) -> int:
    """Return the feed-forward width of blocks of a family that tells it in hidden sizes."""
    width = hidden * ratio
    return (width * 2 // 3 + 7) // 8 * 8 if names.two_thirds else width


def ffn_ratio(names: SizeNames, hidden: int, width: int) -> int:
    """Return the number of hidden sizes that gives a feed-forward width, or the nearest to it."""
    return min(range(1, 2 * width // hidden + 2), key=lambda ratio: abs(ffn_width(names, hidden, ratio) - width))


def _outer(config: "PretrainedConfig", family: Family) -> OuterShape:
    names = family.sizes
    image, channels, any_size = _side(_given(config, names.image)), _given(config, names.channels), False
    if family.wraps == "timm":
        from kdcli.models.timm_models import images_of

        images = images_of(config)
        channels, image, any_size = images.channels, (images.height, images.width), not images.fixed
    return OuterShape(
        family=family.name,
        layers=0,
        hidden=0,
        heads=0,
        kv_heads=0,
        head=0,
        intermediate=0,
        vocab=None,
        max_positions=None,
        image=image,
        patch=_side(_given(config, names.patch)),
        channels=channels,
        any_size=any_size,
        title=family.title,
        reason=family.outputs_only or "",
    )


def _given(config: "PretrainedConfig", name: str | None) -> Any:
    return getattr(config, name, None) if name is not None else None


def _side(size: Any) -> int | tuple[int, int] | None:
    return (size[0], size[1]) if isinstance(size, list | tuple) else size


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image, or of a patch, that may be told by one side."""
    return size if isinstance(size, tuple) else (size, size)


def takes_any_size(config: "PretrainedConfig") -> bool:
    """Return whether a model can read images of another size than its own: its positions are interpolated."""
    image = shape_of(config).image
    return family_of(config).interpolates and image is not None and len(set(both_sides(image))) == 1


def _tokens(
    family: Family, image: int | tuple[int, int] | None, patch: int | tuple[int, int] | None, registers: int
) -> int | None:
    if image is None or patch is None:
        return None
    (height, width), (down, across) = both_sides(image), both_sides(patch)
    return family.special + registers + (height // down) * (width // across)


def token_counts(config: "PretrainedConfig", lengths: "np.ndarray") -> "np.ndarray":
    """Return how many tokens a model makes of features of these lengths, (n,): of every image the same number."""
    return lengths * (shape_of(config).tokens or 1)


def attention_of(config: "PretrainedConfig") -> dict[str, Any]:
    """Return what `Signals` says of a model's attention: its heads, and what its scores are formed like."""
    shape, family = shape_of(config), family_of(config)
    if family.outputs_only is not None:
        return {"heads": 0}
    return {
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "causal": shape.causal,
        "uneven": shape.uneven,
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
