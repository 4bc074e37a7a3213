"""What is captured of a forward pass, and the request for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MatrixKey = tuple[int, str]
"""(block 1..L, name): the name is one of `kdcli.models.families.MATRICES`."""

EMBEDDINGS = "embeddings"
"""The name, beside block 0, of what makes the embedding output."""


@dataclass(frozen=True, eq=False)
class VocabularyLogits:
    """Logits over a vocabulary as what they are formed from: a few rows of them exist at a time, never all.

    states: (n, width), the inputs of the last linear map. weight: (vocabulary, width), bias: (vocabulary,), of it.
    cap: c where logits are c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2). dtype: that products are formed in;
    None: that of the states.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    cap: "float | None" = None
    dtype: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Tensor | slice) -> "VocabularyLogits":
        """Return the logits of some rows."""
        return replace(self, states=self.states[rows])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, vocabulary)"""
        return len(self.states), self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where they are formed."""
        return self.states.device

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """States, weight and bias."""
        return self.states, self.weight, self.bias

    def flatten(self, first: int = 0, last: int = -1) -> "VocabularyLogits":
        """Return the same: rows are laid flat already."""
        return self

    def detach(self) -> "VocabularyLogits":
        """Return the same without gradient."""
        bias = self.bias.detach() if self.bias is not None else None
        return replace(self, states=self.states.detach(), weight=self.weight.detach(), bias=bias)

    def float(self) -> Tensor:
        """Return all of them as a table, (n, vocabulary), fp32: of a few rows only."""
        dtype = self.dtype or self.states.dtype
        bias = self.bias.to(dtype) if self.bias is not None else None
        logits = torch.nn.functional.linear(self.states.to(dtype), self.weight.to(dtype), bias).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True, eq=False)
class TopTokens:
    """What is known of a teacher's distributions over a vocabulary: its most probable tokens, and the rest as one.

    ids: (n, k). log_probabilities: (n, k + 1), of these tokens and of all others together, at a temperature.
    """

    ids: Tensor
    log_probabilities: Tensor
    temperature: "float" = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> "TopTokens":
        """Return what is known of some rows."""
        return replace(self, ids=self.ids[rows], log_probabilities=self.log_probabilities[rows])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k + 1)"""
        return len(self.ids), self.log_probabilities.shape[1]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.ids.device

    def detach(self) -> "TopTokens":
        """Return the same: nothing of it has a gradient."""
        return self

    def float(self) -> Tensor:
        """Raise TypeError: most of the logits are unknown."""
        raise TypeError("of a teacher's most probable tokens alone there is no table of logits")


Logits = Tensor | VocabularyLogits | TopTokens


@dataclass
class Prediction:
    """A table of predicted distributions.

    logits: (n, classes), a row each, or what they are formed from: only a distribution looks into them. Of a class that
    a row cannot have they are a low finite number, never -inf. weights: (n,), sum 1: the mean over an example's rows,
    then over the examples, of which one without rows counts as zero; or, where tokens weigh equally, the mean over all
    rows of a step, of which this table is a part. None where all rows weigh the same. target: the gold answers, (n,) or
    (n, classes); None without any. Where only some rows have one, `answered` (m,) says which, `target` holds those m,
    and `target_weights` (m,) their weights. heads: of a model whose logits are the mean of two, those for gold answers
    and those for a teacher's predictions (DeiT, Touvron et al. 2021, arXiv 2012.12877, section 4); apart: whether
    each of them learns its own, rather than their mean both.
    """

    logits: Logits
    weights: Tensor | None = None
    target: Tensor | None = None
    answered: Tensor | None = None
    target_weights: Tensor | None = None
    heads: tuple[Tensor, Tensor] | None = None
    apart: bool = False

    @property
    def for_gold(self) -> Logits:
        """The logits that gold answers are compared with."""
        return self.heads[0] if self.apart and self.heads is not None else self.logits

    @property
    def for_teacher(self) -> Logits:
        """The logits that a teacher's are compared with."""
        return self.heads[1] if self.apart and self.heads is not None else self.logits

    @property
    def table(self) -> Tensor:
        """The logits as a table, formed where they are not: of few rows only."""
        return self.logits if isinstance(self.logits, Tensor) else self.logits.float()


def part_heads(predictions: list[Prediction], *, gold: bool, teacher: bool) -> None:
    """Let a student's two heads learn from one teacher each, in place: from gold answers or predictions alone both do.

    gold, teacher: whether the student learns from gold answers, and from a teacher's predictions.
    """
    for table in predictions:
        table.apart = gold and teacher


@dataclass(frozen=True)
class Request:
    """What must be captured from one model's forward pass; everything else is not even looked at.

    Block numbers follow the literature: hidden[0] is the embedding output, hidden[l] the output of block l; that of
    the last one after the norm that follows it in some families. `attention`: blocks whose queries and keys are
    compared as an attention map. `linear`: matrices whose input and own output are kept, before any rotation or norm
    that follows. `local`: (matrix, another model's matrix) whose outputs on that one's inputs are formed.
    `projections`: maps whose trained projections are asked for, (0, EMBEDDINGS) among them.
    `all_positions`: predictions at every real token, not just at those with a gold answer.
    `temperatures`: those at which logits are compared as distributions, where nothing else is made of them.
    `gradients` says how often the logits are differentiated by hidden[0]: 1 keeps the graph between them, 2 one whose
    gradient can be learned from; `path` is the number of points between a zero embedding and hidden[0] at which the
    model is to be run for it (integrated gradients).
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    matrices: frozenset[MatrixKey] = frozenset()
    attention: frozenset[int] = frozenset()
    linear: frozenset[MatrixKey] = frozenset()
    local: frozenset[tuple[MatrixKey, MatrixKey]] = frozenset()
    factors: bool = False
    projections: frozenset[MatrixKey] = frozenset()
    all_positions: bool = False
    temperatures: frozenset[float] = frozenset()
    gradients: int = 0
    path: int = 1

    def __or__(self, other: "Request") -> "Request":
        return Request(
            self.logits or other.logits,
            self.hidden | other.hidden,
            self.matrices | other.matrices,
            self.attention | other.attention,
            self.linear | other.linear,
            self.local | other.local,
            self.factors or other.factors,
            self.projections | other.projections,
            self.all_positions or other.all_positions,
            self.temperatures | other.temperatures,
            max(self.gradients, other.gradients),
            max(self.path, other.path),
        )

    @property
    def inside(self) -> bool:
        """True when something inside a forward pass is asked for: known logits do not do."""
        return bool(self.hidden or self.matrices or self.linear or self.gradients)


@dataclass
class Signals:
    """What was captured of one forward pass, as far as it was asked for.

    mask: (batch, seq), 1 at real tokens. weights: (batch,), by which means over an example's tokens are averaged over
    the examples of a step, where tokens weigh equally; None where examples do. segments: (batch, seq), the document of
    a packed block that a token belongs to, or None where a row is one text; models attend over the whole row all the
    same.
    predictions: one table or several, as the kind of task has. hidden[l]: (batch, seq, hidden).
    matrices[(l, name)]: output of that linear map with its bias, (batch, seq, out); queries, keys and values as the
    attention function gets them, after rotation and norms of their own.
    windows[l]: (batch, 1, seq, seq), the keys that each query of block l attends to, where it is not all real tokens.
    linear[(l, name)]: (input, output) of that map, (batch, seq, in) and (batch, seq, out) with its bias.
    local[(l, name)]: output of that map, with its bias, on another model's input, (batch, seq, out).
    factors[(l, name)]: the tensor chain of that matrix, only for over-parameterised weights.
    projections[(l, name)]: (teacher's width, student's), only of a student whose weights are projections of its
    teacher's: what the teacher gives there, times it, compares with the student.
    path: (scaled embedding output, predictions) for alpha = 1/K, ..., 1, where a gradient's path is asked for.
    heads: number of attention heads; kv_heads: of keys and values, where these are fewer: each belongs to as many
    neighbouring heads of queries. causal: each token attends to those before it and to itself. uneven: states of some
    tokens outweigh those of all others, so that errors relative to them are so token by token. score_cap: c of
    c tanh(score / c), which some models make of their scores. last: the body's output, of a pass to its end for which
    nothing was predicted.
    """

    mask: Tensor
    heads: int
    kv_heads: int | None = None
    causal: bool = False
    uneven: bool = False
    score_cap: float | None = None
    segments: Tensor | None = None
    weights: Tensor | None = None
    predictions: list[Prediction] = field(default_factory=list)
    path: list[tuple[Tensor, list[Prediction]]] = field(default_factory=list)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    matrices: Mapping[MatrixKey, Tensor] = field(default_factory=dict)
    windows: dict[int, Tensor] = field(default_factory=dict)
    linear: dict[MatrixKey, tuple[Tensor, Tensor]] = field(default_factory=dict)
    local: dict[MatrixKey, Tensor] = field(default_factory=dict)
    factors: Mapping[MatrixKey, tuple[Tensor, ...]] = field(default_factory=dict)
    projections: Mapping[MatrixKey, Tensor] = field(default_factory=dict)
    last: Tensor | None = None
    _scores: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def on(self, device: torch.device) -> "Signals":
        """Return them with every captured tensor on `device`, where a model that is spread over several gave them."""
        return replace(
            self,
            hidden={layer: tensor.to(device) for layer, tensor in self.hidden.items()},
            matrices={key: tensor.to(device) for key, tensor in self.matrices.items()},
            windows={layer: tensor.to(device) for layer, tensor in self.windows.items()},
            linear={key: (x.to(device), y.to(device)) for key, (x, y) in self.linear.items()},
        )

    def take(self, tokens: list[int]) -> "Signals":
        """Return them at these tokens of each row alone. `local` stays: it has the tokens of another model's inputs."""
        return replace(
            self,
            mask=self.mask[:, tokens],
            hidden={layer: tensor[:, tokens] for layer, tensor in self.hidden.items()},
            matrices={key: tensor[:, tokens] for key, tensor in self.matrices.items()},
            linear={key: (x[:, tokens], y[:, tokens]) for key, (x, y) in self.linear.items()},
        )

    def heads_of(self, name: str) -> int:
        """Return how many heads queries, keys or values have."""
        return self.kv_heads if self.kv_heads is not None and name in ("key", "value") else self.heads

    def split_heads(self, layer: int, name: str, heads: int | None = None) -> Tensor:
        """Return a projection of block `layer` as (batch, heads, seq, head size), in fp32.

        heads: how many; left out, as many as it has, which are fewer for the keys and values of some models.
        """
        x = self.matrices[(layer, name)].float()
        batch, seq, width = x.shape
        heads = heads or self.heads_of(name)
        return x.view(batch, seq, heads, width // heads).transpose(1, 2)

    def attention_scores(self, layer: int) -> Tensor:
        """Return q k^T / sqrt(d_k) of block `layer`, (batch, heads, seq, seq), fp32, without any mask.

        Formed from the captured projections and kept, so that objectives share it; the forward pass
        itself keeps its fused attention.
        """
        if layer not in self._scores:
            query = self.split_heads(layer, "query")
            key = repeat_groups(self.split_heads(layer, "key"), self.heads)
            scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
            if self.score_cap is not None:
                scores = (scores / self.score_cap).tanh() * self.score_cap
            self._scores[layer] = scores
        return self._scores[layer]


def repeat_groups(vectors: Tensor, heads: int) -> Tensor:
    """Return keys or values (batch, groups, seq, head size) as each of `heads` heads of queries gets them."""
    groups = vectors.shape[1]
    return vectors if groups == heads else vectors.repeat_interleave(heads // groups, dim=1)
