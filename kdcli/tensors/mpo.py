"""Matrix product operators: a matrix as a chain of 4-way tensors, and back (OPDF, section 3; MPOP, 2)."""

import torch
from torch import Tensor

from kdcli.errors import InputError
from kdcli.tensors.factors import MPOShape


def central_index(n: int) -> int:
    """Return the 0-based place of the central tensor of a chain of n: floor((n - 1) / 2)."""
    return (n - 1) // 2


def auxiliary_indices(n: int) -> tuple[int, ...]:
    """Return the places of all other tensors, whose job it is to follow the teacher's."""
    return tuple(k for k in range(n) if k != central_index(n))


def rearrange(weight: Tensor, shape: MPOShape) -> Tensor:
    """Return `weight` (out, in) with its axes in the order i1 j1 i2 j2 ... in jn."""
    n = len(shape)
    axes = [axis for k in range(n) for axis in (k, n + k)]
    return weight.reshape(*shape.out_factors, *shape.in_factors).permute(axes).contiguous()


def restore(tensor: Tensor, shape: MPOShape) -> Tensor:
    """Return the matrix (out, in) from a tensor whose axes are i1 j1 i2 j2 ... in jn in row-major order."""
    n = len(shape)
    sizes = [s for pair in zip(shape.out_factors, shape.in_factors, strict=True) for s in pair]
    axes = [2 * k for k in range(n)] + [2 * k + 1 for k in range(n)]
    return tensor.reshape(sizes).permute(axes).reshape(shape.matrix)


def signed_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD U, s, V^T with fixed signs: the largest entry of each left vector is positive."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    signs = torch.sign(left.gather(0, left.abs().argmax(dim=0, keepdim=True)))
    signs = torch.where(signs == 0, 1.0, signs)
    return left * signs, values, right * signs.T


def decompose(
    weight: Tensor, shape: MPOShape, *, gauge: str = "symmetric", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Return the untruncated chain of `weight` (out, in): tensors (d_{k-1}, i_k, j_k, d_k), in its type.

    gauge "symmetric" shares every bond's singular values equally between its two sides, so that for factor
    lists [a, 1^L, b] all middle tensors are identities; "left" keeps the raw sweep's left-orthogonal tensors.
    The result is deterministic: computed in `dtype` on the CPU, with fixed signs. A weight on the meta device
    gives tensors there. Raises InputError when the weight holds NaN or infinity.
    Source: OPDF (arXiv 2411.06448), section 3 and its released normalisation.
    """
    if tuple(weight.shape) != shape.matrix:
        raise ValueError(f"factor lists of {shape.matrix} do not fit a matrix of {tuple(weight.shape)}")
    if weight.is_meta:
        return tuple(torch.empty(s, dtype=weight.dtype, device="meta") for s in shape.shapes())
    matrix = rearrange(weight.detach().to(device="cpu", dtype=dtype), shape)
    if not bool(torch.isfinite(matrix).all()):
        raise InputError("a weight matrix holds NaN or infinity", hint="the model's training has diverged")
    if gauge == "symmetric" and shape.is_chain_of_ones:
        chain = _closed_form(matrix, shape)
    else:
        chain = _sweep(matrix, shape)
        if gauge == "symmetric":
            chain = _symmetric_gauge(chain)
    return tuple(tensor.to(device=weight.device, dtype=weight.dtype).contiguous() for tensor in chain)


def _shares(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return how singular values are shared between the sides of a bond: two vectors whose product they are.

    Both are square roots, except in the null directions, where the left side is not zero: two zeros would
    get no gradient, ever, and a matrix of zeros would stay one. For a zero matrix the left side is 1.
    """
    largest = float(values.max())
    if largest == 0.0:
        return torch.ones_like(values), values
    root = values.clamp(min=1e-6 * largest).sqrt()
    return root, values / root


def _closed_form(tensor: Tensor, shape: MPOShape) -> list[Tensor]:
    """[a, 1^L, b]: one SVD, U sqrt(s) and sqrt(s) V^T at the ends, identities between."""
    (i1, *_, i2), (j1, *_, j2) = shape.out_factors, shape.in_factors
    left, values, right = signed_svd(tensor.reshape(i1 * j1, i2 * j2))
    near, far = _shares(values)
    rank = len(values)
    middle = [torch.eye(rank, dtype=tensor.dtype).reshape(rank, 1, 1, rank) for _ in range(len(shape) - 2)]
    return [(left * near).reshape(1, i1, j1, rank), *middle, (far[:, None] * right).reshape(rank, i2, j2, 1)]


def _sweep(tensor: Tensor, shape: MPOShape) -> list[Tensor]:
    """One pass of SVDs from left to right; every bond keeps its full dimension, zeros included."""
    bonds = shape.bond_dims()
    chain, rest = [], tensor.reshape(1, -1)
    for k in range(len(shape) - 1):
        i, j = shape.out_factors[k], shape.in_factors[k]
        left, values, right = signed_svd(rest.reshape(bonds[k] * i * j, -1))
        chain.append(left.reshape(bonds[k], i, j, bonds[k + 1]))
        rest = values[:, None] * right
    chain.append(rest.reshape(bonds[-2], shape.out_factors[-1], shape.in_factors[-1], 1))
    return chain


def _symmetric_gauge(chain: list[Tensor]) -> list[Tensor]:
    """Share each bond's singular values between its sides (Vidal's form), for a left-orthogonal chain.

    Left of bond k all is orthonormal, so the right environment R_k = U lam V^T alone holds its singular values.
    The pair p = U near and q = near^-1 U^T is inserted, where near is sqrt(lam), clamped: p q = 1 exactly,
    whatever lam is, so the contraction is unchanged. (The released p = R V^T lam^-1/2 is the same where lam is
    not clamped, and infinite for a zero matrix.)
    """
    environment = torch.ones(1, 1, dtype=chain[0].dtype)
    gauged = list(chain)
    for k in reversed(range(len(chain) - 1)):
        tensor = chain[k + 1]
        merged = torch.einsum("aijb,bc->aijc", tensor, environment).reshape(tensor.shape[0], -1)
        environment = torch.linalg.qr(merged.T).R.T
        left, values, _ = signed_svd(environment)
        near, _ = _shares(values)
        gauged[k] = torch.einsum("aijb,bc->aijc", gauged[k], left * near)
        gauged[k + 1] = torch.einsum("ab,bijc->aijc", left.T / near[:, None], gauged[k + 1])
    return gauged


def contract(chain: tuple[Tensor, ...] | list[Tensor], shape: MPOShape | None = None) -> Tensor:
    """Return the matrix (out, in) that a chain of tensors (d_{k-1}, i_k, j_k, d_k) multiplies to."""
    shape = shape or MPOShape(tuple(t.shape[1] for t in chain), tuple(t.shape[2] for t in chain))
    product = chain[-1].reshape(chain[-1].shape[0], -1)
    for tensor in reversed(chain[:-1]):
        product = (tensor.reshape(-1, tensor.shape[-1]) @ product).reshape(tensor.shape[0], -1)
    return restore(product, shape)
