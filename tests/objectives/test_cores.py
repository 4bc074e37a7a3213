"""The tensor objective: zero for equal weights, and a gradient for the auxiliary tensors alone."""

import pytest
import torch
from chains import factors_of
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from kdcli.models.overparam import overparameterise, teacher_factors
from kdcli.objectives.cores import TensorObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import Signals
from kdcli.tensors.mpo import central_index


def tiny(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


def value(objective: TensorObjective, student: dict, teacher: dict) -> torch.Tensor:
    mask = torch.ones(1, 1)
    return objective(Signals(mask, 1, factors=student), Signals(mask, 1, factors=teacher), {})


def of_one(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    key = (1, "query")
    return value(TensorObjective(), {key: tuple(student)}, {key: tuple(teacher)})


@pytest.mark.parametrize(
    "section",
    [
        OverparamSection(length=3),
        OverparamSection(factorization="svd"),
        OverparamSection(length=1, gauge="left"),
        OverparamSection(factors={"32": [4, 2, 4], "64": [4, 4, 4]}),
    ],
    ids=lambda s: str(s.model_dump(exclude_defaults=True)),
)
def test_zero_exactly_for_the_teachers_own_weights(section: OverparamSection):
    teacher, student = tiny(0), tiny(0)
    overparameterise(student, section)
    found, _ = teacher_factors(teacher, student, [(1, 1), (2, 2)], section)
    assert value(TensorObjective(), factors_of(student), found).item() == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_the_gradient_reaches_auxiliary_tensors_only(length: int, reduction: str):
    section = OverparamSection(length=length)
    teacher, student = tiny(0), tiny(1)
    overparameterise(student, section)
    found, _ = teacher_factors(teacher, student, [(1, 1), (2, 2)], section)
    found = {key: tuple(t.requires_grad_() for t in chain) for key, chain in found.items()}
    loss = value(TensorObjective(reduction), factors_of(student), found)
    assert loss.dtype == torch.float32 and loss.item() > 0
    # Middle tensors start as the teacher's (identities): their gradient is zero until they have moved.
    with torch.no_grad():
        for chain in factors_of(student).values():
            for tensor in chain:
                tensor.add_(0.01)
    value(TensorObjective(reduction), factors_of(student), found).backward()
    for key, chain in factors_of(student).items():
        for k, tensor in enumerate(chain):
            if k == central_index(len(chain)):
                assert tensor.grad is None
            else:
                assert tensor.grad is not None and tensor.grad.abs().max() > 0
        assert all(t.grad is None for t in found[key])
    assert all("parametrizations" in n for n, p in student.named_parameters() if p.grad is not None)


def test_the_value_is_the_formula():
    student = [torch.full((1, 2, 2, 4), 1.0), torch.full((4, 1, 1, 4), 9.0), torch.full((4, 2, 2, 1), 2.0)]
    teacher = [torch.full((1, 2, 2, 4), 4.0), torch.zeros(4, 1, 1, 4), torch.full((4, 2, 2, 1), 3.0)]
    assert of_one(student, teacher).item() == pytest.approx((3.0**2 + 1.0**2) / 2)
    chains = {(1, "query"): tuple(student), (1, "key"): tuple(student)}
    targets = {(1, "query"): tuple(teacher), (1, "key"): tuple(student)}
    assert value(TensorObjective("mean"), chains, targets).item() == pytest.approx(2.5)
    assert value(TensorObjective("sum"), chains, targets).item() == pytest.approx(5.0)


def test_chains_without_a_teacher_do_not_count():
    student = [torch.ones(1, 2, 2, 4), torch.ones(4, 2, 2, 1)]
    chains = {(1, "query"): tuple(student), (2, "query"): tuple(student)}
    targets = {(1, "query"): tuple(2 * t for t in student)}
    assert value(TensorObjective(), chains, targets).item() == pytest.approx(1.0)


def test_wider_bonds_are_compared_on_leading_blocks():
    student, teacher = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 6)
    central = torch.zeros(4, 1, 1, 4), torch.zeros(6, 1, 1, 6)
    last = torch.randn(4, 2, 2, 1), torch.randn(6, 3, 2, 1)  # other factors: left out
    loss = of_one([student, central[0], last[0]], [teacher, central[1], last[1]])
    torch.testing.assert_close(loss, (student - teacher[..., :4]).square().mean())
    # And the other way round: the rest of the student's block is free.
    teacher, student = student, teacher.requires_grad_()
    chains = [student, central[1], last[1]], [teacher, central[0], last[0]]
    (found,) = torch.autograd.grad(3.0 * of_one(*chains), student)
    (expected,) = torch.autograd.grad(3.0 * (student[..., :4] - teacher).square().mean(), student)
    torch.testing.assert_close(found, expected)


def test_chains_with_nothing_in_common_cannot_be_compared():
    with pytest.raises(ValueError, match="same factors"):
        of_one([torch.ones(1, 2, 2, 4), torch.ones(4, 2, 2, 1)], [torch.ones(1, 3, 2, 4), torch.ones(4, 3, 2, 1)])


def test_reading_factors_needs_no_forward_pass():
    objective = TensorObjective()
    assert objective.student_request().factors and objective.teacher_request().factors
    assert not objective.student_request().hidden and not objective.student_request().matrices
    assert list(objective.parameters()) == []
