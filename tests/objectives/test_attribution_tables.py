"""Attribution maps of several predictions an example: starts and ends of spans, and a tag for each labelled token."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

from kdcli.models.capture import Capture
from kdcli.models.inputs import model_inputs
from kdcli.objectives.attribution import AttributionObjective
from kdcli.objectives.distribution import Categorical, row_weights
from kdcli.signals import Prediction, Signals

WORDS = tokenizer()
LOW = -1e4


def no_positions(batch: Any, *, everywhere: bool = False) -> None:
    return None


def spans(output: Any, batch: Any, *, everywhere: bool = False) -> list[Prediction]:
    both = zip((output.start_logits, output.end_logits), batch["labels"].unbind(1), strict=True)
    return [Prediction(z.masked_fill(batch["attention_mask"] == 0, LOW), target=gold) for z, gold in both]


def tags(output: Any, batch: Any, *, everywhere: bool = False) -> list[Prediction]:
    labels = batch["labels"].flatten()
    places = (labels != -100).nonzero().squeeze(-1)
    weights = row_weights(places, *batch["labels"].shape)
    return [Prediction(output.logits.flatten(0, 1)[places], weights, labels[places])]


def loss_of_span(output: Any, labels: Tensor) -> list[Tensor]:
    both = zip((output.start_logits, output.end_logits), labels[0], strict=True)
    return [functional.cross_entropy(z[0], gold) for z, gold in both]


def loss_of_tags(output: Any, labels: Tensor) -> list[Tensor]:
    return [functional.cross_entropy(output.logits[0], labels[0], ignore_index=-100, reduction="sum")]


KINDS: dict[str, tuple[Any, Any, Callable[..., list[Tensor]]]] = {
    "spans": (AutoModelForQuestionAnswering, spans, loss_of_span),
    "tags": (AutoModelForTokenClassification, tags, loss_of_tags),
}


def batch_of(kind: str, texts: list[str]) -> dict[str, Tensor]:
    batch = dict(WORDS(texts, padding=True, return_tensors="pt"))
    mask = batch["attention_mask"]
    last = mask.sum(1) - 1
    if kind == "spans":
        batch["labels"] = torch.stack([torch.ones_like(last), last - 1], dim=1)
    else:
        places = torch.arange(mask.shape[1]).expand_as(mask)
        labelled = (places % 2 == 1) & (places < last[:, None])
        batch["labels"] = torch.where(labelled, places % 5, -100)
    return batch


TEXTS = ["the film was dull", "although it rained , the plot seemed really gripping", "witty"]


def model_of(kind: str, seed: int, layers: int = 2) -> Any:
    base = tiny("bert", layers=layers, labels=2 if kind == "spans" else 5, seed=seed)
    torch.manual_seed(seed)
    model = KINDS[kind][0].from_config(base.config).eval()
    model.bert.load_state_dict(base.bert.state_dict(), strict=False)
    return model


def signals_of(kind: str, model: Any, batch: dict[str, Tensor], request: Any) -> Signals:
    capture: Any = SimpleNamespace(positions=no_positions, predictions=KINDS[kind][1])
    with Capture(model, request, capture) as found:
        signals = found.run(batch)
    found.close()
    return signals


def value_of(kind: str, student: Any, teacher: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    objective = AttributionObjective(Categorical(), one_each=False, **options)
    own = signals_of(kind, student, batch, objective.student_request())
    other = signals_of(kind, teacher, batch, objective.teacher_request())
    return objective(own, other, batch)


def maps_by_hand(kind: str, model: Any, one: dict[str, Tensor]) -> list[Tensor]:
    """Gradient x input of one example, a map a table, by the model's own word embeddings."""
    x = model(**model_inputs(model, one), output_hidden_states=True).hidden_states[0].detach().requires_grad_()
    handle = model.bert.embeddings.register_forward_hook(lambda *_: x)
    losses = KINDS[kind][2](model(**model_inputs(model, one)), one["labels"])
    handle.remove()
    rows = [(torch.autograd.grad(loss, x, retain_graph=True)[0] * x).detach()[0].norm(dim=-1) for loss in losses]
    return [row / row.norm() for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_each_table_has_the_map_of_its_gold_answers(kind: str):
    student, teacher = model_of(kind, 1, layers=1), model_of(kind, 2)
    expected = []
    for text in TEXTS:
        one = batch_of(kind, [text])
        own, other = maps_by_hand(kind, student, one), maps_by_hand(kind, teacher, one)
        expected.append(sum((a - b).square().mean().item() for a, b in zip(own, other, strict=True)))
    found = value_of(kind, student, teacher, batch_of(kind, TEXTS)).item()
    assert found == pytest.approx(sum(expected) / len(TEXTS), rel=1e-3)
    assert found > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_counts_the_same_whatever_stands_beside_it(kind: str):
    student, teacher = model_of(kind, 1, layers=1), model_of(kind, 2)
    alone = [value_of(kind, student, teacher, batch_of(kind, [text]), steps=2).item() for text in TEXTS]
    together = value_of(kind, student, teacher, batch_of(kind, TEXTS), steps=2).item()
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_can_learn_it_and_a_copy_of_the_teacher_has_nothing_to_learn(kind: str):
    batch, teacher = batch_of(kind, TEXTS), model_of(kind, 2)
    assert value_of(kind, model_of(kind, 2), teacher, batch).item() < 1e-8
    student = model_of(kind, 1)
    before = value_of(kind, student, teacher, batch)
    gradients = torch.autograd.grad(before, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    length = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            if gradient is not None:
                parameter -= 1e-3 * gradient / length
    after = value_of(kind, student, teacher, batch)
    assert after.item() < before.item()
    assert (before - after).item() == pytest.approx(1e-3 * length.item(), rel=0.3)
