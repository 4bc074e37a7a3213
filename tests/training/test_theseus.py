"""Progressive module replacement: who runs, who learns, and that the student stays a plain model."""

import copy
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import factors_of
from families import NAMES, tiny
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import FOLDER, TINY, tiny_recipe, write_recipe
from torch import Tensor
from torch.nn.functional import cross_entropy
from training.stages import TWO_PROCESSES, batch_of, distill, folder_with_recipe, rows, setting, train
from transformers import PreTrainedModel

from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context, Term
from kdcli.models.blocks import blocks_of
from kdcli.models.families import FAMILIES
from kdcli.models.inputs import model_inputs
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.objectives.cores import TensorObjective
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tasks import registry as kinds
from kdcli.training.schemes.theseus import Replacement, TheseusScheme, draw

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OFF: dict[str, dict[str, Any]] = {
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "modernbert": {"attention_dropout": 0.0, "layer_types": ["full_attention"] * 4},
}
REPLACEABLE = [name for name in NAMES if not FAMILIES[name].repeated]


def pair(
    family: str = "bert", depth: int = 4, layers: int = 2, **extra: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a teacher without dropout, and a student whose blocks have moved away from its first ones."""
    teacher = tiny(family, layers=depth, **OFF.get(family, STILL), **extra)
    student = build_student(teacher, StudentSection(form="depth", layers=layers, select="first"), seed=0).model
    with torch.no_grad():
        for parameter in blocks_of(student).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return teacher, student


def begun(
    teacher: PreTrainedModel, student: PreTrainedModel, *drawn: bool, **options: Any
) -> tuple[TheseusScheme, dict[str, Tensor]]:
    """Return a scheme whose units have drawn `drawn`, with the student in training, and a batch."""
    scheme = TheseusScheme(Replacement(), **options)
    place = setting(student, teacher, rows(16))
    scheme.begin(place)
    for unit, replaced in zip(scheme.units, drawn, strict=True):
        unit.replaced = replaced
    student.train()
    return scheme, model_inputs(student, batch_of(place))


def context(teacher: PreTrainedModel, student: PreTrainedModel, form: str = "depth") -> Context:
    return Context(shape_of(teacher.config), shape_of(student.config), form, kinds.get("classification"), [])


@pytest.mark.parametrize("family", REPLACEABLE)
def test_with_all_blocks_replaced_it_is_the_student_and_with_none_the_teacher(family: str):
    teacher, student = pair(family)
    alone = copy.deepcopy(student)
    scheme, inputs = begun(teacher, student, True, True)
    assert torch.equal(student(**inputs).logits, alone(**inputs).logits)
    for unit in scheme.units:
        unit.replaced = False
    assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)
    assert not torch.allclose(teacher(**inputs).logits, alone(**inputs).logits, atol=1e-3)


def test_each_student_block_stands_for_its_own_group_of_teacher_blocks():
    teacher, student = pair(depth=6, layers=2)
    ours = list(blocks_of(student))
    _, inputs = begun(teacher, student, True, False)
    logits = student(**inputs).logits
    mixed = copy.deepcopy(teacher)
    mixed.bert.encoder.layer = torch.nn.ModuleList([copy.deepcopy(alone_block(ours[0])), *blocks_of(teacher)[3:]])
    assert torch.equal(logits, mixed(**inputs).logits)


def alone_block(block: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a block as it is without the scheme."""
    plain = copy.deepcopy(block)
    plain.__dict__.pop("forward", None)
    return plain


def test_evaluation_runs_the_student_alone_whatever_was_drawn():
    teacher, student = pair()
    alone = copy.deepcopy(student)
    _, inputs = begun(teacher, student, False, False)
    student.eval()
    assert torch.equal(student(**inputs).logits, alone(**inputs).logits)


@pytest.mark.parametrize("family", REPLACEABLE)
@pytest.mark.parametrize("drawn", [(True, True), (True, False), (False, True), (False, False)])
def test_only_replaced_blocks_learn_also_below_frozen_teacher_blocks(family: str, drawn: tuple[bool, bool]):
    teacher, student = pair(family)
    begun_scheme, inputs = begun(teacher, student, *drawn)
    cross_entropy(student(**inputs).logits, torch.arange(8) % 2).backward()
    blocks = f".{FAMILIES[family].blocks}."
    learning = {name.split(blocks)[1].split(".")[0] for name, p in student.named_parameters() if p.grad is not None}
    assert learning == {str(number) for number, replaced in enumerate(drawn) if replaced}
    # Several processes are told, and look for the blocks that are left out in every step.
    assert not begun_scheme.steps_are_alike
    for block, replaced in zip(blocks_of(student), drawn, strict=True):
        if replaced:
            assert all(float(p.grad.abs().sum()) > 0 for n, p in block.named_parameters() if weighs(n))
    assert all(p.grad is None for p in teacher.parameters())
    begun_scheme.end()


def weighs(name: str) -> bool:
    # A bias of the keys moves all scores of a row alike: softmax does not see it.
    return not (name.endswith("bias") and any(key in name for key in ("key", "k_lin", "attn.k.")))


def test_gradients_of_replaced_blocks_are_those_of_the_mixed_model():
    teacher, student = pair()
    below = copy.deepcopy(blocks_of(student)[0])
    _, inputs = begun(teacher, student, True, False)
    labels = torch.arange(8) % 2
    cross_entropy(student(**inputs).logits, labels).backward()
    mixed = copy.deepcopy(teacher)
    mixed.bert.encoder.layer = torch.nn.ModuleList([below, *copy.deepcopy(blocks_of(teacher)[2:])])
    mixed.requires_grad_(True)
    cross_entropy(mixed(**inputs).logits, labels).backward()
    for ours, theirs in zip(blocks_of(student)[0].parameters(), below.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_predecessors_keep_their_dropout_unless_told_otherwise():
    for quiet in (False, True):
        teacher = tiny("bert", layers=4, hidden_dropout_prob=0.3)
        student = build_student(teacher, StudentSection(form="depth", layers=2), seed=0).model
        scheme, _ = begun(teacher, student, False, False, predecessor_eval=quiet)
        assert all(block.training is not quiet for block in blocks_of(teacher))
        assert not teacher.training
        scheme.end()
        assert not any(module.training for module in teacher.modules())


def test_the_chance_rises_as_published():
    linear = Replacement("linear", 0.3, k=6e-4)
    assert [linear.probability(t, 2000) for t in (0, 500, 1000, 1167, 1999)] == pytest.approx([0.3, 0.6, 0.9, 1, 1])
    constant = Replacement("constant", 0.5, until=2500)
    assert [constant.probability(t, 5000) for t in (0, 2499, 2500, 4999)] == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 997])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_chance_without_numbers_fits_any_length_and_never_falls(schedule: str, steps: int):
    chances = [Replacement(schedule, 0.4).probability(t, steps) for t in range(steps)]
    assert chances == sorted(chances)
    assert chances[0] == pytest.approx(0.4)
    assert steps < 3 or chances[-1] == 1.0
    reached = sum(chance < 1 - 1e-9 for chance in chances)
    assert reached == pytest.approx(steps * 2 / 3, abs=1)


def test_draws_have_the_chance_asked_for_and_are_independent():
    drawn = torch.tensor([draw(0.3, 6, seed=42, step=step) for step in range(4000)]).float()
    assert torch.allclose(drawn.mean(0), torch.full((6,), 0.3), atol=0.03)
    between_units = torch.corrcoef(drawn.T) - torch.eye(6)
    assert float(between_units.abs().max()) < 0.06
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:, 0], drawn[:-1, 0]]))[0, 1])) < 0.06
    assert all(draw(1.0, 6, seed=0, step=step) == [True] * 6 for step in range(200))
    assert not any(any(draw(1e-9, 6, seed=0, step=step)) for step in range(200))


def test_draws_do_not_depend_on_global_random_state_and_leave_it_alone():
    torch.manual_seed(0)
    first = [draw(0.5, 4, seed=3, step=step) for step in range(20)]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert [draw(0.5, 4, seed=3, step=step) for step in range(20)] == first
    assert [draw(0.5, 4, seed=4, step=step) for step in range(20)] != first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_micro_batches_of_a_step_see_the_same_draw():
    teacher, student = pair()
    scheme, inputs = begun(teacher, student, True, True)
    optimizer = torch.optim.AdamW(blocks_of(student).parameters())
    seen = []
    for step in range(6):
        for _ in range(2):
            scheme.before_step(step, inputs, optimizer)
            seen.append([unit.replaced for unit in scheme.units])
    assert seen[::2] == seen[1::2]
    assert len({tuple(drawn) for drawn in seen}) > 1


def test_the_student_looks_like_itself_during_training_and_is_itself_afterwards():
    teacher, student = pair()
    alone = copy.deepcopy(student)
    wanted = {name: p.requires_grad for name, p in alone.named_parameters()}
    scheme, _ = begun(teacher, student, False, False)

    def face(model: PreTrainedModel) -> Any:
        return list(model.state_dict()), [n for n, _ in model.named_modules()], [n for n, _ in model.named_parameters()]

    assert face(student) == face(alone)
    outside = [p for n, p in student.named_parameters() if ".layer." not in n]
    assert outside and not any(p.requires_grad for p in outside)
    scheme.end()
    assert face(student) == face(alone)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == wanted
    assert not any("forward" in module.__dict__ for module in student.modules())
    copy.deepcopy(student).load_state_dict(alone.state_dict(), strict=True)


def test_training_moves_the_blocks_and_nothing_else(tmp_path: Path):
    teacher, student = pair()
    before, given = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    scheme = TheseusScheme(Replacement("linear", 0.5))
    place = setting(student, teacher, rows(), eval_every=3)
    record = train(scheme, place, [Term("task", GoldObjective(Categorical()))], tmp_path)
    scheme.end()
    assert record["steps"] == 6
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".layer." in name}
    assert all(torch.equal(value, given[name]) for name, value in teacher.state_dict().items())


def test_a_vanishing_chance_trains_nothing_and_breaks_nothing(tmp_path: Path):
    teacher, student = pair()
    before = copy.deepcopy(student.state_dict())
    scheme = TheseusScheme(Replacement("constant", 1e-9, until=100))
    train(scheme, setting(student, teacher, rows()), [Term("task", GoldObjective(Categorical()))], tmp_path)
    scheme.end()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_a_resumed_training_ends_at_the_same_weights(tmp_path: Path):
    def run(folder: Path, stop: int | None) -> dict[str, Tensor]:
        teacher, student = pair()
        for model in (teacher, student):
            model.config.hidden_dropout_prob = 0.1
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.1
        torch.manual_seed(7)
        place = setting(student, teacher, rows(), eval_every=2)
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                train(Stopping(stop), place, [Term("task", GoldObjective(Categorical()))], folder)
            # What is not taken from the checkpoint is lost.
            torch.manual_seed(8)
            for block in blocks_of(student):
                del block.forward
                for parameter in block.parameters():
                    parameter.detach().zero_()
        scheme = TheseusScheme(Replacement("linear", 0.3))
        train(scheme, place, [Term("task", GoldObjective(Categorical()))], folder, resume=stop is not None)
        scheme.end()
        return student.state_dict()

    class Stopping(TheseusScheme):
        def __init__(self, stop: int) -> None:
            super().__init__(Replacement("linear", 0.3))
            self.stop = stop

        def before_step(self, step: int, batch: Any, optimizer: Any) -> None:
            super().before_step(step, batch, optimizer)
            if step == self.stop:
                raise KeyboardInterrupt

    whole, resumed = run(tmp_path / "whole", None), run(tmp_path / "resumed", 5)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("factorization", ["mpo", "svd"])
def test_over_parameterised_blocks_learn_and_contract(tmp_path: Path, factorization: str):
    teacher, student = pair()
    alone = copy.deepcopy(student)
    report = overparameterise(student, OverparamSection(length=1, factorization=factorization))
    chains = {name: value.clone() for name, value in student.named_parameters() if "parametrizations" in name}
    factors = {
        (layer, name): tuple(0.9 * x.detach() for x in chain) for (layer, name), chain in factors_of(student).items()
    }
    assert len(report.rows) == 12
    scheme = TheseusScheme(Replacement("linear", 0.5))
    terms = [Term("task", GoldObjective(Categorical())), Term("tensor", TensorObjective())]
    train(scheme, setting(student, teacher, rows()), terms, tmp_path, factors=factors)
    scheme.end()
    now = dict(student.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in chains.items())
    contract_model(student)
    assert list(student.state_dict()) == list(alone.state_dict())


def test_a_depth_that_cannot_be_divided_is_refused_with_the_nearest_that_can():
    method = registry.get("theseus")
    options = method.options()
    teacher, student = tiny("bert", layers=6), tiny("bert", layers=4)
    with pytest.raises(InputError) as error:
        method.check(options, context(teacher, student))
    assert "6 blocks cannot be divided among 4" in str(error.value)
    assert "3 blocks" in str(error.value.hint)
    with pytest.raises(InputError, match="4 student blocks cannot stand for 6"):
        TheseusScheme(Replacement()).begin(setting(student, teacher, rows(8)))
    assert not any("forward" in module.__dict__ for module in student.modules())
    method.check(options, context(teacher, tiny("bert", layers=3)))


def test_contradicting_options_and_other_student_forms_are_refused():
    method = registry.get("theseus")
    teacher, student = tiny("bert", layers=4), tiny("bert", layers=2)
    for values in ({"schedule": "constant", "k": 1e-3}, {"steps_for_replacing": 5}):
        with pytest.raises(InputError, match="belongs to"):
            method.check(method.options(**values), context(teacher, student))
    for form in ("width", "low-rank", "checkpoint"):
        with pytest.raises(InputError, match="depth"):
            method.check(method.options(), context(teacher, student, form))
    for rate in (0.0, 1.5):
        with pytest.raises(ValueError):
            method.options(replacing_rate=rate)


def test_a_black_box_teacher_is_refused():
    with pytest.raises(InputError, match="teacher's own blocks"):
        TheseusScheme(Replacement()).begin(setting(tiny("bert"), None, rows(8)))


def test_a_convolution_between_blocks_is_refused_unless_units_are_single_blocks():
    teacher, student = (
        tiny("deberta-v2", layers=4, conv_kernel_size=3),
        tiny("deberta-v2", layers=2, conv_kernel_size=3),
    )
    with pytest.raises(InputError, match=r"module after its first block \(encoder.conv\)") as caught:
        TheseusScheme(Replacement()).begin(setting(student, teacher, rows(8)))
    # What the hint says works.
    assert caught.value.where == "student.layers" and "student.layers = 4" in (caught.value.hint or "")
    TheseusScheme(Replacement()).begin(setting(copy.deepcopy(teacher), teacher, rows(8)))


def test_blocks_that_are_one_and_blocks_of_different_attention_are_refused():
    for family, words, where in (
        ("albert", "share one block's weights", "method.name"),
        ("modernbert", "of different kinds", "student.layers"),
    ):
        teacher = tiny(family, layers=4)
        student = build_student(teacher, StudentSection(form="depth", layers=2), seed=0).model
        with pytest.raises(InputError, match=words) as caught:
            TheseusScheme(Replacement()).begin(setting(student, teacher, rows(8)))
        assert caught.value.where == where and "use another method, such as kd" in (caught.value.hint or "")
    # With every block a unit of its own, blocks of any kind are replaced.
    student = build_student(teacher, StudentSection(form="depth", layers=4), seed=0).model
    assert "student.layers = 4" in (caught.value.hint or "")
    TheseusScheme(Replacement()).begin(setting(student, teacher, rows(8)))


def test_a_chance_that_never_reaches_one_is_told():
    teacher, student = pair()
    for replacement, told in ((Replacement("linear", 0.3, k=1e-6), True), (Replacement("linear", 0.3), False)):
        output = io.StringIO()
        place = replace(setting(student, teacher, rows(16)), console=Console(file=output, width=200))
        scheme = TheseusScheme(replacement)
        scheme.begin(place)
        scheme.end()
        assert ("ends at 0.30, below 1" in output.getvalue()) is told


def test_the_preset_follows_the_paper():
    method = registry.get("theseus")
    teacher, student = tiny("bert", layers=4), tiny("bert", layers=2)
    (stage,) = method.build(method.options(), context(teacher, student))
    assert [term.name for term in stage.terms] == ["task"]
    assert stage.scheme.replacement == Replacement("linear", 0.3)
    (stage,) = method.build(method.options(schedule="constant", steps_for_replacing=9), context(teacher, student))
    assert stage.scheme.replacement == Replacement("constant", 0.5, until=9)
    assert method.student["select"] == "first"
    assert (method.train["weight_decay"], method.train["warmup"]) == (0.0, 0.0)


RECIPE = tiny_recipe(
    method="theseus",
    teacher={"scratch": {**TINY["teacher"]["scratch"], "layers": 4}},
    student={"layers": 2},
    overparam={"length": 1},
)


@pytest.mark.slow
def test_a_recipe_with_theseus_gives_a_plain_shallow_student(tmp_path: Path):
    write_recipe(tmp_path / "tiny.toml", RECIPE)
    command = [sys.executable, "-m", "kdcli", "distill", "tiny.toml", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["teacher_layers"] == [0, 1]
    assert document["contraction"]["max_abs_difference"] < 1e-4
    student = load_file(tmp_path / "runs" / "tiny" / "student" / "model.safetensors")
    teacher = load_file(Path(document["teacher_path"]) / "model.safetensors")
    outside = [name for name in student if ".layer." not in name]
    assert outside and all(torch.equal(student[name], teacher[name]) for name in outside)
    refused = subprocess.run(
        [*command, "--dry-run", "--set", "student.layers=3", "--set", "name=other"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert refused.returncode == 2
    assert "use 2 blocks" in refused.stderr


SHARED = tiny_recipe(
    "teacher",
    method={"name": "theseus", "schedule": "constant", "steps_for_replacing": 4, "replacing_rate": 0.5},
    teacher=FOLDER,
    student={"layers": 2},
    train={"max_steps": 8, "batch_size": 16, "eval_every": 4},
)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 1e-9])
def test_two_processes_agree_with_one_also_in_steps_where_nothing_learns(tmp_path: Path, rate: float):
    folder = folder_with_recipe(tmp_path, SHARED, layers=4)
    extra = ("--set", f"method.replacing_rate={rate}")
    one, two = distill(folder, "one", extra=extra)[1], distill(folder, "two", *TWO_PROCESSES, extra=extra)[1]
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=5e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
