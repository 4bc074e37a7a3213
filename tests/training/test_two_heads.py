"""A student of two heads (DeiT): the class head learns from gold labels, the distillation head from the teacher."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate
from training.stages import setting
from transformers import PreTrainedModel

from kdcli.methods import registry
from kdcli.methods.base import Context
from kdcli.models.classes import reorder_classes
from kdcli.models.probe import probe
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Divergence, Term
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.image_classification import KIND
from kdcli.training.schemes.lgtm import LGTMScheme
from kdcli.training.step import Distiller

TWO_HEADS = {"architectures": ["DeiTForImageClassificationWithTeacher"]}
CLASSES = 5


def deit(seed: int = 1) -> PreTrainedModel:
    return tiny("deit", labels=CLASSES, seed=seed, **TWO_HEADS)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 16, 16, generator=generator)
    return {"index": torch.arange(6), "pixel_values": pixels, "labels": torch.arange(6) % CLASSES}


def loss_of(batch: dict[str, Tensor], student: PreTrainedModel, teacher: PreTrainedModel, *terms: Term) -> Tensor:
    """Return the loss of a step, whose gradients are then in the student."""
    loss = Distiller(student, list(terms), kind=KIND, teacher=teacher)(batch)["loss"]
    loss.backward()
    return loss.detach()


def gold(weight: float = 0.4) -> Term:
    return Term("task", GoldObjective(KIND.distribution), weight)


def output(weight: float = 0.6, divergence: Divergence | None = None) -> Term:
    distribution = KIND.distribution if divergence is None else KIND.distribution.compared_by(divergence)
    return Term("output", OutputObjective(distribution, 1.0), weight)


def test_each_head_learns_from_its_own(batch: dict[str, Tensor]):
    student, teacher = deit(), tiny("vit", labels=CLASSES)
    loss = loss_of(batch, student, teacher, gold(), output())
    pixels = batch["pixel_values"]
    found, taught = student(pixels), teacher(pixels).logits.softmax(-1)
    own = functional.cross_entropy(found.cls_logits, batch["labels"])
    other = (taught * (taught.log() - found.distillation_logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, 0.4 * own + 0.6 * other)
    for head, part in ((student.cls_classifier, 0.4 * own), (student.distillation_classifier, 0.6 * other)):
        (expected,) = torch.autograd.grad(part, [head.weight], retain_graph=True)
        torch.testing.assert_close(head.weight.grad, expected)


def test_the_published_recipe_takes_the_teacher_s_most_probable_class(batch: dict[str, Tensor]):
    # Touvron et al. 2021, arXiv 2012.12877, equation 3.
    student, teacher = deit(), tiny("vit", labels=CLASSES)
    loss = loss_of(batch, student, teacher, gold(0.5), output(0.5, Divergence("hard")))
    pixels = batch["pixel_values"]
    found, best = student(pixels), teacher(pixels).logits.argmax(-1)
    own, other = (
        functional.cross_entropy(logits, target)
        for logits, target in ((found.cls_logits, batch["labels"]), (found.distillation_logits, best))
    )
    torch.testing.assert_close(loss, (own + other) / 2)


@pytest.mark.parametrize("alone", [gold, output])
def test_from_one_alone_both_heads_learn_by_their_mean(batch: dict[str, Tensor], alone: type):
    student, teacher = deit(), tiny("vit", labels=CLASSES)
    loss = loss_of(batch, student, teacher, alone(1.0))
    logits, target = student(batch["pixel_values"]).logits, teacher(batch["pixel_values"]).logits.softmax(-1)
    if alone is gold:
        expected = functional.cross_entropy(logits, batch["labels"])
    else:
        expected = functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    heads = student.cls_classifier, student.distillation_classifier
    assert all(head.weight.grad.abs().sum() > 0 for head in heads)


def test_a_teacher_of_two_heads_teaches_by_their_mean(batch: dict[str, Tensor]):
    teacher = deit(2)
    losses = [loss_of(batch, deit(), teacher, gold(), output()) for _ in range(2)]
    torch.testing.assert_close(losses[0], losses[1])
    student = deit()
    target = teacher(batch["pixel_values"]).logits.softmax(-1)
    found = student(batch["pixel_values"])
    other = functional.kl_div(found.distillation_logits.log_softmax(-1), target, reduction="batchmean")
    own = functional.cross_entropy(found.cls_logits, batch["labels"])
    torch.testing.assert_close(losses[0], 0.4 * own + 0.6 * other)


def test_classes_are_put_in_order_in_both_heads():
    model = deit()
    before = probe(model)
    reorder_classes(model, [4, 2, 0, 1, 3])
    torch.testing.assert_close(probe(model), before[:, [4, 2, 0, 1, 3]])


def test_two_heads_are_said_to_part():
    build = build_student(deit(), StudentSection(form="depth", layers=1), seed=0)
    assert any("two heads" in note for note in build.notes)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_look_ahead_of_lgtm_follows_the_loss_of_the_step(
    alpha: float, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    student, teacher = deit(), deit(2)
    parameters, found = list(student.parameters()), []
    direction = LGTMScheme.direction

    def note(scheme: LGTMScheme, loss: Tensor, *others: Any) -> list[Tensor]:
        found.extend(torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True))
        return direction(scheme, loss, *others)

    monkeypatch.setattr(LGTMScheme, "direction", note)
    method, shape = registry.get("lgtm"), shape_of(student.config)
    context = Context(shape, shape, "checkpoint", KIND, [(1, 1), (2, 2)])
    (stage,) = method.build(method.options(alpha_student=alpha, held_out=0.5), context)
    expected = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for _ in [loss_of(batch, student, teacher, *stage.terms)]
        for parameter in parameters
    ]
    rows = Dataset.from_dict({name: column.tolist() for name, column in batch.items()} | {"length": [1] * 6})
    place = setting(student, teacher, rows.with_format("torch"), batch_size=3)
    scheme = stage.scheme
    scheme.begin(replace(place, collator=default_collate))
    scheme.place(torch.device("cpu"))
    scheme.before_step(0, batch, torch.optim.AdamW(parameters, lr=1e-3))
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if gradient is None else gradient, other)
