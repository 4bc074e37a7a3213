"""What rows say about a model's matrices, against plain loops over examples without any padding."""

import copy
from collections.abc import Callable

import pytest
import torch
from families import tiny, tokenizer
from torch import Tensor, nn
from torch.nn import functional
from training.stages import rows
from transformers import PreTrainedModel

from kdcli.models.blocks import iter_block_matrices
from kdcli.models.finite import NotFiniteError
from kdcli.models.inputs import model_inputs
from kdcli.models.statistics import collect_statistics, from_tensors, to_tensors
from kdcli.tasks.encode import Collator

ROWS = 10


def batches(size: int) -> list[dict[str, Tensor]]:
    """Return all rows in batches of `size`, padded to a common length."""
    data, collator = list(rows(ROWS)), Collator(tokenizer())
    return [collator(data[start : start + size]) for start in range(0, ROWS, size)]


def loss_of(model: PreTrainedModel) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda batch: functional.cross_entropy(model(**model_inputs(model, batch)).logits, batch["labels"])


def plain(model: PreTrainedModel) -> dict[tuple[int, str], tuple[Tensor, ...]]:
    """Return mean, covariance, importance and sensitivity of every matrix, one example after the other."""
    layers: dict[tuple[int, str], nn.Linear] = {key: matrix.module for key, matrix in iter_block_matrices(model)}
    inputs: dict[tuple[int, str], list[Tensor]] = {key: [] for key in layers}
    outputs: dict[tuple[int, str], list[Tensor]] = {key: [] for key in layers}
    hooks = []
    for key, layer in layers.items():

        def note(_: nn.Module, given: tuple[Tensor], output: Tensor, key: tuple[int, str] = key) -> None:
            inputs[key].append(given[0].detach()[0])
            outputs[key].append(output)

        hooks.append(layer.register_forward_hook(note))
    importance = {key: torch.zeros(layer.out_features) for key, layer in layers.items()}
    sensitivity = {key: torch.zeros(layer.out_features) for key, layer in layers.items()}
    for padded in batches(1):
        length = int(padded["attention_mask"].sum())
        batch = {name: values[:, :length] if values.ndim > 1 else values for name, values in padded.items()}
        loss = loss_of(model)(batch)
        wanted = [*(layer.weight for layer in layers.values()), *(outputs[key][-1] for key in layers)]
        gradients = torch.autograd.grad(loss, wanted)
        for number, key in enumerate(layers):
            importance[key] += gradients[number].square().sum(1)
            sensitivity[key] += gradients[len(layers) + number][0].square().sum(0) / ROWS
    for hook in hooks:
        hook.remove()
    found = {}
    for key in layers:
        x = torch.cat(inputs[key]).double()
        found[key] = (x.mean(0), torch.cov(x.T, correction=0), importance[key], sensitivity[key])
    return found


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("size", [4, 10])
def test_they_are_those_of_plain_loops_over_real_tokens(family: str, size: int):
    model = tiny(family)
    expected = plain(model)
    before = copy.deepcopy(model.state_dict())
    found = collect_statistics(model, batches(size), loss_of(model))
    assert found.keys() == expected.keys()
    for key, (mean, covariance, importance, sensitivity) in expected.items():
        of = found[key]
        torch.testing.assert_close(of.mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of.covariance.double(), covariance, rtol=1e-3, atol=1e-4)
        moments = covariance + torch.outer(mean, mean)
        torch.testing.assert_close(of.moments, moments, rtol=1e-3, atol=1e-4)
        assert of.importance is not None and of.sensitivity is not None
        torch.testing.assert_close(of.importance, importance, rtol=1e-3, atol=1e-3 * float(importance.max()))
        torch.testing.assert_close(of.sensitivity, sensitivity, rtol=1e-3, atol=1e-3 * float(sensitivity.max()))
    # The model is left as it was.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_loss_only_inputs_are_looked_at_and_one_block_can_be_asked_for():
    model = tiny("bert")
    every, second = collect_statistics(model, batches(4)), collect_statistics(model, batches(4), layer=2)
    assert {key for key in every if key[0] == 2} == second.keys()
    for key, of in second.items():
        assert of.importance is None and of.sensitivity is None
        assert torch.equal(of.covariance, every[key].covariance) and torch.equal(of.mean, every[key].mean)


def test_they_come_back_from_tensors_and_inputs_of_several_matrices_are_kept_once():
    model = tiny("bert")
    found = collect_statistics(model, batches(4), loss_of(model))
    tensors = to_tensors(found)
    assert sum(name.endswith(".covariance") for name in tensors) == 2 * 4
    again = from_tensors(tensors)
    assert again.keys() == found.keys()
    for key, of in found.items():
        for name in ("mean", "covariance", "importance", "sensitivity"):
            assert torch.equal(getattr(again[key], name), getattr(of, name))


def test_numbers_that_are_none_are_told():
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"3 matrices .*first: block 2, attention_output"):
        collect_statistics(model, batches(4))
