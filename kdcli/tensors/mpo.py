"""Matrix product operators: a matrix as a chain of 4-way tensors, and back (OPDF, section 3; MPOP, section 2)."""

import torch
from torch import Tensor

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


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD with a sign of its own choosing taken away: the largest entry of each left vector is positive."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    largest = left.abs().argmax(dim=0)
    signs = torch.sign(left[largest, torch.arange(left.shape[1], device=left.device)])
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return left * signs, values, right * signs[:, None]


def decompose(
    weight: Tensor, shape: MPOShape, *, gauge: str = "symmetric", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Return the untruncated chain of `weight` (out, in): tensors (d_{k-1}, i_k, j_k, d_k), in `weight`'s type.

    gauge "symmetric" shares every bond's singular values equally between its two sides, so that for factor
    lists [a, 1^L, b] all middle tensors are identities; "left" keeps the raw sweep's left-orthogonal tensors.
    The result is deterministic: computed in `dtype` on the CPU, with fixed signs.
    Source: OPDF (arXiv 2411.06448), section 3 and its released normalisation.
    """
    origin = weight
    matrix = rearrange(weight.detach().to(device="cpu" if not weight.is_meta else "meta", dtype=dtype), shape)
    if gauge == "symmetric" and shape.is_chain_of_ones:
        chain = _closed_form(matrix, shape)
    else:
        chain = _sweep(matrix, shape)
        if gauge == "symmetric":
            chain = _symmetric_gauge(chain)
    return tuple(tensor.to(device=origin.device, dtype=origin.dtype).contiguous() for tensor in chain)


def _closed_form(tensor: Tensor, shape: MPOShape) -> list[Tensor]:
    """[a, 1^L, b]: one SVD, U sqrt(s) and sqrt(s) Vt at the ends, identities between."""
    (i1, *_, i2), (j1, *_, j2) = shape.out_factors, shape.in_factors
    left, values, right = _svd(tensor.reshape(i1 * j1, i2 * j2))
    root, rank = values.sqrt(), len(values)
    middle = [
        torch.eye(rank, dtype=tensor.dtype, device=tensor.device).reshape(rank, 1, 1, rank)
        for _ in range(len(shape) - 2)
    ]
    return [(left * root).reshape(1, i1, j1, rank), *middle, (root[:, None] * right).reshape(rank, i2, j2, 1)]


def _sweep(tensor: Tensor, shape: MPOShape) -> list[Tensor]:
    """One pass of SVDs from left to right; every bond keeps its full dimension, zeros included."""
    bonds = shape.bond_dims()
    chain, rest = [], tensor.reshape(1, -1)
    for k in range(len(shape) - 1):
        i, j = shape.out_factors[k], shape.in_factors[k]
        left, values, right = _svd(rest.reshape(bonds[k] * i * j, -1))
        rank = bonds[k + 1]
        chain.append(left[:, :rank].reshape(bonds[k], i, j, rank))
        rest = values[:rank, None] * right[:rank]
    chain.append(rest.reshape(bonds[-2], shape.out_factors[-1], shape.in_factors[-1], 1))
    return chain


def _symmetric_gauge(chain: list[Tensor]) -> list[Tensor]:
    """Share each bond's singular values as square roots between its sides (Vidal's form).

    At bond k, L_k R_k = U lam V for the left and right environments; the pair p = R V^T lam^-1/2 and
    q = lam^-1/2 U^T L is inserted, with p q = 1. Singular values are clamped at 1e-6 of the largest: the
    clamped directions carry nothing, so the contraction is unchanged. A zero matrix keeps its gauge.
    """
    n = len(chain)
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    environment = torch.ones(1, 1, dtype=chain[0].dtype)
    for tensor in chain[:-1]:
        merged = torch.einsum("ab,bijc->aijc", environment, tensor).reshape(-1, tensor.shape[-1])
        environment = torch.linalg.qr(merged).R
        lefts.append(environment)
    environment = torch.ones(1, 1, dtype=chain[0].dtype)
    for tensor in reversed(chain[1:]):
        merged = torch.einsum("aijb,bc->aijc", tensor, environment).reshape(tensor.shape[0], -1)
        environment = torch.linalg.qr(merged.T).R.T
        rights.insert(0, environment)
    gauged = list(chain)
    for k in range(n - 1):
        left, values, right = _svd(lefts[k] @ rights[k])
        if values.numel() == 0 or values[0] == 0:
            continue
        scale = values.clamp(min=1e-6 * values[0]).rsqrt()
        p = rights[k] @ right.T * scale
        q = scale[:, None] * (left.T @ lefts[k])
        gauged[k] = torch.einsum("aijb,bc->aijc", gauged[k], p)
        gauged[k + 1] = torch.einsum("ab,bijc->aijc", q, gauged[k + 1])
    return gauged


def contract(chain: tuple[Tensor, ...] | list[Tensor], shape: MPOShape | None = None) -> Tensor:
    """Return the matrix (out, in) that a chain of tensors (d_{k-1}, i_k, j_k, d_k) multiplies to."""
    shape = shape or MPOShape(tuple(t.shape[1] for t in chain), tuple(t.shape[2] for t in chain))
    product = chain[-1].reshape(chain[-1].shape[0], -1)
    for tensor in reversed(chain[:-1]):
        product = (tensor.reshape(-1, tensor.shape[-1]) @ product).reshape(tensor.shape[0], -1)
    return restore(product, shape)
