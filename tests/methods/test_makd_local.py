"""MaKD's matrices on the teacher's inputs: each learns alone, and its best factors are known in closed form."""

import copy
from collections.abc import Callable

import pytest
import torch
from families import NAMES, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcli.methods import registry
from kdcli.methods.base import Context, Stage
from kdcli.methods.layer_maps import uniform
from kdcli.models.blocks import iter_block_matrices
from kdcli.models.capture import Capture
from kdcli.models.inputs import model_inputs
from kdcli.models.lowrank import LowRankLinear
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.signals import MatrixKey, Request
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.training.step import Distiller

LENGTHS = (5, 9, 2, 7)
RANK = 4


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 200, (len(LENGTHS), 10), generator=torch.Generator().manual_seed(7))
    mask = (torch.arange(10) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def teacher_of(family: str = "bert") -> PreTrainedModel:
    teacher = tiny(family)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return teacher


def student_of(teacher: PreTrainedModel, rank: int | None = RANK) -> PreTrainedModel:
    """A low-rank student; without a rank its factors are of full rank."""
    student = copy.deepcopy(teacher)
    for _, matrix in list(iter_block_matrices(student)):
        linear = matrix.linear()
        assert isinstance(linear, nn.Linear)
        matrix.replace(LowRankLinear.from_linear(linear, rank or min(linear.weight.shape)))
    return student


def factors_of(student: PreTrainedModel) -> dict[MatrixKey, LowRankLinear]:
    found = {key: matrix.module for key, matrix in iter_block_matrices(student)}
    assert all(isinstance(module, LowRankLinear) for module in found.values())
    return found  # type: ignore[return-value]


def stages(teacher: PreTrainedModel, student: PreTrainedModel, **options: object) -> list[Stage]:
    method, (theirs, own) = registry.get("makd"), (shape_of(model.config) for model in (teacher, student))
    where = Context(theirs, own, "low-rank", CLASSIFICATION, uniform(own.layers, theirs.layers))
    chosen = method.options.model_validate(options)
    method.check(chosen, where)
    return method.build(chosen, where)


def local_loss(student: PreTrainedModel, teacher: PreTrainedModel, **options: object) -> Tensor:
    """The loss of the first of several stages, in a training step."""
    first = stages(teacher, student, schedule="staged", **options)[0]
    distiller = Distiller(student, first.terms, teacher=teacher, kind=CLASSIFICATION)
    distiller.train()
    try:
        loss: Tensor = distiller(batch())["loss"]
    finally:
        distiller.close()
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", NAMES)
def test_full_rank_has_nothing_to_learn_and_a_lower_rank_has(family: str):
    teacher = teacher_of(family)
    assert local_loss(student_of(teacher, None), teacher).item() < 1e-8
    assert local_loss(student_of(teacher), teacher).item() > 1e-2


@pytest.mark.parametrize("family", NAMES)
def test_only_the_factors_learn_from_one_pass_of_the_teacher_and_none_of_the_student(family: str):
    teacher, runs = teacher_of(family), []
    student = student_of(teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        model.base_model.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    found = gradients(student, local_loss(student, teacher))
    inside = {
        f"{path}.{name}"
        for path, module in student.named_modules()
        if isinstance(module, LowRankLinear)
        for name, _ in module.named_parameters()
    }
    assert set(found) == inside and all(gradient.abs().max() > 0 for gradient in found.values())
    assert runs == ["teacher"] and all(parameter.grad is None for parameter in teacher.parameters())


def inputs_of(teacher: PreTrainedModel) -> dict[MatrixKey, list[Tensor]]:
    """The inputs of every matrix of the teacher, by plain hooks: several where a block is run again and again."""
    found: dict[MatrixKey, list[Tensor]] = {}
    handles = []
    for key, matrix in iter_block_matrices(teacher):
        keep: Callable = lambda _, inputs, key=key: found.setdefault(key, []).append(inputs[0])  # noqa: E731
        handles.append(matrix.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        teacher(**model_inputs(teacher, batch()))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_the_closed_form_is_where_the_gradient_is_zero(family: str, norm: bool):
    teacher = teacher_of(family).double()
    student = student_of(teacher)
    start = gradients(student, local_loss(student, teacher, matrix_norm=norm))
    mask = batch()["attention_mask"].double()
    dense, inputs = dict(iter_block_matrices(teacher)), inputs_of(teacher)
    for key, factored in factors_of(student).items():
        weight, linear = dense[key].weight.detach(), dense[key].linear()
        second = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for x in inputs[key]:
            tokens = mask / mask.sum(1, keepdim=True)
            if norm:
                size = (linear(x).detach().square().mean(-1) * tokens).sum(1, keepdim=True)
                tokens = tokens / size
            second += torch.einsum("bs,bsi,bsj->ij", tokens, x, x)
        leading = torch.linalg.eigh(weight @ second @ weight.T).eigenvectors[:, -RANK:]
        with torch.no_grad():
            factored.up.weight.copy_(leading)
            factored.down.weight.copy_(leading.T @ weight)
    end = gradients(student, local_loss(student, teacher, matrix_norm=norm))
    weights = [name for name in end if name.endswith(("up.weight", "down.weight"))]
    assert len(weights) == 2 * len(dense)
    # The terms are formed in fp32.
    assert max(float(end[name].abs().max()) for name in weights) < 2e-5 * max(
        float(start[n].abs().max()) for n in start
    )


def test_the_value_is_the_relative_error_of_every_matrix_on_the_teachers_input():
    teacher = teacher_of()
    student = student_of(teacher)
    dense, inputs, factored = dict(iter_block_matrices(teacher)), inputs_of(teacher), factors_of(student)
    errors: dict[str, list[Tensor]] = {"mha": [], "ffn": []}
    for (layer, name), module in factored.items():
        (x,), linear = inputs[(layer, name)], dense[(layer, name)].module
        for row, length in zip(x, LENGTHS, strict=True):
            target = nn.functional.linear(row[:length], linear.weight, linear.bias)  # type: ignore[arg-type]
            gap = row[:length] @ module.down.weight.T @ module.up.weight.T + module.up.bias - target
            errors["ffn" if "ffn" in name else "mha"].append(gap.square().sum() / target.square().sum())
    expected = sum(torch.stack(each).mean() for each in errors.values())
    torch.testing.assert_close(local_loss(student, teacher), expected)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_shorter_student_gets_the_inputs_of_the_block_that_it_follows(family: str, block: int):
    teacher = teacher_of(family)
    student = build_student(teacher, StudentSection(form="depth", layers=[block - 1]), seed=0).model
    loss = local_loss(student, teacher)  # Its one block follows the teacher's second.
    assert loss.item() == 0.0 if block == 2 else loss.item() > 0.1


def test_blocks_that_several_numbers_name_keep_apart():
    # The student's second block follows the teacher's fourth, though inputs of the teacher's second are there, too.
    teacher = tiny("bert", layers=4)
    student = build_student(teacher, StudentSection(form="depth", layers=[1, 3]), seed=0).model
    assert local_loss(student, teacher).item() == 0.0


def test_no_layer_learns_from_another_one():
    teacher = teacher_of()
    student, other = student_of(teacher), student_of(teacher)
    with torch.no_grad():
        for (layer, _), module in factors_of(other).items():
            if layer == 1:
                module.down.weight.mul_(0.3)
        other.get_input_embeddings().weight.zero_()  # type: ignore[operator, union-attr]
    for inputs, same in (("teacher-first", True), ("student", False)):
        one, two = (gradients(m, local_loss(m, teacher, matrix_inputs=inputs)) for m in (student, other))
        second = [name for name in one if ".layer.1." in name]
        assert second and all(torch.equal(one[name], two[name]) == same for name in second)
        assert not any(torch.equal(one[n], two[n]) for n in one if ".layer.0." in n and "down" in n)


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert"])
def test_chains_in_the_factors_learn_the_same(family: str):
    teacher = teacher_of(family)
    student = student_of(teacher)
    plain = local_loss(student, teacher)
    overparameterise(student, OverparamSection(length=1))
    loss = local_loss(student, teacher)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-4)
    found = gradients(student, loss)
    chains = [name for name, _ in student.named_parameters() if ".parametrizations." in name]
    assert chains and all(found[name].abs().max() > 0 for name in chains)
    contract_model(student)
    torch.testing.assert_close(local_loss(student, teacher), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_what_is_computed_beside_the_pass_changes_none_of_its_signals(family: str):
    teacher = teacher_of(family)
    student = student_of(teacher)
    keys = [key for key, _ in iter_block_matrices(teacher)]
    matrices = Request(hidden=frozenset({2}), matrices=frozenset(keys))
    local = matrices | Request(local=frozenset((key, key) for key in keys))
    with torch.no_grad(), Capture(teacher, Request(linear=frozenset(keys)), CLASSIFICATION) as capture:
        signals = capture.run(batch())
    assert set(signals.linear) == set(keys) and not signals.matrices
    found = []
    for request in (matrices, local):
        with torch.no_grad(), Capture(student, request, CLASSIFICATION) as capture:
            found.append(capture.run(batch(), signals))
    for key in keys:
        assert torch.equal(found[0].matrices[key], found[1].matrices[key])
    assert torch.equal(found[0].hidden[2], found[1].hidden[2])
    assert set(found[1].local) == set(keys) and not found[0].local


def test_where_the_teachers_inputs_are_taken():
    model = tiny("bert")

    def local(stage: Stage) -> list[bool]:
        return [bool(term.objective.student_request().local) for term in stage.terms if term.name in ("mha", "ffn")]

    assert [local(stage) for stage in stages(model, model, schedule="staged")] == [[True] * 2, [False] * 2, [False] * 2]
    for inputs, expected in (("student", [False] * 3), ("teacher", [True] * 3)):
        found = stages(model, model, schedule="staged", matrix_inputs=inputs)
        assert [all(local(stage)) for stage in found] == expected
        (joint,) = stages(model, model, matrix_inputs=inputs)
        assert all(local(joint)) == expected[0]
    (joint,) = stages(model, model)
    assert not any(local(joint))
