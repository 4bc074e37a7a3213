"""Low-rank students: linear maps as two thin factors, from the SVD of the teacher's weights."""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.models.blocks import body_of, iter_block_matrices, module_at
from kdcli.models.counts import count_parameters
from kdcli.models.factoring import has_factors, is_target, nearest_ranks
from kdcli.models.factoriser import Factoriser
from kdcli.models.families import family_of
from kdcli.models.fused import merge_split
from kdcli.recipe.schema import OverparamSection, StudentSection, parse_count
from kdcli.signals import MatrixKey
from kdcli.tensors.mpo import signed_svd
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, int]
"""(out features, in features)"""

LEAST = 0.25
"""Share of the rank that it has where all have one which every matrix keeps when ranks are spread."""

_STARTS = {
    "activations": "factors from the inputs",
    "gradients": "factors from the gradients",
    "both": "factors from the inputs and gradients",
}
"""What a start says of itself, before the rows that it looks at."""


class LowRankLinear(nn.Module):
    """y = A (B x) + b with A = up.weight (out, rank) and B = down.weight (rank, in); A B is never formed."""

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in). Returns (..., out)."""
        return self.up(self.down(x))

    @property
    def weight(self) -> Tensor:
        """The whole matrix A B, (out, in), formed on demand."""
        return self.up.weight @ self.down.weight

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, factors: tuple[Tensor, Tensor] | None = None, shift: Tensor | None = None
    ) -> "LowRankLinear":
        """Return `linear` with factors in place of its weight: those that are given, or the best in the Frobenius norm.

        factors: A (out, rank), B (rank, in). shift: (out,), added to the bias, where there is one.
        """
        with torch.device(linear.weight.device):
            factored = cls(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
        up, down = svd_factors(linear.weight.detach(), rank) if factors is None else factors
        with torch.no_grad():
            factored.up.weight.copy_(up)
            factored.down.weight.copy_(down)
            if linear.bias is not None:
                factored.up.bias.copy_(linear.bias if shift is None else linear.bias.double() + shift)
        return factored.to(linear.weight.dtype)

    def merged(self) -> nn.Linear:
        """Return the dense linear map A B, b."""
        with torch.device(self.up.weight.device):
            dense = nn.Linear(self.in_features, self.out_features, bias=self.up.bias is not None)
        with torch.no_grad():
            dense.weight.copy_(self.up.weight.double() @ self.down.weight.double())
            if self.up.bias is not None:
                dense.bias.copy_(self.up.bias)
        return dense.to(self.up.weight.dtype)


class LowRankEmbedding(nn.Module):
    """A lookup table E1 E2 with E1 = down.weight (vocabulary, rank) and E2 = up.weight^T (rank, width).

    Some families multiply what they look up by a number, which is no part of the table: `scale`.
    """

    def __init__(self, table: nn.Embedding, rank: int) -> None:
        """table: the plain one whose place it takes; only its sizes and its kind count."""
        super().__init__()
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.rank = rank
        self.padding_idx = table.padding_idx
        self.scale: float | None = getattr(table, "scalar_embed_scale", None)
        self.down = nn.Embedding(table.num_embeddings, rank, padding_idx=table.padding_idx)
        self.up = nn.Linear(rank, table.embedding_dim, bias=False)
        self._plain: Any = type(table)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, seq). Returns (batch, seq, width)."""
        found = self.up(self.down(ids))
        return found if self.scale is None else found * self.scale

    @property
    def weight(self) -> Tensor:
        """The whole table, (vocabulary, width), formed on demand."""
        return self.down.weight @ self.up.weight.T

    def merged(self) -> nn.Embedding:
        """Return the plain table E1 E2."""
        with torch.device(self.down.weight.device):
            own = () if self.scale is None else (self.scale,)
            table: nn.Embedding = self._plain(self.num_embeddings, self.embedding_dim, self.padding_idx, *own)
        with torch.no_grad():
            table.weight.copy_(self.down.weight.double() @ self.up.weight.double().T)
        return table.to(self.down.weight.dtype)

    @classmethod
    def from_embedding(
        cls, table: nn.Embedding, rank: int, factors: tuple[Tensor, Tensor] | None = None
    ) -> "LowRankEmbedding":
        """Return a table with factors E1, E2 that are given, or the best in the Frobenius norm."""
        with torch.device(table.weight.device):
            factored = cls(table, rank)
        left, right = svd_factors(table.weight.detach(), rank) if factors is None else factors
        with torch.no_grad():
            factored.down.weight.copy_(left)
            factored.up.weight.copy_(right.T)
        return factored.to(table.weight.dtype)


class LowRankDecoder(nn.Module):
    """Logits over the tokens of a factored table, by the very factors: y = E1 (E2 x) + b.

    Stands where a head shared the table of the embeddings, whose module registers the factors.
    """

    bias: nn.Parameter | None

    def __init__(self, table: LowRankEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        # A tuple hides the table from nn.Module: its factors are counted, saved and moved with the embeddings.
        self._table = (table,)
        self.register_parameter("bias", bias)

    @property
    def table(self) -> LowRankEmbedding:
        """The embeddings' own table."""
        return self._table[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns (..., vocabulary)."""
        return nn.functional.linear(x @ self.table.up.weight, self.table.down.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """The whole matrix, (vocabulary, width), formed on demand."""
        return self.table.weight

    def tied_to(self, table: nn.Embedding) -> nn.Linear:
        """Return the plain layer that shares the weight of a plain table."""
        plain = nn.Linear(table.embedding_dim, table.num_embeddings, bias=self.bias is not None, device="meta")
        plain.weight = table.weight
        plain.register_parameter("bias", self.bias)
        return plain


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (out, rank), B (rank, in) with A = U_r sqrt(S_r), B = sqrt(S_r) V_r^T, in `weight`'s type.

    Deterministic: computed in fp64, with fixed signs. Source: LoSparse's released code.
    """
    if weight.is_meta:
        return weight.new_empty(weight.shape[0], rank), weight.new_empty(rank, weight.shape[1])
    left, values, right = signed_svd(weight.double())
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


def break_even_rank(out_features: int, in_features: int) -> float:
    """Return the rank at which two factors hold as many weights as the dense matrix: o i / (o + i)."""
    return out_features * in_features / (out_features + in_features)


def factored_count(shape: Shape, rank: int | None) -> int:
    """Return the number of weights of a matrix kept dense (None) or as factors of `rank`."""
    out_features, in_features = shape
    return out_features * in_features if rank is None else rank * (out_features + in_features)


def ranks_at(shapes: Mapping[MatrixKey, Shape], rank: int) -> dict[MatrixKey, int | None]:
    """Return one rank for every matrix; None where factors would hold no fewer weights than the matrix."""
    return {key: rank if rank < break_even_rank(*shape) else None for key, shape in shapes.items()}


def plan_ranks(
    shapes: Mapping[MatrixKey, Shape],
    section: StudentSection,
    *,
    fixed_params: int,
    weights: Mapping[MatrixKey, Tensor] | None = None,
    overparam: OverparamSection | None = None,
    losses: Mapping[MatrixKey, Tensor] | None = None,
    words: bool = True,
) -> dict[MatrixKey, int | None]:
    """Return the rank of every block matrix; None where it stays dense.

    shapes: (out, in) of each matrix. fixed_params: parameters outside the matrices' weights. words: whether some of
    them are word embeddings. `budget`,
    `params` and the default give one rank everywhere, the largest that fits, or with `losses` (as `spread_ranks` takes
    them) ranks by their worth; `energy` gives each matrix the smallest rank that keeps that share of its squared
    singular values, and needs `weights`. All but a rank of its own are multiples of `section.rank_multiple`.
    Where `overparam` puts chains in place of the factors, only ranks that can be split into factors are chosen.
    Raises InputError when nothing fits or nothing would be saved.
    """

    def splits(key: MatrixKey, rank: int | None) -> bool:
        return rank is None or overparam is None or not is_target(*key, overparam) or has_factors(rank, overparam)

    dense = sum(factored_count(shape, None) for shape in shapes.values())
    largest = max(break_even_rank(*shape) for shape in shapes.values())
    if section.energy is not None:
        assert weights is not None
        return {key: _energy_rank(weights[key], section.energy, partial(splits, key)) for key in shapes}
    if section.rank is not None:
        if section.rank >= largest:
            raise InputError(
                f"rank {section.rank} is not below the break-even rank of any matrix (largest {largest:.1f}), "
                "so factors would hold more weights than the matrices",
                where="student.rank",
                hint=f"use a rank up to {_below(largest)}",
            )
        ranks = ranks_at(shapes, section.rank)
        if overparam is not None and not all(splits(key, rank) for key, rank in ranks.items()):
            near = " or ".join(str(rank) for rank in nearest_ranks(section.rank, overparam) if rank < largest)
            raise InputError(
                f"rank {section.rank} cannot be split into two factors of similar size, which [overparam] needs",
                where="student.rank",
                hint=f"use rank {near}",
            )
        return ranks
    if section.params is not None:
        allowed = parse_count(section.params) - fixed_params
        smallest = sum(factored_count(shape, 1) for shape in shapes.values())
        if allowed < smallest:
            raise InputError(
                f"{parse_count(section.params):,} parameters are not enough: embeddings, biases, norms and "
                f"head alone take {fixed_params:,}, and rank 1 everywhere {smallest:,} more",
                where="student.params",
                hint=f"{'factorise the embeddings, too (student.embedding_rank), or ' if words else ''}allow more",
            )
    else:
        # The small term undoes binary fractions: 0.29 of 100 weights are 29, not 28.
        allowed = int((section.budget if section.budget is not None else 0.5) * dense + 1e-6)
        if section.budget == 1.0:
            return dict.fromkeys(shapes)
    usual = _usual_multiples(shapes) if losses is not None else (1,)
    multiples = (section.rank_multiple,) if section.rank_multiple is not None else usual
    for multiple in multiples:
        best: dict[MatrixKey, int | None] | None = None
        for rank in range(multiple, _below(largest) + 1, multiple):
            candidate = ranks_at(shapes, rank)
            if _cost(shapes, candidate) <= allowed and all(splits(key, kept) for key, kept in candidate.items()):
                best = candidate
        if best is not None:
            return best if losses is None else spread_ranks(shapes, best, allowed, losses, multiple, splits)
    raise InputError(
        f"{allowed:,} block weights are under rank {multiples[-1]} everywhere",
        where="student.params" if section.params is not None else "student.budget",
        hint="allow more" + (", or a smaller rank_multiple" if multiples[-1] > 1 else ""),
    )


def spread_ranks(
    shapes: Mapping[MatrixKey, Shape],
    even: Mapping[MatrixKey, int | None],
    allowed: int,
    losses: Mapping[MatrixKey, Tensor],
    multiple: int,
    splits: Callable[[MatrixKey, int | None], bool] = lambda key, rank: True,
) -> dict[MatrixKey, int | None]:
    """Return ranks whose factors hold at most `allowed` weights and leave the least loss, None for a dense matrix.

    even: ranks that fit, the same for all; no matrix gets less than `LEAST` of its own there. losses: (min(out, in),)
    of each matrix, what each term of its decomposition that is left out adds to the loss, in one unit for all of them.
    multiple: of every rank. splits: whether a rank can be used. Weight by weight, the budget goes where the next terms
    take away most: optimal where losses fall from term to term.
    """

    def next_rank(key: MatrixKey, rank: int) -> int | None:
        above = range(rank + multiple, _below(break_even_rank(*shapes[key])) + 1, multiple)
        return next((r for r in above if splits(key, r)), None)

    ranks: dict[MatrixKey, int | None] = {}
    for key, rank in even.items():
        lowest = multiple * max(1, math.ceil(LEAST * (rank or break_even_rank(*shapes[key])) / multiple))
        ranks[key] = next((r for r in range(lowest, (rank or 0) + 1, multiple) if splits(key, r)), rank)
    left = allowed - _cost(shapes, ranks)

    def offer(key: MatrixKey) -> tuple[float, int, MatrixKey, int | None] | None:
        rank = ranks[key]
        if rank is None:
            return None
        wanted = next_rank(key, rank)
        cost = factored_count(shapes[key], wanted) - factored_count(shapes[key], rank)
        gain = float(losses[key][rank:wanted].sum())
        return (-gain / cost, cost, key, wanted)

    offers = [found for key in ranks if (found := offer(key))]
    heapq.heapify(offers)
    while offers:
        _, cost, key, wanted = heapq.heappop(offers)
        if cost > left:
            continue
        ranks[key], left = wanted, left - cost
        if (found := offer(key)) is not None:
            heapq.heappush(offers, found)
    return ranks


def _cost(shapes: Mapping[MatrixKey, Shape], ranks: Mapping[MatrixKey, int | None]) -> int:
    return sum(factored_count(shapes[key], rank) for key, rank in ranks.items())


def _usual_multiples(shapes: Mapping[MatrixKey, Shape]) -> tuple[int, ...]:
    """Return what spread ranks are multiples of, the first that fits: 8, which processors like."""
    return (8, 4, 2, 1) if min(break_even_rank(*shape) for shape in shapes.values()) >= 64 else (1,)


def _below(value: float) -> int:
    return int(value) - 1 if value == int(value) else int(value)


def _energy_rank(weight: Tensor, energy: float, splits: Callable[[int], bool]) -> int | None:
    squares = torch.linalg.svdvals(weight.double()) ** 2
    kept = torch.cumsum(squares, 0) / squares.sum().clamp(min=1e-300)
    least = int((kept < energy).sum()) + 1
    worthwhile = range(least, _below(break_even_rank(*weight.shape)) + 1)
    return next((rank for rank in worthwhile if splits(rank)), None)


def factorise(
    model: "PreTrainedModel",
    section: StudentSection,
    overparam: OverparamSection | None = None,
    factoriser: Factoriser | None = None,
) -> list[str]:
    """Replace the block matrices (and, if asked for, the word embeddings) of `model` by factors, in place.

    overparam: the chains that will take the factors' place. factoriser: chooses the factors; left out, the SVD's.
    Returns notes for the user. Raises InputError when the sizes asked for make no sense.
    """
    factoriser = factoriser or Factoriser()
    notes = []
    if section.embedding_rank is not None:
        notes.append(_factorise_embeddings(model, section.embedding_rank, factoriser))
    matrices = dict(iter_block_matrices(model))
    shapes: dict[MatrixKey, Shape] = {key: tuple(m.weight.shape) for key, m in matrices.items()}  # type: ignore[misc]
    linears: dict[MatrixKey, nn.Linear] = {key: matrix.linear() for key, matrix in matrices.items()}  # type: ignore[misc]
    fixed = count_parameters(model) - sum(linear.weight.numel() for linear in linears.values())
    ranks = plan_ranks(
        shapes,
        section,
        fixed_params=fixed,
        weights={key: linear.weight.detach() for key, linear in linears.items()},
        overparam=overparam,
        # What each gets follows from rows that a shape knows nothing of; together they get about as much as evenly.
        losses=factoriser.losses(linears) if section.ranks == "spread" and not _is_shape(linears) else None,
        words=family_of(model.config).word_embeddings is not None,
    )
    layer = 0
    if section.ranks == "spread" and not _is_shape(linears):
        ranks = factoriser.settle(ranks)
    for key, rank in ranks.items():
        if key[0] != layer:
            layer = key[0]
            # Before the first block only factors of the embeddings can have changed anything.
            if layer > 1 or section.embedding_rank is not None:
                factoriser.enter(model, layer)
        if rank is not None:
            factors, shift = factoriser.factors(key, linears[key], rank), factoriser.shift(key, linears[key], rank)
            matrices[key].replace(LowRankLinear.from_linear(linears[key], rank, factors, shift))
    used = sorted({rank for rank in ranks.values() if rank is not None})
    dense = [key for key, rank in ranks.items() if rank is None]
    kept = sum(factored_count(shapes[key], ranks[key]) for key in shapes)
    whole = sum(factored_count(shape, None) for shape in shapes.values())
    about = "about " if section.ranks == "spread" and _is_shape(linears) else ""
    span = str(used[0]) if len(used) == 1 else f"{used[0]} to {used[-1]}" if used else "none"
    notes.append(f"{about}rank {span}: {kept:,} of {whole:,} block weights ({kept / whole:.1%})")
    if used and (section.init in _STARTS or section.ranks == "spread"):
        what = [_STARTS[section.init]] if section.init in _STARTS else []
        what += ["ranks by the loss"] if section.ranks == "spread" else []
        notes.append(f"{' and '.join(what)} of up to {counted(section.init_samples, 'training row')}")
    if dense:
        notes.append(f"dense, since factors would save nothing there: {counted(len(dense), 'matrix', 'matrices')}")
    return notes


def _is_shape(linears: Mapping[MatrixKey, nn.Linear]) -> bool:
    return any(linear.weight.is_meta for linear in linears.values())


def _factorise_embeddings(model: "PreTrainedModel", rank: int, factoriser: Factoriser) -> str:
    path = family_of(model.config).word_embeddings
    if path is None:
        raise InputError(
            "a model that reads images has no word embeddings to factorise",
            where="student.embedding_rank",
            hint="leave it out",
        )
    table: nn.Embedding = body_of(model).get_submodule(path)  # type: ignore[assignment]
    limit = break_even_rank(table.num_embeddings, table.embedding_dim)
    if rank >= limit:
        raise InputError(
            f"embedding_rank {rank} is not below the break-even rank {limit:.1f}",
            where="student.embedding_rank",
            hint=f"use a rank up to {_below(limit)}",
        )
    decoders, own = decoders_of(model), own_decoder(model)
    factored = LowRankEmbedding.from_embedding(table, rank, factoriser.table_factors(table.weight, rank))
    body_of(model).set_submodule(path, factored)
    tie_decoders(model, decoders, factored)
    whose = ", closest for frequent tokens" if factoriser.counts is not None else ""
    if own is None:
        return f"word embeddings of rank {rank}{whose}"
    linear: nn.Linear = model.get_submodule(own)  # type: ignore[assignment]
    model.set_submodule(own, LowRankLinear.from_linear(linear, rank, factoriser.table_factors(linear.weight, rank)))
    return f"word embeddings and output layer of rank {rank}{whose}"


def own_decoder(model: "PreTrainedModel") -> str | None:
    """Return the path of the layer that predicts tokens by a matrix of its own; None where there is none."""
    output = model.get_output_embeddings() if body_of(model) is not model else None
    table = module_at(model, family_of(model.config).word_embeddings)
    if output is None or table is None or isinstance(output, LowRankDecoder) or output.weight is table.weight:
        return None
    rows = getattr(output, "out_features", None)
    if rows != table.num_embeddings:
        return None
    return next(path for path, module in model.named_modules() if module is output)


def decoders_of(model: "PreTrainedModel") -> list[str]:
    """Return the paths of the linear layers whose weight is the very table of the word embeddings."""
    table = module_at(model, family_of(model.config).word_embeddings)
    weight = table.weight if isinstance(table, nn.Embedding) else None
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is weight]


def tie_decoders(model: nn.Module, paths: Iterable[str], table: LowRankEmbedding) -> None:
    """Let the linear layers at these paths of `model` give their logits by the factors of `table`, in place."""
    for path in paths:
        bias: nn.Parameter | None = model.get_submodule(path).bias  # type: ignore[assignment]
        model.set_submodule(path, LowRankDecoder(table, bias))


def merge_low_rank(model: "PreTrainedModel") -> "PreTrainedModel":
    """Replace every factored map of `model` by the dense one that it equals, in place, and return `model`."""
    tables: dict[LowRankEmbedding, nn.Embedding] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            model.set_submodule(path, module.merged())
        elif isinstance(module, LowRankEmbedding):
            tables[module] = module.merged()
            model.set_submodule(path, tables[module])
    for path, module in list(model.named_modules()):
        if isinstance(module, LowRankDecoder):
            model.set_submodule(path, module.tied_to(tables[module.table]))
    merge_split(model)
    return model
