"""The relation objective: how tokens relate to each other within queries, keys and values (MiniLM, MiniLMv2)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdcli.objectives.base import Objective, common_window, key_bias, own_keys, times
from kdcli.objectives.hidden import token_mse
from kdcli.signals import Request, Signals, repeat_groups

Relation = tuple[str, str]
"""(rows, columns): names of two projections; ("value", "value") is MiniLM's value relation."""

Caps = tuple[float | None, float | None]
"""Of the student and of the teacher."""

ATTENTION: Relation = ("query", "key")
"""The relation that attention is made of."""

SELF_RELATIONS: dict[Relation, float] = {(name, name): 1.0 for name in ("query", "key", "value")}
"""MiniLMv2's choice: Q-Q, K-K and V-V, all of weight 1."""

CHUNK_ELEMENTS = 2**22
"""Scores that are held at a time: more costs memory without being any faster."""

CACHED_ELEMENTS = 2**18
"""The same on a CPU: few enough to stay in its cache from one pass to the next."""


def _split(vectors: Tensor, heads: int) -> Tensor:
    batch, seq, width = vectors.shape
    if width % heads:
        raise ValueError(f"{heads} relation heads do not divide a width of {width}")
    return vectors.float().reshape(batch, seq, heads, width // heads).transpose(1, 2)


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _log_sum_exp(scores: Tensor, probabilities: Tensor) -> Tensor:
    """Return log sum exp of the last axis where its softmax is known: from the largest, whose logarithm is exact."""
    return scores.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()


class RelationKL(torch.autograd.Function):
    """The KL divergence of two softmaxed Gram matrices, chunk by chunk of heads.

    Its gradient is formed along with the value, so that a chunk's (batch, heads, seq, seq) matrices are dropped at
    once; autograd would keep several of them for all heads until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        teacher_queries: Tensor,
        teacher_keys: Tensor,
        mask: Tensor,
        chunk: int,
        segments: Tensor | None = None,
        window: Tensor | None = None,
        caps: Caps = (None, None),
        weights: Tensor | None = None,
    ) -> Tensor:
        batch, heads, _, size = queries.shape
        scale, teacher_scale = size**-0.5, teacher_queries.shape[-1] ** -0.5
        bias = key_bias(own_keys(mask, segments, window), torch.float32)
        real = mask.float()
        share = 1.0 / batch if weights is None else weights[:, None]
        weight = (real / real.sum(-1, keepdim=True).clamp(min=1.0) * share / heads)[:, None, :, None]
        differentiate = any(ctx.needs_input_grad[:2])
        query_gradient, key_gradient = torch.empty_like(queries), torch.empty_like(keys)
        value = queries.new_zeros(())
        for start in range(0, heads, chunk):
            part = slice(start, start + chunk)
            # Heads lie side by side: each product would make a copy of its own.
            q, k = queries[:, part].contiguous(), keys[:, part].contiguous()
            own = _capped((q * scale) @ k.mT, caps[0])
            slope = None if caps[0] is None else 1 - (own / caps[0]).square()
            own.add_(bias)
            target = (teacher_queries[:, part] * teacher_scale) @ teacher_keys[:, part].mT
            target = _capped(target, caps[1]).add_(bias)
            student, teacher = torch.softmax(own, dim=-1), torch.softmax(target, dim=-1)
            # sum p_T (log p_T - log p_S), of which the logarithms are score - log sum exp.
            constant = _log_sum_exp(target, teacher) - _log_sum_exp(own, student)
            rows = target.sub_(own).mul_(teacher).sum(-1, keepdim=True) - constant
            value = value + (rows * weight).sum()
            if differentiate:
                error = student.sub_(teacher)
                if slope is not None:
                    error.mul_(slope)
                # A row's weight goes to the narrow vectors, not to all of its scores.
                query_gradient[:, part] = (error @ k).mul_(weight * scale)
                key_gradient[:, part] = error.mT @ (q * (weight * scale))
        ctx.save_for_backward(query_gradient, key_gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient = ctx.saved_tensors
        return times(query_gradient, gradient), times(key_gradient, gradient), *(None,) * 8


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    heads: int,
    *,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
    segments: Tensor | None = None,
    window: Tensor | None = None,
    caps: Caps = (None, None),
    weights: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return KL(teacher || student) of relation matrices, mean over relation heads, real rows and examples.

    A relation matrix is softmax(X Y^T / sqrt(d_r)) over real keys: X are `student` or `teacher`, (batch, seq, width)
    with all heads side by side, split again into `heads` pieces of width d_r; Y are the `..._columns`, by default X.
    Widths may differ, but `heads` must divide both: else ValueError. `chunk` heads are worked on at a time.
    `window`, (batch or 1, 1, seq, seq): the keys of each row, where these are not all real ones. `caps`: c of
    c tanh(score / c) of the student's and the teacher's scores, which some models make of those of attention.
    weights: (batch,), of examples.
    With `segments`, (batch, seq), a row runs over the keys of its own segment: how a token relates to one that
    happens to be packed beside it is nothing to learn. The models themselves attend over all tokens of a block, as
    they were pre-trained to.
    Source: MiniLM (Wang et al. 2020), eq. 6-8; MiniLMv2 (Wang et al. 2021), eq. 5-7.
    """
    rows, teacher_rows = _split(student, heads), _split(teacher.detach(), heads)
    columns = rows if student_columns is None else _split(student_columns, heads)
    targets = teacher_rows if teacher_columns is None else _split(teacher_columns.detach(), heads)
    batch, seq = mask.shape
    most = CACHED_ELEMENTS if mask.device.type == "cpu" else CHUNK_ELEMENTS
    chunk = chunk or max(1, most // (batch * seq * seq))
    return RelationKL.apply(rows, columns, teacher_rows, targets, mask, chunk, segments, window, caps, weights)


class RelationObjective(Objective):
    """Weighted sum over relations of their KL divergence, mean over pairs (student block, teacher block).

    heads: number of relation heads; None takes the models' own, which must be the same number (MiniLM): of keys and
    values these may be fewer than of queries. A relation of keys or of values alone is then one of narrower vectors.
    relations: weight of each (rows, columns). ("query", "key") with the models' own heads is the attention
    distribution of a model with plain dot-product attention.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        relations: Mapping[Relation, float] | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.relations = {key: w for key, w in (relations or SELF_RELATIONS).items() if w != 0}
        self.names = sorted({name for relation in self.relations for name in relation})
        self.heads = heads

    def _wants(self, layers: Iterable[int]) -> Request:
        layers = frozenset(layers)
        return Request(
            matrices=frozenset((layer, name) for layer in layers for name in self.names),
            attention=layers if ATTENTION in self.relations else frozenset(),
        )

    def student_request(self) -> Request:
        return self._wants(s for s, _ in self.pairs)

    def teacher_request(self) -> Request:
        return self._wants(t for _, t in self.pairs)

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        total = torch.zeros((), device=student.mask.device)
        for s, t in self.pairs:
            for relation, weight in self.relations.items():
                attends = relation == ATTENTION
                own, others = _heads_of(student, relation), _heads_of(teacher, relation)
                if self.heads is None and own != others:
                    raise ValueError(f"heads of their own can be compared in equal numbers, not {own}, {others}")
                rows, columns = _sides_of(student, s, relation)
                teacher_rows, teacher_columns = _sides_of(teacher, t, relation)
                total = total + weight * relation_kl(
                    rows,
                    teacher_rows,
                    student.mask,
                    self.heads or own,
                    student_columns=columns,
                    teacher_columns=teacher_columns,
                    segments=student.segments,
                    window=common_window((student, [s] * attends), (teacher, [t] * attends)),
                    caps=(student.score_cap, teacher.score_cap) if attends else (None, None),
                    weights=student.weights,
                )
        return total / len(self.pairs)


def _heads_of(signals: Signals, relation: Relation) -> int:
    """Return how many heads both sides of a relation have: of two that differ, the more."""
    return max(map(signals.heads_of, relation))


def _sides_of(signals: Signals, layer: int, relation: Relation) -> tuple[Tensor, Tensor | None]:
    """Return rows and columns of a relation, (batch, seq, width); None for columns that are the rows.

    Where one side has fewer heads, each of them stands beside every head of the other that it belongs to.
    """
    rows, columns = (signals.matrices[(layer, name)] for name in relation)
    if relation[0] == relation[1]:
        return rows, None
    heads = _heads_of(signals, relation)
    return tuple(  # type: ignore[return-value]
        side
        if signals.heads_of(name) == heads
        else repeat_groups(signals.split_heads(layer, name), heads).transpose(1, 2).flatten(2)
        for side, name in zip((rows, columns), relation, strict=True)
    )


class DirectRelationObjective(Objective):
    """Squared difference of queries, keys and values themselves, relation head by relation head.

    Each student head of width d_S / heads goes through a learned linear map of its own to d_T / heads. The maps start
    as the identity where widths agree, else with orthonormal rows or columns. Mean over heads, features, real tokens
    and pairs; weighted sum over `names`. Source: DirectMiniLM (Udagawa et al. 2023; there a sum over heads).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        widths: Mapping[str, tuple[int, int]],
        heads: int,
        names: Mapping[str, float] | None = None,
    ) -> None:
        """widths: (student, teacher) of each projection, all divisible by `heads`."""
        super().__init__()
        if wrong := [pair for pair in widths.values() if pair[0] % heads or pair[1] % heads]:
            raise ValueError(f"{heads} relation heads do not divide the widths {wrong[0][0]} and {wrong[0][1]}")
        self.pairs = tuple(pairs)
        self.names = dict(names or dict.fromkeys(("query", "key", "value"), 1.0))
        self.heads = heads
        self.bridges = nn.ParameterDict(
            {
                f"{s}_{name}": _first_map(heads, widths[name][0] // heads, widths[name][1] // heads)
                for s in sorted({s for s, _ in pairs})
                for name in self.names
            }
        )

    def student_request(self) -> Request:
        return Request(matrices=frozenset((s, n) for s, _ in self.pairs for n in self.names))

    def teacher_request(self) -> Request:
        return Request(matrices=frozenset((t, n) for _, t in self.pairs for n in self.names))

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        total = torch.zeros((), device=student.mask.device)
        for s, t in self.pairs:
            for name, weight in self.names.items():
                vectors = _split(student.matrices[(s, name)], self.heads) @ self.bridges[f"{s}_{name}"]
                value = token_mse(
                    vectors.transpose(1, 2).flatten(2), teacher.matrices[(t, name)], student.mask, student.weights
                )
                total = total + weight * value
        return total / len(self.pairs)


def _first_map(heads: int, student: int, teacher: int) -> nn.Parameter:
    if student == teacher:
        return nn.Parameter(torch.eye(student).repeat(heads, 1, 1))
    return nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(student, teacher)) for _ in range(heads)]))
