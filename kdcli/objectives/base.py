"""What an objective sees: the signals of a forward pass, and what it asks a forward pass to capture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MatrixKey = tuple[int, str]
"""(block 1..L, name): the name is one of `kdcli.models.anatomy.BLOCK_MATRICES`."""


@dataclass(frozen=True)
class Wants:
    """What must be captured from one model's forward pass; everything else is not even looked at.

    Block numbers follow the literature: hidden[0] is the embedding output, hidden[l] the output of block l.
    `all_positions` matters for language models only: logits at every real token, not just at the masked ones.
    `gradients` says how often the logits are differentiated by hidden[0]: 1 keeps the graph between them, 2 one whose
    gradient can be learned from; `path` is the number of points between a zero embedding and hidden[0] at which the
    model is to be run for it (integrated gradients).
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    matrices: frozenset[MatrixKey] = frozenset()
    factors: bool = False
    all_positions: bool = False
    gradients: int = 0
    path: int = 1

    def __or__(self, other: "Wants") -> "Wants":
        return Wants(
            self.logits or other.logits,
            self.hidden | other.hidden,
            self.matrices | other.matrices,
            self.factors or other.factors,
            self.all_positions or other.all_positions,
            max(self.gradients, other.gradients),
            max(self.path, other.path),
        )

    @property
    def inside(self) -> bool:
        """True when something inside a forward pass is asked for: known logits do not do."""
        return bool(self.hidden or self.matrices or self.gradients)


@dataclass
class Signals:
    """What one forward pass said, as far as it was asked for.

    mask: (batch, seq), 1 at real tokens. segments: (batch, seq), the document of a packed block that a token belongs
    to, or None where a row is one text; models attend over the whole row all the same.
    logits: (batch, classes); of a language model (positions, vocabulary), at the flat positions `positions` (into
    batch x seq). hidden[l]: (batch, seq, hidden).
    matrices[(l, name)]: output of that linear map with its bias, (batch, seq, out).
    factors[(l, name)]: the tensor chain of that matrix, only for over-parameterised weights.
    path: (scaled embedding output, logits) for alpha = 1/K, ..., 1, where a gradient's path is asked for.
    heads: number of attention heads.
    """

    mask: Tensor
    heads: int
    segments: Tensor | None = None
    logits: Tensor | None = None
    positions: Tensor | None = None
    path: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    matrices: dict[MatrixKey, Tensor] = field(default_factory=dict)
    factors: Mapping[MatrixKey, tuple[Tensor, ...]] = field(default_factory=dict)
    _scores: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def split_heads(self, layer: int, name: str, heads: int | None = None) -> Tensor:
        """Return a projection of block `layer` as (batch, heads, seq, head size), in fp32."""
        x = self.matrices[(layer, name)].float()
        batch, seq, width = x.shape
        heads = heads or self.heads
        return x.view(batch, seq, heads, width // heads).transpose(1, 2)

    def attention_scores(self, layer: int) -> Tensor:
        """Return q k^T / sqrt(d_k) of block `layer`, (batch, heads, seq, seq), fp32, without any mask.

        Formed from the captured projections and kept, so that objectives share it; the forward pass
        itself keeps its fused attention.
        """
        if layer not in self._scores:
            query = self.split_heads(layer, "query")
            key = self.split_heads(layer, "key")
            self._scores[layer] = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
        return self._scores[layer]


class Objective(nn.Module):
    """One differentiable term that compares student and teacher.

    It sees tensors and masks, never a model or a recipe. Parameters of its own (bridges between widths)
    are trained with the student and thrown away at the end.

    Every reduction is a mean over the real tokens of each example, then over the examples of the batch:
    padding does not change it, and equal shares of a batch on several devices average to the whole.
    """

    def student_wants(self) -> Wants:
        """What must be captured from the student."""
        raise NotImplementedError

    def teacher_wants(self) -> Wants:
        """What must be captured from the teacher; empty when it needs none."""
        raise NotImplementedError

    def forward(self, student: Signals, teacher: Signals, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the term as a scalar in fp32."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Take note that epoch `epoch` (from 0) of `epochs` begins; for terms that change over time."""


def example_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` (batch, seq) over each example's real tokens, (batch,)."""
    mask = mask.to(values.dtype)
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` (batch, seq) over each example's real tokens, then over examples: a scalar."""
    return example_mean(values, mask).mean()


def own_keys(mask: Tensor, segments: Tensor | None = None) -> Tensor:
    """Return the keys that a row of scores is about: real ones, of the row's own segment. Boolean.

    mask, segments: (batch, seq); the result is (batch, 1, seq, seq), or (batch, 1, 1, seq) without segments.
    """
    keys = (mask != 0)[:, None, None, :]
    if segments is None:
        return keys
    return keys & (segments[:, None, :, None] == segments[:, None, None, :])


def key_bias(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what scores get added before a softmax over `keys` only: 0 there, elsewhere the lowest finite number."""
    return torch.zeros_like(keys, dtype=dtype).masked_fill(~keys, torch.finfo(dtype).min)


def masked_log_softmax(scores: Tensor, keys: Tensor) -> Tensor:
    """Return log-softmax of `scores` (batch, heads, seq, seq) over `keys` only; all others are about -inf."""
    return torch.log_softmax(scores + key_bias(keys, scores.dtype), dim=-1)
