"""How the two sides of a matrix are split into factors, and what a chain of such tensors costs."""

import math
from dataclasses import dataclass

from kdcli.errors import InputError

TABLE = {
    192: (24, 8), 256: (16, 16), 312: (24, 13), 384: (24, 16), 448: (32, 14), 512: (32, 16), 576: (32, 18),
    640: (32, 20), 768: (32, 24), 1024: (32, 32), 1200: (40, 30), 1280: (40, 32), 1536: (48, 32),
    1344: (48, 28), 1728: (54, 32), 1792: (56, 32), 2048: (64, 32), 2304: (64, 36), 3072: (64, 48), 4096: (64, 64),
}  # fmt: skip
"""Published factor pairs (OPDF, appendix) and the ones that continue their pattern."""


@dataclass(frozen=True)
class MPOShape:
    """Factor lists of a matrix (out, in): prod(out_factors) = out, prod(in_factors) = in."""

    out_factors: tuple[int, ...]
    in_factors: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.out_factors) != len(self.in_factors) or len(self.out_factors) < 2:
            raise InputError(
                f"factor lists must have equal lengths of at least 2, not {list(self.out_factors)} and "
                f"{list(self.in_factors)}",
                where="overparam.factors",
            )

    def __len__(self) -> int:
        return len(self.out_factors)

    @property
    def length(self) -> int:
        """L: the number of tensors between the first and the last."""
        return len(self) - 2

    @property
    def matrix(self) -> tuple[int, int]:
        """(out features, in features)"""
        return math.prod(self.out_factors), math.prod(self.in_factors)

    @property
    def is_chain_of_ones(self) -> bool:
        """True for [a, 1, ..., 1, b] on both sides: the closed form applies."""
        return all(i == j == 1 for i, j in zip(self.out_factors[1:-1], self.in_factors[1:-1], strict=True))

    def bond_dims(self) -> tuple[int, ...]:
        """Return d_0..d_n without truncation: d_k = min(product left of the bond, product right of it)."""
        sizes = [i * j for i, j in zip(self.out_factors, self.in_factors, strict=True)]
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1))

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Return the shape (d_{k-1}, i_k, j_k, d_k) of every tensor."""
        bonds = self.bond_dims()
        return [(bonds[k], self.out_factors[k], self.in_factors[k], bonds[k + 1]) for k in range(len(self))]

    def parameter_count(self) -> int:
        """Return N(W) = sum_k i_k j_k d_{k-1} d_k."""
        return sum(math.prod(shape) for shape in self.shapes())


def auto_factors(dimension: int) -> tuple[int, int]:
    """Return a >= b with a b = dimension: from the table, else the pair closest to a square with a / b <= 4.

    Raises InputError when there is none (prime and nearly prime dimensions).
    """
    if dimension in TABLE:
        return TABLE[dimension]
    for b in range(math.isqrt(dimension), 0, -1):
        if dimension % b == 0:
            a = dimension // b
            if a <= 4 * b:
                return a, b
            break
    b = next(b for b in range(math.isqrt(dimension), 0, -1) if dimension % b == 0)
    raise InputError(
        f"{dimension} cannot be split into two factors of similar size",
        where="overparam",
        hint=f"give the factors of {dimension} yourself (overparam.factors, [{dimension // b}, {b}] for example), use "
        'factorization "svd-plain", or leave such matrices out (overparam.targets, overparam.layers)',
    )


def length_for_scale(shape: tuple[int, int], scale: float) -> int:
    """Return L so that a chain [a, 1^L, b] holds about `scale` times the matrix's weights."""
    (a, b), (c, d) = auto_factors(shape[0]), auto_factors(shape[1])
    large, small = max(a * c, b * d), min(a * c, b * d)
    return max(0, round((scale - 1) * large / small - 1))
