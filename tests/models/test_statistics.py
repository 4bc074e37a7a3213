"""Statistics of block matrices: against sums row by row, whatever the padding and the batches."""

from collections.abc import Callable

import pytest
import torch
from families import NAMES, matrices, tiny
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from kdcli.models.blocks import iter_block_matrices
from kdcli.models.finite import NotFiniteError
from kdcli.models.inputs import model_inputs
from kdcli.models.statistics import Batch, Statistics, collect_statistics, from_tensors, to_tensors

LENGTHS = (5, 9, 12, 7)


def rows() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randint(5, 200, (length,)) for length in LENGTHS]


def batch_of(given: list[Tensor], width: int) -> dict[str, Tensor]:
    """Return rows, padded to `width`; their labels are their lengths modulo 2."""
    ids, mask = torch.zeros(len(given), width, dtype=torch.long), torch.zeros(len(given), width, dtype=torch.long)
    for number, row in enumerate(given):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([len(row) % 2 for row in given])}


def loss_of(model: PreTrainedModel) -> Callable[[Batch], Tensor]:
    return lambda batch: cross_entropy(model(**model_inputs(model, batch)).logits, batch["labels"])


@pytest.mark.parametrize("family", NAMES)
def test_sums_are_those_of_rows_one_by_one(family: str):
    model = tiny(family)
    found = collect_statistics(model, [batch_of(rows(), 16)], loss_of(model))
    assert len(found) == matrices(family)
    for key, matrix in iter_block_matrices(model):
        inputs: list[Tensor] = []
        squares = torch.zeros(matrix.weight.shape[0], dtype=torch.float64)
        hook = matrix.module.register_forward_hook(lambda module, given, output, inputs=inputs: inputs.append(given[0]))
        for row in rows():
            gradient = torch.autograd.grad(loss_of(model)(batch_of([row], len(row))), [matrix.module.weight])[0]
            of = gradient.chunk(len(matrix.names), 0)[matrix.names.index(matrix.name)] if matrix.is_fused else gradient
            squares += of.double().square().sum(1)
        hook.remove()
        tokens = torch.cat([given.reshape(-1, given.shape[-1]) for given in inputs]).detach().double()
        torch.testing.assert_close(found[key].mean.double(), tokens.mean(0), atol=1e-5, rtol=1e-4)
        covariance = torch.cov(tokens.T, correction=0)
        scale = float(covariance.abs().max())
        torch.testing.assert_close(found[key].covariance.double() / scale, covariance / scale, atol=1e-5, rtol=1e-4)
        importance = found[key].importance
        assert importance is not None
        largest = float(squares.max())
        torch.testing.assert_close(importance.double() / largest, squares / largest, atol=1e-4, rtol=1e-3)


def close(left: dict, right: dict) -> None:
    for key in left:
        for name in ("mean", "covariance", "importance", "sensitivity"):
            a, b = getattr(left[key], name), getattr(right[key], name)
            size = float(a.abs().max())
            torch.testing.assert_close(a / size, b / size, atol=1e-4, rtol=1e-3)


def test_neither_padding_nor_batches_nor_frozen_weights_matter():
    model = tiny("bert")
    found = collect_statistics(model, [batch_of(rows(), 12)], loss_of(model))
    close(found, collect_statistics(model, [batch_of(rows(), 24)], loss_of(model)))
    close(found, collect_statistics(model, [batch_of([row], 16) for row in rows()], loss_of(model)))
    model.requires_grad_(False)
    close(found, collect_statistics(model, [batch_of(rows(), 12)], loss_of(model)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_block_alone_and_no_gradients_without_a_loss():
    model = tiny("bert")
    every, one = (
        collect_statistics(model, [batch_of(rows(), 12)]),
        collect_statistics(model, [batch_of(rows(), 12)], layer=2),
    )
    assert set(one) == {key for key in every if key[0] == 2}
    for key, of in one.items():
        assert torch.equal(of.covariance, every[key].covariance) and of.importance is of.sensitivity is None


def test_numbers_that_are_none_are_refused():
    model = tiny("bert")
    with pytest.raises(NotFiniteError, match="training rows say about 12 matrices contains NaN or inf"):
        collect_statistics(model, [batch_of(rows(), 12)], lambda batch: loss_of(model)(batch) * float("nan"))


def test_tensors_and_back_share_what_matrices_of_one_input_share():
    model = tiny("bert")
    found = collect_statistics(model, [batch_of(rows(), 12)], loss_of(model))
    tensors = to_tensors(found)
    # Query, key and value have one input: 4 covariances a block.
    assert sum(name.endswith(".covariance") for name in tensors) == 8
    back = from_tensors(tensors)
    assert back[(1, "key")].covariance is back[(1, "query")].covariance
    for key, of in found.items():
        for name in Statistics.__dataclass_fields__:
            assert torch.equal(getattr(back[key], name), getattr(of, name)), (key, name)
