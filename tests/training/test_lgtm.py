"""The teacher that learns: its influence against exact derivatives, and that nothing else moves by it."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import NAMES, tiny, tokenizer
from rich.console import Console
from tiny_recipes import FOLDER, run_recipe, tiny_recipe, write_recipe
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from training.stages import TWO_PROCESSES, batch_of, distill, folder_with_recipe, rows, setting, train
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from kdcli.cli.methods import tasks_of
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context, Term
from kdcli.models.inputs import model_inputs
from kdcli.models.overparam import contract_model, overparameterise, teacher_factors
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.objectives.cores import TensorObjective
from kdcli.objectives.distribution import Categorical, Normal
from kdcli.objectives.output import OutputObjective
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tasks import registry as kinds
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.training.schemes.base import Setting
from kdcli.training.schemes.lgtm import HeldOut, Learning, LGTMScheme, look_ahead, split
from kdcli.training.step import Distiller

CPU = torch.device("cpu")


def pair(family: str = "bert", **extra: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a teacher of two blocks and a student of one, both without dropout."""
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    if family == "distilbert":
        off = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    teacher = tiny(family, **off, **extra)
    with torch.no_grad():
        # Sharp opinions: between two teachers without any there is nothing to learn.
        for name, parameter in teacher.named_parameters():
            if name.startswith("classifier"):
                parameter.mul_(4.0)
    student = tiny(family, layers=1, seed=1, **off, **extra)
    return teacher, student


def adamw(student: PreTrainedModel, rate: float = 1e-3) -> torch.optim.AdamW:
    """Return an optimizer with different settings for matrices and vectors, as the trainer's has."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0, "lr": 3 * rate, "betas": (0.8, 0.99), "eps": 1e-6},
    ]
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def begun(
    teacher: PreTrainedModel, student: PreTrainedModel, learning: Learning, *, regression: bool = False, **loop: Any
) -> tuple[LGTMScheme, Setting]:
    scheme = LGTMScheme(learning)
    place = setting(student, teacher, rows(32, regression=regression), **loop)
    scheme.begin(place)
    scheme.place(CPU)
    return scheme, place


def step_once(student: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Give the optimizer some moments of its own."""
    functional.cross_entropy(student(**model_inputs(student, batch)).logits, batch["labels"]).backward()
    optimizer.step()
    optimizer.zero_grad()


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Return |one - other| / |other| over all tensors together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in other)) ** 0.5


def mutual(kind: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the student's share of the teacher's loss, differentiable by both, written down again."""

    def kl(teacher: Tensor, student: Tensor) -> Tensor:
        mine, yours = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
        return (yours * (yours.log() - mine.log())).sum(-1).mean()

    return (lambda teacher, student: ((teacher - student) ** 2).mean()) if kind == "regression" else kl


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name not in ("bert", "modernbert") else name for name in NAMES],
)
def test_influence_is_the_mixed_second_derivative_along_the_direction(family: str):
    check_influence(family, "classification")


@pytest.mark.parametrize("labels", [2, 5])
def test_influence_is_exact_at_a_temperature_and_for_regression(labels: int):
    check_influence("bert", "classification", temperature=2.0, labels=labels)
    check_influence("bert", "regression", labels=1)


def check_influence(family: str, kind: str, *, temperature: float = 1.0, labels: int = 2) -> None:
    teacher, student = pair(family, labels=labels)
    learning = Learning(kinds.get(kind), alpha_teacher=0.4, temperature=temperature)
    scheme, place = begun(teacher, student, learning, regression=kind == "regression")
    inputs = model_inputs(student, batch_of(place))
    trained = scheme.trained(adamw(student))
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator) for p in trained.values()]
    scheme.add_influence(inputs, trained, direction, -2.0)
    learner = scheme.teacher()
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in learner.parameters()]

    # In double precision, by differentiating twice.
    teacher, student = copy.deepcopy(teacher).double(), copy.deepcopy(student).double()
    ours = [p for name, p in student.named_parameters() if name in trained]
    with sdpa_kernel(SDPBackend.MATH):
        both = 0.4 * mutual(kind, temperature)(teacher(**inputs).logits, student(**inputs).logits)
        slopes = torch.autograd.grad(both, ours, create_graph=True, allow_unused=True)
        along = sum((s * v).sum() for s, v in zip(slopes, direction, strict=True) if s is not None)
        exact = torch.autograd.grad(along, list(teacher.parameters()), allow_unused=True, materialize_grads=True)
    assert distance(found, [-2.0 * tensor for tensor in exact]) < 1e-2


def test_the_finite_difference_converges_to_the_exact_derivative(monkeypatch: pytest.MonkeyPatch):
    errors = []
    for reach in (4.0, 1.0, 0.25):
        monkeypatch.setattr("kdcli.training.schemes.lgtm.REACH", reach)
        teacher, student = (model.double() for model in pair())
        scheme, place = begun(teacher, student, Learning(CLASSIFICATION, alpha_teacher=1.0))
        inputs = model_inputs(student, batch_of(place))
        trained = scheme.trained(adamw(student))
        generator = torch.Generator().manual_seed(3)
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in trained.values()]
        scheme.add_influence(inputs, trained, direction, 1.0)
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in scheme.teacher().parameters()]
        with sdpa_kernel(SDPBackend.MATH):
            both = mutual("classification", 1.0)(
                teacher.requires_grad_(True)(**inputs).logits, student(**inputs).logits
            )
            slopes = torch.autograd.grad(both, list(trained.values()), create_graph=True, allow_unused=True)
            along = sum((s * v).sum() for s, v in zip(slopes, direction, strict=True) if s is not None)
            exact = torch.autograd.grad(along, list(teacher.parameters()), allow_unused=True, materialize_grads=True)
        errors.append(distance(found, list(exact)))
    # A central difference is of second order: a quarter of the reach, a sixteenth of the error.
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.35)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.35)


def test_a_teacher_that_ignores_the_student_has_no_influence():
    teacher, student = pair()
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION, alpha_teacher=0.0))
    trained = scheme.trained(adamw(student))
    scheme.add_influence(
        model_inputs(student, batch_of(place)), trained, [torch.randn_like(p) for p in trained.values()], -1.0
    )
    assert all(p.grad is None or not p.grad.any() for p in scheme.teacher().parameters())


def test_a_direction_of_zeros_has_no_influence_and_is_no_division_by_zero():
    teacher, student = pair()
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION))
    trained = scheme.trained(adamw(student))
    scheme.add_influence(
        model_inputs(student, batch_of(place)), trained, [torch.zeros_like(p) for p in trained.values()], -1.0
    )
    assert all(p.grad is None or not p.grad.any() for p in scheme.teacher().parameters())


def test_a_teacher_that_follows_its_influence_pulls_the_student_towards_the_direction():
    teacher, student = pair()
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION, alpha_teacher=1.0))
    batch = batch_of(place)
    inputs = model_inputs(student, batch)
    trained = scheme.trained(adamw(student))

    def pull(direction: list[Tensor]) -> float:
        target = scheme.teacher()(**inputs).logits.detach()
        loss = functional.kl_div(
            student(**inputs).logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
        )
        slopes = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return sum(float((s * v).sum()) for s, v in zip(slopes, direction, strict=True) if s is not None)

    held = functional.cross_entropy(student(**inputs).logits, batch["labels"])
    direction = list(torch.autograd.grad(held, list(trained.values()), allow_unused=True, materialize_grads=True))
    before = pull(direction)
    # The weight is negative in training, and a descent: together the teacher goes along I.
    scheme.add_influence(inputs, trained, direction, -1.0)
    with torch.no_grad():
        norm = sum(float(p.grad.square().sum()) for p in scheme.teacher().parameters() if p.grad is not None) ** 0.5
        for parameter in scheme.teacher().parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / norm
    assert pull(direction) > before + 1e-4


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_looking_ahead_gives_what_adamw_then_does_and_changes_nothing(steps_before: int, fused: bool):
    _, student = pair()
    optimizer = adamw(student)
    for group in optimizer.param_groups:
        group["fused"] = fused
    batch = batch_of(setting(student, None, rows(16)))
    for _ in range(steps_before):
        step_once(student, optimizer, batch)
    parameters = list(student.parameters())
    generator = torch.Generator().manual_seed(0)
    gradients: list[Tensor | None] = [torch.randn(p.shape, generator=generator) for p in parameters]
    gradients[2] = None
    before = copy.deepcopy([p.detach() for p in parameters])
    memory = copy.deepcopy(optimizer.state_dict())
    ahead = look_ahead(optimizer, parameters, gradients, max_grad_norm=1.0)

    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(p.grad is None for p in parameters)
    now = optimizer.state_dict()
    assert now["param_groups"] == memory["param_groups"] and now["state"].keys() == memory["state"].keys()
    for number, entry in memory["state"].items():
        assert all(torch.equal(now["state"][number][name], value) for name, value in entry.items())

    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for moved, parameter in zip(ahead, parameters, strict=True):
        torch.testing.assert_close(moved, parameter.detach(), atol=1e-7, rtol=1e-6)
    assert torch.equal(ahead[2], before[2])
    assert not torch.equal(ahead[3], before[3])


def test_looking_ahead_by_hand():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    # The first step goes by the sign: both corrected moments are those of this gradient alone.
    (ahead,) = look_ahead(optimizer, [parameter], [torch.tensor([4.0, -3.0])])
    torch.testing.assert_close(ahead, torch.tensor([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1]))


def with_dropout() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    """Return a teacher and a student that drop a third of everything, and both again without any dropout."""
    teacher, student = pair()
    dropping = [copy.deepcopy(model) for model in (teacher, student)]
    for model in dropping:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.33
    return (*dropping, teacher, student)  # type: ignore[return-value]


def test_only_what_both_learn_from_is_answered_with_dropout():
    teacher, student, *_ = with_dropout()
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION))
    seen: list[tuple[str, bool]] = []
    for name, model in (("teacher", scheme.teacher()), ("student", student)):
        model.register_forward_pre_hook(lambda module, _, name=name: seen.append((name, module.training)))
    for _ in range(2):
        seen.clear()
        scheme.before_step(0, batch_of(place), adamw(student))
        # What a step learns from; then the student one step ahead, to either side of where it is, and the teacher.
        assert seen == [
            ("teacher", True),
            ("student", True),
            ("student", False),
            ("student", False),
            ("student", False),
            ("teacher", False),
        ]
        assert student.training and not scheme.teacher().training


def test_without_influence_the_student_answers_for_the_teacher_without_dropout():
    teacher, student, *_ = with_dropout()
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION, influence=False))
    seen: list[tuple[str, bool]] = []
    for name, model in (("teacher", scheme.teacher()), ("student", student)):
        model.register_forward_pre_hook(lambda module, _, name=name: seen.append((name, module.training)))
    for _ in range(2):
        seen.clear()
        scheme.before_step(0, batch_of(place), adamw(student))
        assert seen == [("teacher", True), ("student", False)]
        assert student.training and not scheme.teacher().training


def test_classifiers_can_start_at_zero_and_the_teacher_from_another_model_than_the_given():
    (teacher, student), start = pair(), tiny("bert", seed=9)
    place = replace(setting(student, teacher, rows(32)), start=start)
    scheme = LGTMScheme(Learning(CLASSIFICATION, zero_classifiers=True))
    before = {name: parameter.clone() for name, parameter in start.named_parameters()}
    scheme.begin(place)
    learning = dict(scheme.teacher().named_parameters())
    for name, parameter in before.items():
        assert torch.equal(learning[name], torch.zeros_like(parameter) if "classifier" in name else parameter)
        assert torch.equal(start.get_parameter(name), parameter)
    batch = batch_of(place)
    for model in (scheme.teacher(), student):
        assert not model(**model_inputs(model, batch)).logits.any()
    assert teacher(**model_inputs(teacher, batch)).logits.any()


def test_a_recipe_can_start_both_models_from_what_the_teacher_was_before_its_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = tiny("bert", seed=3, id2label={0: "negative", 1: "positive"})
    (tmp_path / "base").mkdir()
    save_model(base, tmp_path / "base", tokenizer())
    rates = {"teacher_learning_rate": 1e-9}
    recipe = tiny_recipe(
        "teacher",
        method={"name": "lgtm", "from_base": True, "zero_classifiers": True, **rates},
        teacher={"model": "base", "finetune": {"max_steps": 2, "learning_rate": 0.1, "warmup": 0.0}},
        train={"max_steps": 1, "learning_rate": 1e-9},
        student={"select": "first"},
    )
    ends: dict[str, PreTrainedModel] = {}
    end = LGTMScheme.end

    def at_the_end(scheme: LGTMScheme) -> None:
        ends.update(teacher=scheme.teacher(), student=scheme.setting.student)
        end(scheme)

    monkeypatch.setattr(LGTMScheme, "end", at_the_end)
    run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    start = base.state_dict()
    for model in ends.values():
        for key, value in model.state_dict().items():
            expected = torch.zeros_like(value) if key.startswith("classifier") else start[key]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_dropout_does_not_reach_the_influence():
    given = with_dropout()
    found = []
    for teacher, student in (given[:2], given[2:]):
        scheme, place = begun(teacher, student, Learning(CLASSIFICATION))
        # As they are left by the passes before.
        scheme.teacher().train()
        student.train()
        inputs, optimizer = model_inputs(student, batch_of(place)), adamw(student)
        trained = scheme.trained(optimizer)
        # A loss that no dropout reaches either: what follows from it is all that may differ.
        loss = sum((parameter.square().sum() for parameter in trained.values()), torch.zeros(()))
        direction = scheme.direction(loss, 0, optimizer)
        scheme.teacher().train()
        student.train()
        scheme.add_influence(inputs, trained, direction, -1.0)
        gradients = [p.grad for p in scheme.teacher().parameters() if p.grad is not None]
        assert any(bool(gradient.any()) for gradient in gradients)
        found.append([*direction, *gradients])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_look_ahead_clips_gradients_as_the_trainer_does():
    teacher, student = pair()
    found = []
    for limit in (1e-3, 1e3):
        scheme, place = begun(teacher, student, Learning(CLASSIFICATION), max_grad_norm=limit)
        batch, optimizer = batch_of(place), adamw(student, 0.05)
        start = copy.deepcopy(student.state_dict())
        step_once(student, optimizer, batch)
        trained = scheme.trained(optimizer)
        loss = functional.cross_entropy(student(**model_inputs(student, batch)).logits, batch["labels"])
        gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True, retain_graph=True)
        found.append(scheme.direction(loss, 0, optimizer))
        # By hand: the clipped gradient, the optimizer's own step, and the held-out loss there.
        ahead = copy.deepcopy(student).eval()
        mover = adamw(ahead, 0.05)
        mover.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for parameter, gradient in zip(ahead.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(ahead.parameters(), limit)
        mover.step()
        mover.zero_grad()
        held = scheme.held.batch(0, CPU)
        functional.cross_entropy(ahead(**model_inputs(ahead, held)).logits, held["labels"]).backward()
        expected = [p.grad if p.grad is not None else torch.zeros_like(p) for p in ahead.parameters()]
        assert len(trained) == len(expected)
        assert distance(found[-1], expected) < 1e-3
        student.load_state_dict(start)
    assert distance(found[0], found[1]) > 0.01


def reference(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    held: dict[str, Tensor],
    learning: Learning,
    rate: float,
) -> list[Tensor]:
    """Return the teacher's gradient as the paper's steps make it, with whole models copied and moved."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        p, q = torch.softmax(b / learning.temperature, -1), torch.softmax(a / learning.temperature, -1)
        return (p * (p.log() - q.log())).sum(-1).mean()

    def teacher_gradient(student: PreTrainedModel) -> list[Tensor]:
        own, other = (
            teacher(**model_inputs(teacher, batch)).logits,
            student(**model_inputs(student, batch)).logits.detach(),
        )
        gold = functional.cross_entropy(own, batch["labels"])
        loss = learning.alpha_teacher * kl(own, other) + (1 - learning.alpha_teacher) * gold
        parameters = list(teacher.parameters())
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    teacher, student, ahead = copy.deepcopy(teacher), copy.deepcopy(student), copy.deepcopy(student)
    teacher.requires_grad_(True)
    own = teacher_gradient(student)
    mover = adamw(ahead)
    mover.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    z_t, z_s = teacher(**model_inputs(teacher, batch)).logits.detach(), ahead(**model_inputs(ahead, batch)).logits
    gold = functional.cross_entropy(z_s, batch["labels"])
    (learning.alpha_student * kl(z_s, z_t) + (1 - learning.alpha_student) * gold).backward()
    nn.utils.clip_grad_norm_(ahead.parameters(), 1.0)
    mover.step()
    mover.zero_grad()
    functional.cross_entropy(ahead(**model_inputs(ahead, held)).logits, held["labels"]).backward()
    v = [p.grad if p.grad is not None else torch.zeros_like(p) for p in ahead.parameters()]
    eps = 0.01 / float(torch.cat([x.flatten() for x in v]).norm())
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(student)
        with torch.no_grad():
            for parameter, x in zip(moved.parameters(), v, strict=True):
                parameter += sign * eps * x
        sides.append(teacher_gradient(moved))
    return [g - rate * (up - down) / (2 * eps) for g, up, down in zip(own, *sides, strict=True)]


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_a_whole_step_of_the_teacher_follows_the_paper(alpha: float):
    teacher, student = pair()
    # A rate far too high, so that the influence counts for as much as the teacher's own gradient.
    learning = Learning(CLASSIFICATION, alpha_student=alpha, alpha_teacher=0.6, temperature=1.5, learning_rate=30.0)
    scheme, place = begun(teacher, student, learning, max_grad_norm=1.0, warmup=0.0)
    optimizer = adamw(student)
    step_once(student, optimizer, batch_of(place))
    batch = batch_of(place, first=8)
    held = scheme.held.batch(2, CPU)
    rate = scheme.teacher_rate(2)
    expected = reference(teacher, student, optimizer, batch, held, learning, rate)
    plain = reference(teacher, student, optimizer, batch, held, learning, 0.0)
    assert distance(plain, expected) > 0.1
    total = float(torch.cat([g.flatten() for g in expected]).norm())
    expected = [g * min(1.0, 1.0 / total) for g in expected]
    twin = copy.deepcopy(teacher).requires_grad_(True)
    mover = torch.optim.AdamW(twin.parameters(), lr=rate, weight_decay=0.0)
    found: list[Tensor] = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        learner = scheme.teacher().parameters()
        found.extend(p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in learner)

    scheme.optimizer.register_step_pre_hook(note)
    scheme.before_step(2, batch, optimizer)
    assert distance(found, expected) < 5e-3
    for parameter, gradient in zip(twin.parameters(), found, strict=True):
        parameter.grad = gradient
    mover.step()
    for ours, theirs in zip(scheme.teacher().parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_influence_the_teacher_follows_labels_and_student_alone_and_sees_all_rows():
    teacher, student = pair()
    learning = Learning(CLASSIFICATION, alpha_teacher=0.6, influence=False, learning_rate=30.0)
    scheme = LGTMScheme(learning)
    place = setting(student, teacher, rows(32))
    assert len(scheme.begin(place)) == 32
    scheme.place(CPU)
    batch, optimizer = batch_of(place), adamw(student)
    expected = reference(teacher, student, optimizer, batch, batch, learning, 0.0)
    expected = [g / max(1.0, float(torch.cat([x.flatten() for x in expected]).norm())) for g in expected]
    found: list[Tensor] = []
    scheme.optimizer.register_step_pre_hook(
        lambda *_: found.extend(
            p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in scheme.teacher().parameters()
        )
    )
    scheme.before_step(0, batch, optimizer)
    assert distance(found, expected) < 1e-4


def forms() -> dict[str, Callable[[PreTrainedModel], PreTrainedModel]]:
    def low_rank(teacher: PreTrainedModel) -> PreTrainedModel:
        return build_student(teacher, StudentSection(form="low-rank", rank=8), seed=0).model

    def chained(teacher: PreTrainedModel) -> PreTrainedModel:
        student = build_student(teacher, StudentSection(form="depth", layers=1), seed=0).model
        overparameterise(student, OverparamSection(length=1))
        return student

    def narrow(teacher: PreTrainedModel) -> PreTrainedModel:
        return build_student(teacher, StudentSection(form="width", hidden_size=16, heads=4, layers=1), seed=0).model

    return {"low-rank": low_rank, "chained": chained, "narrow": narrow}


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert"])
def test_the_teachers_step_leaves_the_student_and_its_optimizer_bit_by_bit_as_they_were(form: str, family: str):
    teacher = tiny(family, layers=2)
    student = forms()[form](teacher)
    given = copy.deepcopy(teacher.state_dict())
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION, learning_rate=1e-2))
    optimizer, batch = adamw(student), batch_of(place)
    step_once(student, optimizer, batch)
    before, memory = copy.deepcopy(student.state_dict()), copy.deepcopy(optimizer.state_dict())
    student.eval()
    answer = student(**model_inputs(student, batch)).logits.detach()
    scheme.before_step(0, batch, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(
        torch.equal(optimizer.state_dict()["state"][number][name], value)
        for number, entry in memory["state"].items()
        for name, value in entry.items()
    )
    assert all(p.grad is None and p.requires_grad and isinstance(p, nn.Parameter) for p in student.parameters())
    assert student.training and not scheme.teacher().training
    student.eval()
    assert torch.equal(student(**model_inputs(student, batch)).logits, answer)
    moved = scheme.teacher().state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in given.items())
    assert all(torch.equal(value, given[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in [*teacher.parameters(), *scheme.teacher().parameters()])


def test_what_is_moved_for_a_chained_student_are_its_tensors():
    teacher = tiny("bert", layers=2)
    student = forms()["chained"](teacher)
    scheme, place = begun(teacher, student, Learning(CLASSIFICATION))
    trained = scheme.trained(adamw(student))
    assert sum(".parametrizations." in name for name in trained) == 6 * 3
    assert not any(name.endswith("query.weight") for name in trained)
    inputs = model_inputs(student, batch_of(place))
    name = next(name for name in trained if ".parametrizations." in name)
    with torch.no_grad():
        moved = functional_call(student, {**trained, name: trained[name] * 1.5}, kwargs=inputs).logits
        assert not torch.allclose(moved, student(**inputs).logits, atol=1e-4)


def test_held_out_rows_are_training_rows_that_are_not_trained_on():
    everything = rows(200)
    kept, held = split(everything, 0.05, seed=3)
    assert (len(kept), len(held)) == (190, 10)
    assert sorted([*kept["index"], *held["index"]]) == list(range(200))
    assert kept["index"] == sorted(kept["index"])
    by_index = {row["index"]: row["input_ids"] for row in everything}
    assert all(row["input_ids"] == by_index[row["index"]] for row in held)
    assert split(everything, 0.05, seed=3)[1]["index"] == held["index"]
    assert split(everything, 0.05, seed=4)[1]["index"] != held["index"]
    assert [len(part) for part in split(rows(2), 0.05, seed=0)] == [1, 1]
    assert [len(part) for part in split(rows(2), 0.5, seed=0)] == [1, 1]
    # Windows of one text are held out together.
    windows = everything.add_column("row", np.arange(200) // 4)
    kept, held = split(windows, 0.1, seed=3)
    assert len(held) == 20 and not set(kept["row"]) & set(held["row"])
    one_text = rows(4).add_column("row", np.zeros(4, np.int64))
    assert [len(part) for part in split(one_text, 0.05, seed=0)] == [3, 1]
    teacher, student = pair()
    with pytest.raises(InputError, match="none can be held out"):
        LGTMScheme(Learning(CLASSIFICATION, held_out=0.05)).begin(setting(student, teacher, rows(1)))


def test_the_validation_rows_are_never_touched(tmp_path: Path):
    # The task has no rows of its own, so the only ones there are are those of the training set.
    teacher, student = pair()
    scheme = LGTMScheme(Learning(CLASSIFICATION, held_out=0.2))
    place = setting(student, teacher, rows(40))
    assert place.task.selection is None
    seen: set[int] = set()

    class Noting(OutputObjective):
        def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
            seen.update(batch["index"].tolist())
            return super().forward(student, teacher, batch)

    train(scheme, place, [Term("output", Noting(Categorical()))], tmp_path)
    held = {row["index"] for row in scheme.held.rows}
    assert len(held) == 8 and seen and not held & seen
    assert held | seen <= set(range(40))
    scheme.end()
    assert scheme.teacher() is teacher


def test_held_out_batches_follow_from_the_step_alone_and_visit_every_row():
    place = setting(tiny("bert"), None, rows(40), batch_size=4)
    held = HeldOut(rows(10), place)
    first = [held.batch(step, CPU)["index"].tolist() for step in range(9)]
    assert [HeldOut(rows(10), place).batch(step, CPU)["index"].tolist() for step in (7, 2)] == [first[7], first[2]]
    assert held.batch(0, CPU)["index"].tolist() == first[0]
    for start in (0, 3, 6):
        assert {index for batch in first[start : start + 3] for index in batch} == set(range(10))
    assert first[:3] != first[3:6]
    assert all(len(batch) == 4 for batch in first)
    assert len(HeldOut(rows(1), place).batch(5, CPU)["index"]) == 4


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25])
def test_the_teachers_learning_rate_follows_a_linear_schedule(warmup: float):
    teacher, student = pair()
    scheme, _ = begun(teacher, student, Learning(CLASSIFICATION, learning_rate=2e-4), warmup=warmup, max_steps=40)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = get_linear_schedule_with_warmup(optimizer, int(warmup * 40), 40)
    for step in range(40):
        assert scheme.teacher_rate(step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_a_resumed_training_ends_with_the_same_teacher_and_student(tmp_path: Path):
    class Stopping(LGTMScheme):
        def before_step(self, step: int, batch: Any, optimizer: Any) -> None:
            super().before_step(step, batch, optimizer)
            if step == 5:
                raise KeyboardInterrupt

    def run(folder: Path, *, interrupted: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        teacher, student = tiny("bert"), tiny("bert", layers=1, seed=1)
        learning = Learning(CLASSIFICATION, learning_rate=1e-3, held_out=0.2)
        place = setting(student, teacher, rows(), eval_every=2, max_steps=8)
        terms = [Term("output", OutputObjective(Categorical(), scale=False))]
        torch.manual_seed(7)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train(Stopping(learning), place, terms, folder)
            torch.manual_seed(8)
            for parameter in student.parameters():
                parameter.detach().zero_()
        scheme = LGTMScheme(learning)
        train(scheme, place, terms, folder, resume=interrupted)
        assert not torch.equal(scheme.teacher().classifier.weight, teacher.classifier.weight)
        return scheme.teacher().state_dict(), student.state_dict()

    whole, resumed = run(tmp_path / "whole", interrupted=False), run(tmp_path / "resumed", interrupted=True)
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_teacher_of_a_chained_student_trains_as_chains_which_the_auxiliary_loss_follows(tmp_path: Path):
    teacher, section = tiny("bert", layers=2), OverparamSection(length=1)
    student = build_student(teacher, StudentSection(form="depth", layers=1), seed=0).model
    overparameterise(student, section)
    given = {name: value.clone() for name, value in teacher.state_dict().items()}
    scheme = LGTMScheme(Learning(CLASSIFICATION, learning_rate=1e-2))
    place = replace(setting(student, teacher, rows(), max_steps=2), overparam=section, pairs=((1, 2),))
    terms = [Term("output", OutputObjective(Categorical())), Term("tensor", TensorObjective())]
    scheme.begin(place)
    before = {key: [t.detach().clone() for t in chain] for key, chain in scheme.teacher_tensors().items()}
    assert len(before) == 6 and all(key[0] == 1 for key in before)
    static, _ = teacher_factors(teacher, student, [(1, 2)], section)
    # At the start they are the tensors of the given teacher.
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for key, chain in before.items()
        for a, b in zip(chain, static[key], strict=True)
    )
    live = scheme.teacher_tensors()
    distiller = Distiller(student, terms, teacher=scheme.teacher(), teacher_factors=live, kind=CLASSIFICATION)
    scheme.place(torch.device("cpu"))
    distiller.place(torch.device("cpu"))
    scheme.before_step(0, batch_of(place), adamw(student))
    seen = distiller.teacher_signals(batch_of(place)).factors
    assert all(not torch.equal(seen[key][k], before[key][k]) for key in before for k in range(3))
    # The teacher's chains of one middle tensor are slowed down as the student's are.
    chains = {id(tensor) for chain in live.values() for tensor in chain}
    for group in scheme.optimizer.param_groups:
        slow = any(id(parameter) in chains for parameter in group["params"])
        assert group["lr"] == pytest.approx(scheme.teacher_rate(0) / (2.3 if slow else 1.0))
    assert all(torch.equal(value, given[name]) for name, value in teacher.state_dict().items())


def test_a_chained_student_trains_on_regression_and_contracts(tmp_path: Path):
    teacher = tiny("bert", labels=1)
    student = forms()["chained"](teacher)
    scheme = LGTMScheme(Learning(kinds.get("regression"), learning_rate=1e-3))
    place = setting(student, teacher, rows(regression=True), precision="bf16")
    train(scheme, place, [Term("output", OutputObjective(Normal()))], tmp_path)
    learned = scheme.teacher().state_dict()
    assert all(bool(value.isfinite().all()) for value in [*learned.values(), *student.state_dict().values()])
    assert any(not torch.equal(value, learned[name]) for name, value in teacher.state_dict().items())
    scheme.end()
    assert contract_model(student).max_abs_difference < 1e-4


def test_accumulated_steps_and_black_boxes_are_refused():
    teacher, student = pair()
    with pytest.raises(InputError, match="whole optimizer step") as error:
        LGTMScheme(Learning(CLASSIFICATION)).begin(setting(student, teacher, rows(8), gradient_accumulation=2))
    assert error.value.where == "train.gradient_accumulation" and "1" in str(error.value.hint)
    with pytest.raises(InputError, match="needs the model"):
        LGTMScheme(Learning(CLASSIFICATION)).begin(setting(student, None, rows(8)))


def test_the_user_is_told_how_many_rows_are_held_out():
    teacher, student = pair()
    found = io.StringIO()
    scheme = LGTMScheme(Learning(CLASSIFICATION))
    scheme.begin(replace(setting(student, teacher, rows(40)), console=Console(file=found, width=200)))
    assert "2 of 40 training rows are held out" in found.getvalue()


def context(kind: str = "classification") -> Context:
    teacher, student = tiny("bert"), tiny("bert", layers=1)
    return Context(shape_of(teacher.config), shape_of(student.config), "depth", kinds.get(kind), [])


def test_the_preset_follows_the_paper():
    method = registry.get("lgtm")
    options = method.options()
    method.check(options, context())
    (stage,) = method.build(options, context())
    assert {term.name: term.weight for term in stage.terms} == {"output": 1.0, "task": 0.0}
    assert stage.terms[0].objective.scale is False
    assert stage.scheme.learning == Learning(CLASSIFICATION, 1.0, 0.4, 1.0, 3e-5, True, 0.05)
    assert not stage.scheme.teacher_is_fixed
    assert method.train["weight_decay"] == 0.0
    assert {"classification", "multi-label", "regression"} <= set(tasks_of(method)) and "text" not in tasks_of(method)


def test_copies_of_held_out_rows_are_refused():
    method, copied = registry.get("lgtm"), replace(context(), augmented=True)
    with pytest.raises(InputError, match="copies") as error:
        method.check(method.options(), copied)
    assert error.value.where == "task.augment"
    method.check(method.options(influence=False), copied)


def test_options_without_an_effect_are_refused():
    method = registry.get("lgtm")
    with pytest.raises(InputError, match="alpha_teacher = 0"):
        method.check(method.options(alpha_teacher=0.0), context())
    method.check(method.options(alpha_teacher=0.0, influence=False), context())
    with pytest.raises(InputError, match="held_out has no effect without influence"):
        method.check(method.options(influence=False, held_out=0.1), context())
    for values in ({"held_out": 0.0}, {"held_out": 0.9}, {"alpha_student": 0.0}, {"teacher_learning_rate": 0.0}):
        with pytest.raises(ValueError):
            method.options(**values)


RECIPE = tiny_recipe(
    "teacher",
    method={"name": "lgtm", "teacher_learning_rate": 1e-3},
    teacher=FOLDER,
    train={"max_steps": 6, "batch_size": 16, "eval_every": 3},
)


@pytest.mark.slow
def test_two_processes_agree_with_one_and_the_reported_teacher_is_the_given(tmp_path: Path):
    folder = folder_with_recipe(tmp_path, RECIPE)
    document, one = distill(folder, "one")
    assert document["teacher_path"] == str(folder / "teacher") or Path(document["teacher_path"]).name == "teacher"
    two = distill(folder, "two", *TWO_PROCESSES)[1]
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=5e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
    fixed = distill(folder, "fixed", extra=("--set", "method.teacher_learning_rate=1e-12"))[1]
    assert any(not torch.equal(fixed[key], one[key]) for key in one)


@pytest.mark.slow
def test_a_recipe_with_lgtm_and_chains_gives_a_plain_student(tmp_path: Path):
    folder = folder_with_recipe(tmp_path, RECIPE)
    document, _ = distill(folder, "chained", extra=("--set", "overparam.length=1"))
    assert document["status"] == "done"
    assert document["contraction"]["max_abs_difference"] < 1e-4
    command = [sys.executable, "-m", "kdcli", "distill", "recipe.toml", "--dry-run"]
    command += ["--set", "train.gradient_accumulation=2"]
    refused = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2
    assert "gradient_accumulation" in refused.stderr
