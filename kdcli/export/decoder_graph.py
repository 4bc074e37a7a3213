"""From a causal language model to one ONNX graph with a key-value cache: for prompts, and for one token after another.

Inputs: `input_ids` (batch, new), `attention_mask` (batch, past + new), `position_ids` (batch, new), `logits_to_keep`
(kept,), and for each block `past_key_values.N.key` and `.value` (batch, key/value heads, past, head size). Outputs:
`logits` (batch, kept, vocabulary) and `present.N.key` and `.value`, as long as past and new together.

`logits_to_keep` holds the places among the new tokens whose logits are computed: the last one while text is written
(the output matrix is a fifth of a small model's multiplications), all of them for a perplexity. So one graph serves
both, with one copy of the weights.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.models.attention import configs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of each block, (batch, key/value heads, past, head size)."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")

PAST = "past_key_values."
"""How the names of the cache's inputs begin."""

PRESENT = "present."
"""How the names of the cache's outputs begin."""


def cache_name(model: "PreTrainedModel") -> str:
    """Return what a model's forward pass calls its cache: a newer name in newer versions of the library."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


class DecoderFunction(nn.Module):
    """A causal language model as a function from tensors to tensors, its cache among them."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        self.cache = cache_name(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, logits_to_keep: Tensor, past: Past
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        # Not by the configuration: blocks with a window would keep the window alone, of a length of their own.
        cache = DynamicCache()
        for block, (keys, values) in enumerate(past):
            cache.update(keys, values, block)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            use_cache=True,
            **{self.cache: cache},
        )
        layers: list[Any] = cache.layers
        return (output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


@torch.no_grad()
def cache_shapes(model: "PreTrainedModel") -> list[tuple[int, int, int]]:
    """Return how many key/value heads each block caches, and the sizes of a key and of a value."""
    from transformers import DynamicCache

    kept = DynamicCache()
    model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=True, **{cache_name(model): kept})
    layers: list[Any] = kept.layers
    return [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


class TorchText:
    """What a PyTorch model has read of a batch of texts, as `kdcli.export.decoder.Text` of a graph."""

    def __init__(self, model: "PreTrainedModel", rows: int, room: int) -> None:
        """room: is not needed here: this cache grows."""
        from transformers import DynamicCache

        self.model = model
        self.cache = {cache_name(model): DynamicCache(config=model.config)}
        self.mask = np.zeros((rows, 0), np.int64)

    @torch.inference_mode()
    def read(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the logits at the last token of each text (batch, 1, vocabulary). ids, mask: as `Text.read`."""
        self.mask = np.concatenate([self.mask, mask], axis=1)
        positions = (self.mask.cumsum(1) - 1).clip(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(self.mask),
            position_ids=torch.from_numpy(positions),
            logits_to_keep=1,
            use_cache=True,
            **self.cache,
        )
        return output.logits.numpy()


def names_of(blocks: int) -> tuple[list[str], list[str]]:
    """Return the names of all inputs and outputs of the graph of a model with this many blocks."""
    parts = [f"{block}.{name}" for block in range(blocks) for name in ("key", "value")]
    return [*INPUTS, *(PAST + part for part in parts)], ["logits", *(PRESENT + part for part in parts)]


def arguments(model: "PreTrainedModel") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments of a `DecoderFunction` to trace it with, and which of their sizes are dynamic."""
    batch, new, past = 2, 5, 3
    shapes = cache_shapes(model)
    mask = torch.ones((batch, past + new), dtype=torch.long)
    mask[1, :2] = 0
    drawn = torch.Generator().manual_seed(0)
    caches = [
        tuple(torch.randn((batch, heads, past, size), generator=drawn) for size in (key, value))
        for heads, key, value in shapes
    ]
    values = (
        torch.randint(model.config.vocab_size, (batch, new), generator=drawn),
        mask,
        (mask.cumsum(1) - 1).clamp(min=0)[:, past:],
        torch.tensor([new - 2, new - 1]),
        caches,
    )
    dim = torch.export.Dim
    rows, tokens, cached = dim("batch"), dim("sequence"), dim("past_sequence")
    dynamic = {
        "input_ids": {0: rows, 1: tokens},
        "attention_mask": {0: rows, 1: dim.DYNAMIC},
        "position_ids": {0: rows, 1: tokens},
        "logits_to_keep": {0: dim("kept")},
        "past": [({0: rows, 2: cached}, {0: rows, 2: cached}) for _ in shapes],
    }
    return values, dynamic


@contextmanager
def graph_attention(model: nn.Module) -> Iterator[None]:
    """Let a model's attention be computed in the way that ONNX has an operator for."""
    name, configs = _registered(), configs_of(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


@cache
def _registered() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = "kdcli_graph"
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the output of attention, (batch, seq, heads, head size). attention_mask: True where a key is attended.

    The library repeats narrower keys and values for each head that shares them; ONNX's operator takes them as they are.
    """
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=groups > 1
        )
        return output.transpose(1, 2).contiguous(), None
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None
