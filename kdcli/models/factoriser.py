"""Which factors of a matrix are the closest: by its weights, by what it makes of real inputs, by what a loss sees."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcli.models.hashing import hash_of_tensors
from kdcli.models.statistics import Statistics
from kdcli.signals import MatrixKey
from kdcli.tensors.mpo import signed_svd

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 1e-6
"""Share of the inputs' mean square that every direction has at least: it orders those that no input has."""

ROWS = 2**13
"""Rows of a table of embeddings that are looked at at a time."""

LEAST = 1e-3
"""Share of the mean weight of a matrix's rows that every row has at least."""


@dataclass(frozen=True)
class Decomposition:
    """A matrix (out, in) as a sum of terms of rank 1, those first that matter most: the product `left` `right`.

    left: (out, n), right: (n, in), with n = min(out, in); a term's two vectors have one norm. losses: (n,), the error
    that each term leaves where it is cut off, in what the decomposition measures: squared singular values. All fp64.
    """

    left: Tensor
    right: Tensor
    losses: Tensor

    def leading(self, count: int) -> "Decomposition":
        """Return the first `count` terms alone."""
        return Decomposition(self.left[:, :count].clone(), self.right[:count].clone(), self.losses[:count].clone())

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (out, rank) and B (rank, in): the closest matrix of that rank is A B."""
        return self.left[:, :rank], self.right[:rank]


def decompose_by_inputs(weight: Tensor, moments: Tensor | None = None, rows: Tensor | None = None) -> Decomposition:
    """Return the terms of a weight W (out, in) whose leading r minimise E |diag(rows)^(1/2) (W - A B) x|^2 for every r.

    moments: E[x x^T], (in, in), of which the identity is the default. rows: (out,), weights of the outputs, 1 by
    default. Without either this is the SVD. The leading left vectors U of diag(rows)^(1/2) W C^(1/2), with C the
    moments, are the eigenvectors of that matrix times its transpose, and the optimum is the projection U U^T of the
    weighed matrix: C is never inverted. Deterministic: computed in fp64, with fixed signs.
    Source: SVD-LLM (arXiv 2403.07378), its closed form; FWSVD (arXiv 2207.00112) for the weights of rows.
    """
    weight = weight.detach().double()
    if moments is None and rows is None:
        left, values, right = signed_svd(weight)
        return _balanced(left, values[:, None] * right, values.square())
    scale = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    if rows is not None:
        scale = rows.double().sqrt()
        scale = (scale / scale.mean().clamp(min=1e-300)).clamp(min=LEAST)
    weighed = scale[:, None] * weight
    # A tall matrix has few directions of outputs: only those are looked at.
    basis, core = torch.linalg.qr(weighed) if weighed.shape[0] > weighed.shape[1] else (None, weighed)
    if moments is None:
        seen = core @ core.T
    else:
        ridge = RIDGE * moments.diagonal().double().mean()
        seen = core @ moments.double() @ core.T + ridge * (core @ core.T)
    losses, vectors = torch.linalg.eigh(seen)
    losses, vectors = losses.flip(0).clamp(min=0.0), vectors.flip(1)
    vectors = vectors if basis is None else basis @ vectors
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)))
    vectors = vectors * torch.where(signs == 0, 1.0, signs)
    return _balanced(vectors / scale[:, None], vectors.T @ weighed, losses)


def factors_by_rows(table: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (n, rank) and B (rank, width), in the table's type: they minimise sum_i rows_i |(table - A B)_i|^2.

    B are the leading eigenvectors of table^T diag(rows) table, and A is the table times B^T: nothing of the size of a
    large table is held in fp64.
    """
    gram = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for part, weights in zip(table.detach().split(ROWS), rows.double().split(ROWS), strict=True):
        gram += part.double().T @ (weights[:, None] * part.double())
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)))
    right = (vectors * torch.where(signs == 0, 1.0, signs)).to(table.dtype).T
    left = table.detach() @ right.T
    share = left.norm(dim=0).clamp(min=1e-30).sqrt()
    return left / share, right * share[:, None]


def _balanced(left: Tensor, right: Tensor, losses: Tensor) -> Decomposition:
    """Give both vectors of every term one norm, and leave their product as it is."""
    sizes = left.norm(dim=0), right.norm(dim=1)
    share = (sizes[1] / sizes[0].clamp(min=1e-300)).sqrt()
    # A term without any weight stays as it is: nothing can be shared.
    share = torch.where(share > 0, share, 1.0)
    return Decomposition(left * share, right / share[:, None], losses)


@dataclass
class Factoriser:
    """Chooses the factors of block matrices, and of tables with a row a token.

    statistics: of the model that they are taken from, by block and matrix. look_again: returns those of one
    block as the student's own factors before it make its inputs; None where they stay. settle: takes ranks that were
    spread, and returns those that count. counts: (vocabulary,), how often rows of data have each token; None where all
    weigh the same. A decomposition takes several times the memory of its matrix: only the last
    one is kept, unless all are needed twice.
    """

    by_inputs: bool = False
    by_gradients: bool = False
    statistics: dict[MatrixKey, Statistics] = field(default_factory=dict)
    look_again: "Callable[[PreTrainedModel, int], Mapping[MatrixKey, Statistics]] | None" = None
    settle: "Callable[[dict[MatrixKey, int | None]], dict[MatrixKey, int | None]]" = lambda ranks: ranks
    counts: Tensor | None = None
    _found: dict[MatrixKey, tuple[str, Decomposition]] = field(default_factory=dict)
    _keeps: bool = False

    def enter(self, student: "PreTrainedModel", layer: int) -> None:
        """Prepare for block `layer` (1..L) of a student that has its factors before it."""
        if self.look_again is None:
            return
        for key, of in self.look_again(student, layer).items():
            given = self.statistics[key]
            self.statistics[key] = replace(of, importance=given.importance, sensitivity=given.sensitivity)
            self._found.pop(key, None)

    def decomposition(self, key: MatrixKey, linear: nn.Linear) -> Decomposition:
        """Return the terms of the matrix `key`, whose layer is given."""
        # The matrix of another model may be asked for under the same name.
        content = hash_of_tensors({"weight": linear.weight.detach()})
        if key not in self._found or self._found[key][0] != content:
            if not self._keeps:
                self._found.clear()
            of = self._of(key, linear)
            moments = self._moments(of, linear) if of is not None and self.by_inputs else None
            rows = of.importance if of is not None and self.by_gradients else None
            self._found[key] = content, decompose_by_inputs(linear.weight, moments, rows)
        return self._found[key][1]

    def _of(self, key: MatrixKey, linear: nn.Linear) -> Statistics | None:
        found = self.statistics.get(key)
        return found.to(linear.weight.device) if found is not None else None

    @staticmethod
    def _moments(of: Statistics, linear: nn.Linear) -> Tensor:
        # A bias gives back what the factors leave out on average, so only what goes beyond that counts.
        return of.moments if linear.bias is None else of.covariance

    def losses(self, linears: Mapping[MatrixKey, nn.Linear]) -> dict[MatrixKey, Tensor]:
        """Return what each term of every matrix takes from the loss where it is left out, (min(out, in),)."""
        self._keeps, losses = True, {}
        for key, linear in linears.items():
            losses[key] = self._losses(key, linear)
            content, terms = self._found[key]
            # No rank is above the one from which on factors would save nothing.
            self._found[key] = content, terms.leading(math.ceil(1 / sum(1 / size for size in linear.weight.shape)))
        return losses

    def _losses(self, key: MatrixKey, linear: nn.Linear) -> Tensor:
        found, of = self.decomposition(key, linear), self._of(key, linear)
        if of is None or of.sensitivity is None:
            raise ValueError("what a rank is worth to the loss is not known: it needs gradients")
        moments = self._moments(of, linear)
        return (of.sensitivity.double() @ found.left.square()) * ((found.right @ moments.double()) * found.right).sum(1)

    def factors(self, key: MatrixKey, linear: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (out, rank) and B (rank, in), in the weight's type; on the meta device without values."""
        weight = linear.weight
        if weight.is_meta:
            return weight.new_empty(weight.shape[0], rank), weight.new_empty(rank, weight.shape[1])
        left, right = self.decomposition(key, linear).cut(rank)
        return left.to(weight.dtype), right.to(weight.dtype)

    def table_factors(self, table: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
        """Return A (vocabulary, rank) and B (rank, width) of a table; None where they are the SVD's.

        Of a language model nearly all of a table are rare tokens: to it the frequent ones are what counts.
        """
        if self.counts is None or table.is_meta:
            return None
        return factors_by_rows(table, self.counts.to(table.device) + 1.0, rank)

    def shift(self, key: MatrixKey, linear: nn.Linear, rank: int) -> Tensor | None:
        """Return the mean of what those factors leave out of the output, (out,), which a bias can give back."""
        if linear.weight.is_meta or not (self.by_inputs or self.by_gradients):
            return None
        of, weight = self._of(key, linear), linear.weight
        if of is None:
            return None
        left, right = self.decomposition(key, linear).cut(rank)
        mean = of.mean.double()
        return weight.detach().double() @ mean - left @ (right @ mean)
