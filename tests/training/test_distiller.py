"""One step of distillation: who runs, how far, and what becomes of the terms."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from torch import Tensor, nn
from torch.nn import functional
from training.stages import rows
from transformers import PreTrainedModel

from kdcli.methods.base import Term
from kdcli.models.blocks import blocks_of
from kdcli.models.inputs import model_inputs
from kdcli.models.overparam import overparameterise
from kdcli.objectives.attention import AttentionObjective
from kdcli.objectives.attribution import AttributionObjective
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.hidden import HiddenObjective
from kdcli.objectives.matrix import MatrixObjective
from kdcli.objectives.output import OutputObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.encode import Collator
from kdcli.training.step import Distiller
from kdcli.training.teacher_cache import KnownOutputs

WORDS = tokenizer()
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pair(layers: int = 4) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a teacher of four blocks and a student of two, without dropout."""
    return tiny("bert", layers=layers, **OFF), tiny("bert", seed=1, **OFF)


def batch_of(count: int = 6) -> dict[str, Tensor]:
    return Collator(WORDS)(list(rows(count)))


class Runs:
    """Counts how often modules run."""

    def __init__(self, **modules: nn.Module) -> None:
        self.count = dict.fromkeys(modules, 0)
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda module, inputs, name=name: self._note(name))

    def _note(self, name: str) -> None:
        self.count[name] += 1


def hooks(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def many_terms() -> list[Term]:
    pairs = [(1, 2), (2, 4)]
    return [
        Term("output", OutputObjective(Categorical(), temperature=2.0), 0.5),
        Term("task", GoldObjective(Categorical()), 0.25),
        Term("hidden", HiddenObjective(pairs), 2.0),
        Term("embedding", HiddenObjective([(0, 0)]), 1.0),
        Term("attention", AttentionObjective(pairs), 0.1),
        Term("mha", MatrixObjective(pairs, ("query", "value")), 3.0),
    ]


def test_every_model_runs_once_a_step_whatever_the_number_of_terms():
    teacher, student = pair()
    distiller = Distiller(student, many_terms(), teacher=teacher, kind=CLASSIFICATION).train()
    runs = Runs(teacher=teacher, student=student, last=blocks_of(teacher)[3], first=blocks_of(student)[0])
    for _ in range(3):
        distiller(batch_of())["loss"].backward()
    assert runs.count == {"teacher": 3, "student": 3, "last": 3, "first": 3}


def test_the_loss_is_the_weighted_sum_of_the_terms():
    teacher, student = pair()
    terms = many_terms()
    result = Distiller(student, terms, teacher=teacher, kind=CLASSIFICATION).train()(batch_of())
    assert set(result) == {"loss", *(term.name for term in terms)}
    total = sum(term.weight * float(result[term.name]) for term in terms)
    assert float(result["loss"].detach()) == pytest.approx(total, rel=1e-6)
    assert result["loss"].requires_grad and not any(result[term.name].requires_grad for term in terms)


def test_terms_are_what_the_models_own_outputs_give():
    teacher, student = pair()
    batch = batch_of()
    result = Distiller(student, many_terms(), teacher=teacher, kind=CLASSIFICATION).train()(batch)
    mine = student(**model_inputs(student, batch), output_hidden_states=True)
    yours = teacher(**model_inputs(teacher, batch), output_hidden_states=True)
    task = functional.cross_entropy(mine.logits, batch["labels"])
    torch.testing.assert_close(result["task"], task.detach())
    p, q = torch.softmax(yours.logits / 2, -1), torch.softmax(mine.logits / 2, -1)
    torch.testing.assert_close(result["output"], (4 * (p * (p.log() - q.log())).sum(-1).mean()).detach())
    real = batch["attention_mask"].bool()
    levels = []
    for s, t in ((1, 2), (2, 4)):
        errors = (mine.hidden_states[s] - yours.hidden_states[t]).square().mean(-1)
        levels.append(torch.stack([row[kept].mean() for row, kept in zip(errors, real, strict=True)]).mean())
    torch.testing.assert_close(result["hidden"], (sum(levels) / 2).detach())


def test_the_gradient_is_that_of_the_written_out_loss():
    teacher, student = pair()
    twin, batch = copy.deepcopy(student), batch_of()
    terms = [Term("output", OutputObjective(Categorical()), 0.5), Term("task", GoldObjective(Categorical()), 2.0)]
    Distiller(student, terms, teacher=teacher, kind=CLASSIFICATION).train()(batch)["loss"].backward()
    logits = twin(**model_inputs(twin, batch)).logits
    with torch.no_grad():
        wanted = torch.softmax(teacher(**model_inputs(teacher, batch)).logits, -1)
    entropy = -(wanted * torch.log_softmax(logits, -1)).sum(-1).mean()
    (0.5 * entropy + 2.0 * functional.cross_entropy(logits, batch["labels"])).backward()
    ours, theirs = gradients(student), gradients(twin)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4)


def test_the_teacher_is_neither_registered_nor_saved_nor_trained_nor_switched():
    teacher, student = pair()
    before = copy.deepcopy(teacher.state_dict())
    # As a teacher is left by its fine-tuning.
    teacher.train()
    distiller = Distiller(
        student,
        [*many_terms(), Term("maps", AttributionObjective(Categorical()))],
        teacher=teacher,
        kind=CLASSIFICATION,
    ).train()
    mine = {p.data_ptr() for p in distiller.parameters()} | {t.data_ptr() for t in distiller.state_dict().values()}
    assert not mine & {p.data_ptr() for p in teacher.parameters()}
    assert not any(module is teacher for module in distiller.modules())
    assert not teacher.training and student.training
    distiller(batch_of())["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    distiller.eval()
    distiller.train()
    assert not teacher.training


def test_a_term_of_no_weight_is_not_even_captured():
    teacher, student = pair()
    silent = [Term(term.name, term.objective, 0.0) for term in many_terms() if term.name not in ("output", "task")]
    alone = Distiller(student, [Term("task", GoldObjective(Categorical()))], teacher=teacher, kind=CLASSIFICATION)
    few = hooks(teacher, student)
    alone.close()
    distiller = Distiller(
        student, [Term("task", GoldObjective(Categorical())), *silent], teacher=teacher, kind=CLASSIFICATION
    ).train()
    assert hooks(teacher, student) == few
    runs = Runs(teacher=teacher)
    assert set(distiller(batch_of())) == {"loss", "task"}
    assert runs.count["teacher"] == 0
    bridge = Term("wide", HiddenObjective([(1, 1)], widths=(32, 32), bridge=True), 0.0)
    assert not list(Distiller(student, [bridge], kind=CLASSIFICATION).objectives.parameters())


def test_the_teacher_does_not_run_when_only_its_known_logits_are_asked_for():
    teacher, student = pair()
    runs = Runs(teacher=teacher, body=teacher.base_model)
    terms = [Term("output", OutputObjective(Categorical())), Term("task", GoldObjective(Categorical()))]
    batch = batch_of()
    with torch.no_grad():
        table = teacher(**model_inputs(teacher, batch)).logits
    runs.count.clear()
    known = Distiller(
        student, terms, teacher=teacher, teacher_outputs=KnownOutputs({"logits": table}), kind=CLASSIFICATION
    ).train()
    values = known(batch)
    assert not runs.count
    runs.count.update(teacher=0, body=0)
    fresh = Distiller(student, terms, teacher=teacher, kind=CLASSIFICATION).train()(batch)
    assert runs.count == {"teacher": 1, "body": 1}
    for name in fresh:
        assert torch.equal(values[name], fresh[name])


def test_known_logits_belong_to_the_batch_by_index():
    teacher, student = pair()
    data, collate = rows(10), Collator(WORDS)
    with torch.no_grad():
        table = teacher(**model_inputs(teacher, collate(list(data)))).logits
    known = Distiller(
        student,
        [Term("output", OutputObjective(Categorical()))],
        teacher_outputs=KnownOutputs({"logits": table}),
        kind=CLASSIFICATION,
    ).train()
    live = Distiller(
        student, [Term("output", OutputObjective(Categorical()))], teacher=teacher, kind=CLASSIFICATION
    ).train()
    batch = collate([data[i] for i in (7, 2, 9, 2)])
    torch.testing.assert_close(known(batch)["output"], live(batch)["output"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("deepest", [0, 1, 3, 4])
def test_known_logits_spare_the_teachers_upper_blocks_and_give_the_same_loss(deepest: int):
    teacher, student = pair()
    batch = batch_of()
    with torch.no_grad():
        table = teacher(**model_inputs(teacher, batch)).logits
    terms = [Term("output", OutputObjective(Categorical())), Term("hidden", HiddenObjective([(1, deepest)]))]
    blocks = {str(number): block for number, block in enumerate(blocks_of(teacher), 1)}
    runs = Runs(**blocks, head=teacher.classifier)
    expected = Distiller(student, terms, teacher=teacher, kind=CLASSIFICATION).train()(batch)
    assert all(runs.count.values())
    runs.count = dict.fromkeys(runs.count, 0)
    student.zero_grad()
    spared = Distiller(
        student, terms, teacher=teacher, teacher_outputs=KnownOutputs({"logits": table}), kind=CLASSIFICATION
    ).train()
    found = spared(batch)
    assert runs.count == {**{str(n): int(n <= deepest) for n in range(1, 5)}, "head": 0}
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_a_teacher_whose_gradients_are_asked_for_speaks_for_itself():
    """A table of logits has no graph that leads back to the embeddings."""
    teacher, student = pair()
    terms = [Term("output", OutputObjective(Categorical())), Term("maps", AttributionObjective(Categorical()))]
    wrong = torch.full((6, 2), 100.0)
    expected = Distiller(student, terms, teacher=teacher, kind=CLASSIFICATION).train()(batch_of())
    found = Distiller(
        student, terms, teacher=teacher, teacher_outputs=KnownOutputs({"logits": wrong}), kind=CLASSIFICATION
    ).train()(batch_of())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_bridges_train_but_are_no_part_of_the_student():
    teacher, student = tiny("bert", layers=4, **OFF), tiny("bert", hidden=16, seed=1, **OFF)
    bridged = HiddenObjective([(1, 2), (2, 4)], widths=(16, 32), bridge=True)
    distiller = Distiller(student, [Term("hidden", bridged)], teacher=teacher, kind=CLASSIFICATION).train()
    inside = {name for name, _ in student.named_parameters()}
    everything = {name for name, _ in distiller.named_parameters()}
    extra = everything - {f"student.{name}" for name in inside}
    assert len(extra) == 2 and all(name.startswith("objectives.hidden.") for name in extra)
    distiller(batch_of())["loss"].backward()
    parameters = dict(distiller.named_parameters())
    assert all(parameters[name].grad.abs().sum() > 0 for name in extra)
    assert {key for key in distiller.state_dict() if key.startswith("objectives.")} == extra


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize(
    ("terms", "left_out"),
    [
        (many_terms, set()),
        (lambda: [Term("task", GoldObjective(Categorical()), 1.0)], set()),
        (lambda: [Term("hidden", HiddenObjective([(1, 2)]), 1.0)], {"layer.1", "pooler", "classifier"}),
        (lambda: [Term("mha", MatrixObjective([(2, 4)], ("query",)), 1.0)], {"key", "value", "output", "intermediate"}),
        (lambda: [Term("attribution", AttributionObjective(Categorical()), 1.0)], set()),
    ],
)
def test_what_gets_no_gradient_is_known_before_training(
    terms: Callable[[], list[Term]], left_out: set[str], chains: bool
):
    teacher = tiny("bert", layers=4)
    student = tiny("bert", seed=1)
    if chains:
        overparameterise(student, OverparamSection(length=1))
    distiller = Distiller(student, terms(), teacher=teacher, kind=CLASSIFICATION)
    distiller.train()
    student.bert.embeddings.eval()
    modes = [module.training for module in distiller.modules()]
    state = torch.get_rng_state()
    found = set(distiller.without_gradient(batch_of(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in distiller.modules()] == modes and not gradients(distiller)
    distiller(batch_of())["loss"].backward()
    assert found == {name for name, _ in distiller.named_parameters()} - set(gradients(distiller))
    assert bool(found) == bool(left_out) and all(any(word in name for name in found) for word in left_out)


def test_in_eval_mode_only_the_students_logits_come():
    teacher, student = pair()
    distiller = Distiller(student, many_terms(), teacher=teacher, kind=CLASSIFICATION).eval()
    runs = Runs(teacher=teacher)
    batch = batch_of()
    result = distiller(batch)
    assert set(result) == {"logits"} and runs.count["teacher"] == 0
    torch.testing.assert_close(result["logits"], student(**model_inputs(student, batch)).logits)


def test_two_terms_of_one_name_are_refused_rather_than_one_of_them_lost():
    _, student = pair()
    with pytest.raises(ValueError, match="task"):
        Distiller(
            student,
            [Term("task", GoldObjective(Categorical()), 1.0), Term("task", GoldObjective(Categorical()), 2.0)],
            kind=CLASSIFICATION,
        )
    with pytest.raises(ValueError, match="loss"):
        Distiller(student, [Term("loss", GoldObjective(Categorical()))], kind=CLASSIFICATION)
    Distiller(
        student,
        [Term("task", GoldObjective(Categorical()), 1.0), Term("task", GoldObjective(Categorical()), 0.0)],
        kind=CLASSIFICATION,
    )


def test_closing_removes_all_hooks_and_what_the_models_say_is_unchanged():
    teacher, student = pair()
    batch = batch_of()
    with torch.no_grad():
        before = [model(**model_inputs(model, batch)).logits for model in (teacher, student)]
    none = hooks(teacher, student)
    distiller = Distiller(
        student,
        [*many_terms(), Term("maps", AttributionObjective(Categorical(), steps=2))],
        teacher=teacher,
        kind=CLASSIFICATION,
    )
    assert hooks(teacher, student) > none
    distiller.train()(batch)
    with torch.no_grad():
        during = [model.eval()(**model_inputs(model, batch)).logits for model in (teacher, student)]
    distiller.close()
    assert hooks(teacher, student) == none
    for one, other in zip(before, during, strict=True):
        assert torch.equal(one, other)


def test_nothing_of_a_step_is_kept_alive_after_it():
    import gc
    import weakref

    teacher, student = pair()
    distiller = Distiller(student, many_terms(), teacher=teacher, kind=CLASSIFICATION).train()
    seen: list[Any] = []
    handle = blocks_of(student)[0].register_forward_hook(
        lambda module, inputs, output: seen.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
    )
    distiller(batch_of())["loss"].backward()
    handle.remove()
    gc.collect()
    assert seen and all(reference() is None for reference in seen)
