"""Decomposing and contracting: exact for every matrix, in the gauge that was asked for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcli.errors import InputError
from kdcli.tensors.factors import MPOShape
from kdcli.tensors.mpo import auxiliary_indices, central_index, contract, decompose, rearrange, restore

SHAPES = [
    MPOShape((8, 6), (8, 6)),
    MPOShape((4, 1, 3), (6, 1, 4)),
    MPOShape((2, 3, 2), (2, 2, 3)),
    MPOShape((8, 1, 1, 1, 4), (4, 1, 1, 1, 4)),
    MPOShape((2, 2, 3, 2), (3, 1, 2, 2)),
    MPOShape((2, 2, 2, 1, 1, 3), (1, 3, 2, 2, 1, 2)),
    MPOShape((4, 4, 2, 1, 2, 3, 4), (2, 2, 1, 1, 2, 3, 2)),
    MPOShape((8, *(1,) * 9, 6), (4, *(1,) * 9, 4)),
    MPOShape((12, 1), (1, 10)),
]


def matrix(shape: MPOShape, kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape.matrix

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    if kind == "zero":
        return torch.zeros(rows, columns, dtype=torch.float64)
    if kind == "rank-1":
        return normal(rows, 1) @ normal(1, columns)
    if kind == "rank-3":
        return normal(rows, 3) @ normal(3, columns)
    if kind == "decaying":
        # Singular values of the rearranged matrix from 1 down to 1e-14: below and above every clamp.
        left, _, right = torch.linalg.svd(
            normal(
                shape.out_factors[0] * shape.in_factors[0],
                rows * columns // (shape.out_factors[0] * shape.in_factors[0]),
            ),
            full_matrices=False,
        )
        values = torch.logspace(0, -14, left.shape[1], dtype=torch.float64)
        return restore(left * values @ right, shape)
    return normal(rows, columns)


def relative_error(chain: tuple[Tensor, ...], weight: Tensor) -> float:
    return float((contract(chain) - weight).norm() / weight.norm().clamp(min=1e-30))


@pytest.mark.parametrize("gauge", ["symmetric", "left"])
@pytest.mark.parametrize("kind", ["random", "rank-1", "rank-3", "zero", "decaying"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contraction_undoes_decomposition(shape: MPOShape, kind: str, gauge: str):
    weight = matrix(shape, kind)
    chain = decompose(weight, shape, gauge=gauge)
    assert [tuple(tensor.shape) for tensor in chain] == shape.shapes()
    assert sum(tensor.numel() for tensor in chain) == shape.parameter_count()
    assert all(torch.isfinite(tensor).all() for tensor in chain)
    assert relative_error(chain, weight) < 1e-12
    assert relative_error(decompose(weight.float(), shape, gauge=gauge), weight.float()) < 1e-5
    single = decompose(weight.float(), shape, gauge=gauge, dtype=torch.float32)
    assert relative_error(single, weight.float()) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=5),
    st.integers(0, 2**31),
    st.sampled_from(["symmetric", "left"]),
)
def test_contraction_undoes_decomposition_for_any_lists(pairs: list[tuple[int, int]], seed: int, gauge: str):
    shape = MPOShape(tuple(i for i, _ in pairs), tuple(j for _, j in pairs))
    weight = matrix(shape, "random", seed)
    assert relative_error(decompose(weight, shape, gauge=gauge), weight) < 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensorly_contracts_our_chain_to_the_same_matrix(shape: MPOShape):
    from tensorly.tt_matrix import TTMatrix

    weight = matrix(shape, "random")
    theirs = TTMatrix([tensor.numpy() for tensor in decompose(weight, shape)]).to_matrix()
    np.testing.assert_allclose(theirs, weight.numpy(), atol=1e-12)


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 2], ids=str)
def test_the_sweep_is_tensorlys_tensor_train_matrix_up_to_signs(shape: MPOShape):
    from tensorly.decomposition import tensor_train_matrix

    weight = matrix(shape, "random")
    folded = weight.numpy().reshape(*shape.out_factors, *shape.in_factors)
    theirs = tensor_train_matrix(folded, rank=shape.bond_dims()).factors
    ours = decompose(weight, shape, gauge="left")
    for a, b in zip(ours, theirs, strict=True):
        assert tuple(a.shape) == b.shape
    # A bond of full dimension has degenerate vectors where a unitary is swept through; the first tensor has not.
    np.testing.assert_allclose(ours[0].abs().numpy(), np.abs(theirs[0]), atol=1e-8)
    np.testing.assert_allclose(contract(ours).numpy(), contract([torch.tensor(f) for f in theirs]).numpy(), atol=1e-12)


def test_rearranging_is_the_kronecker_order():
    shape = MPOShape((3, 2), (2, 4))
    a, b = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    weight = torch.kron(a, b)
    folded = rearrange(weight, shape)
    torch.testing.assert_close(folded.reshape(6, 8), a.reshape(6, 1) * b.reshape(1, 8))
    assert torch.equal(restore(folded, shape), weight)


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("kind", ["random", "rank-3", "zero"])
def test_middle_tensors_are_identities(kind: str, length: int):
    shape = MPOShape((8, *(1,) * length, 6), (6, *(1,) * length, 4))
    _, *middle, _ = decompose(matrix(shape, kind), shape)
    for tensor in middle:
        assert torch.equal(tensor[:, 0, 0, :], torch.eye(24, dtype=torch.float64))


def test_ends_share_the_singular_values_as_square_roots():
    shape = MPOShape((8, 1, 6), (6, 1, 4))
    weight = matrix(shape, "random")
    values = torch.linalg.svdvals(rearrange(weight, shape).reshape(48, 24))
    first, _, last = decompose(weight, shape)
    first, last = first.reshape(48, 24), last.reshape(24, 24)
    torch.testing.assert_close(first.T @ first, torch.diag(values))
    torch.testing.assert_close(last @ last.T, torch.diag(values))


@pytest.mark.parametrize("kind", ["random", "rank-3"])
def test_the_generic_path_gives_the_closed_form_up_to_signs_of_bonds(kind: str, monkeypatch: pytest.MonkeyPatch):
    shape = MPOShape((8, 1, 1, 6), (6, 1, 1, 4))
    weight = matrix(shape, kind)
    closed = decompose(weight, shape)
    monkeypatch.setattr(MPOShape, "is_chain_of_ones", property(lambda self: False))
    generic = decompose(weight, shape)
    rank = 24 if kind == "random" else int((closed[0].reshape(48, 24).norm(dim=0) > 1e-2).sum())
    assert rank > 3
    signs = [torch.ones(1, dtype=torch.float64)]
    for a, b in zip(closed, generic, strict=True):
        # Null directions are arbitrary in either.
        a, b = (x[: rank if x.shape[0] > 1 else 1, ..., : rank if x.shape[3] > 1 else 1] for x in (a, b))
        b = b * signs[-1][:, None, None, None]
        flip = torch.sign((a * b).sum(dim=(0, 1, 2))) if a.shape[3] > 1 else torch.ones(1, dtype=torch.float64)
        torch.testing.assert_close(a, b * flip, atol=1e-7, rtol=0)
        signs.append(flip)


def test_every_bond_of_the_generic_gauge_is_shared_equally():
    shape = MPOShape((4, 2, 3, 2), (2, 2, 2, 3))
    chain = decompose(matrix(shape, "random"), shape)
    for bond in range(1, len(chain)):
        left = contract_open(chain[:bond]).reshape(-1, shape.bond_dims()[bond])
        right = contract_open(chain[bond:]).reshape(shape.bond_dims()[bond], -1)
        torch.testing.assert_close(left.T @ left, right @ right.T, atol=1e-9, rtol=1e-9)


def contract_open(chain: tuple[Tensor, ...]) -> Tensor:
    product = chain[0]
    for tensor in chain[1:]:
        product = torch.tensordot(product, tensor, dims=1)
    return product


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decomposing_twice_gives_the_same_bits(shape: MPOShape):
    weight = matrix(shape, "random").float()
    for a, b in zip(decompose(weight, shape), decompose(weight.clone(), shape), strict=True):
        assert torch.equal(a, b)


def test_signs_do_not_depend_on_the_sign_that_the_solver_chose():
    shape = MPOShape((4, 4), (4, 4))
    weight = matrix(shape, "random")
    first, _ = decompose(weight, shape)
    columns = first.reshape(16, 16)
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("kind", ["zero", "rank-1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_null_directions_still_learn(shape: MPOShape, kind: str):
    chain = [t.clone().requires_grad_() for t in decompose(matrix(shape, kind), shape)]
    contract(chain).mul(matrix(shape, "random", 1)).sum().backward()
    grads = [t.grad for t in chain if t.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)
    last = chain[-1].grad
    assert last is not None
    # None is so small that the optimizer would not see it.
    sizes = last.reshape(last.shape[0], -1).norm(dim=1)
    assert sizes.min() > 1e-4 * sizes.max() > 0


@pytest.mark.parametrize(
    ("n", "index"), [(2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (8, 3), (9, 4), (10, 4), (11, 5), (12, 5)]
)
def test_the_central_tensor_is_in_the_middle(n: int, index: int):
    assert central_index(n) == index
    assert sorted((*auxiliary_indices(n), index)) == list(range(n))


def test_round_off_at_full_size_is_that_of_fp32():
    shape = MPOShape((32, 1, 1, 1, 24), (32, 1, 1, 1, 24))
    weight = 0.04 * torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    assert float((contract(decompose(weight, shape, dtype=torch.float32)) - weight).abs().max()) < 1e-6


def test_a_matrix_with_nan_is_refused():
    weight = torch.ones(4, 4)
    weight[1, 2] = math.nan
    with pytest.raises(InputError, match="NaN"):
        decompose(weight, MPOShape((2, 2), (2, 2)))


def test_lists_of_another_matrix_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        decompose(torch.ones(4, 9), MPOShape((3, 2), (2, 3)))


def test_types_and_places_are_kept():
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    assert {t.dtype for t in decompose(weight, MPOShape((2, 2), (2, 2)))} == {torch.bfloat16}
    meta = decompose(weight.to("meta"), MPOShape((2, 1, 2), (2, 1, 2)))
    assert all(t.is_meta for t in meta) and [tuple(t.shape) for t in meta] == [(1, 2, 2, 4), (4, 1, 1, 4), (4, 2, 2, 1)]
