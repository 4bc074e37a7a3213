"""Queries, keys and values as the attention function gets them: after rotation, after norms of their own."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Note = Callable[[nn.Module, dict[str, Tensor], Tensor | None], None]
"""Called with the module, its "query", "key" and "value" (batch, heads, seq, head size), and its window.

The queries are such that q k^T / sqrt(head size) are the scores, whatever else the module scales them by.
The window is (batch, 1, seq, seq), the keys that each query attends to; None where these are all real tokens, or, in
a causal model, all up to the query.
"""

_NOTES: dict[nn.Module, Note] = {}


def configs_of(model: nn.Module) -> list["PretrainedConfig"]:
    """Return every configuration that modules of a model read: parts that were put together have their own."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) is not None]


@contextlib.contextmanager
def noting(configs: Sequence["PretrainedConfig"], notes: Mapping[nn.Module, Note]) -> Iterator[None]:
    """Call notes[module] before the attention function of each of these modules; `configs`: of `configs_of`.

    The model's own function then computes, with its own mask: nothing that the model gives changes.
    """
    if not notes:
        yield
        return
    plain: list[Any] = [config._attn_implementation for config in configs]
    for config, name in zip(configs, plain, strict=True):
        config._attn_implementation = _registered(name)
    _NOTES.update(notes)
    try:
        yield
    finally:
        for config, name in zip(configs, plain, strict=True):
            config._attn_implementation = name
        for module in notes:
            _NOTES.pop(module, None)


@cache
def _registered(plain: str) -> str:
    """Register the attention implementation `plain` with notes before it, and return the name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shared = ALL_ATTENTION_FUNCTIONS.get(plain)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if (note := _NOTES.get(module)) is not None:
            vectors = {"query": _scaled(query, kwargs.get("scaling")), "key": key, "value": value}
            note(module, vectors, _window(attention_mask, kwargs.get("sliding_window")))
        # Each family has an eager function of its own, beside its modules.
        function = shared or sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query, key, value, attention_mask, **kwargs)

    name = f"kdcli_{plain}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    return name


def _scaled(query: Tensor, scaling: float | None) -> Tensor:
    root = query.shape[-1] ** 0.5
    return query if scaling is None or math.isclose(scaling * root, 1.0, rel_tol=1e-6) else query * (scaling * root)


def _window(mask: Tensor | None, size: int | None) -> Tensor | None:
    if size is None or mask is None or mask.ndim != 4:
        return None
    # Eager functions add their mask to the scores.
    return mask if not mask.is_floating_point() else mask == 0
