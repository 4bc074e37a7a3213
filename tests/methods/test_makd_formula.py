"""MaKD's loss on real tiny models against the formula, written out over what the library itself gives."""

import copy
from typing import Any

import pytest
import torch
from families import tiny, tokenizer
from torch import Tensor, nn
from torch.nn import functional
from training.stages import rows
from transformers import PreTrainedModel

from kdcli.methods import registry
from kdcli.methods.base import Context
from kdcli.models.inputs import model_inputs
from kdcli.models.shape import shape_of
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.encode import Collator
from kdcli.training.step import Distiller

PAIRS = [(1, 2), (2, 4)]
HEADS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
FEED_FORWARD = ("intermediate.dense", "output.dense")


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a teacher of four blocks and a student of two, in eager attention, which gives its maps away."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    teacher, student = tiny("bert", layers=4, labels=3, **off), tiny("bert", layers=2, labels=3, seed=1, **off)
    with torch.no_grad():
        # Queries and keys that cannot be taken for each other; outputs of matrices and blocks of different sizes.
        for model in (teacher, student):
            for number, block in enumerate(model.bert.encoder.layer, 1):
                block.attention.self.query.weight.mul_(0.3 * number)
                block.attention.self.key.bias.add_(1.0)
                block.intermediate.dense.weight.mul_(1.0 + number)
                block.output.LayerNorm.weight.mul_(1.0 + 0.5 * number)
    return teacher, student


def outputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Any, dict[tuple[int, str], Tensor]]:
    """Return what the model gives, and the outputs of the matrices of its blocks."""
    found: dict[tuple[int, str], Tensor] = {}
    handles = []
    for number, block in enumerate(model.bert.encoder.layer, 1):
        for name in (*HEADS, *FEED_FORWARD):
            module = block.get_submodule(name)
            assert isinstance(module, nn.Linear)
            keep = lambda _, __, output, key=(number, name): found.__setitem__(key, output)  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    output = model(**model_inputs(model, batch), output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    return output, found


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each example's real tokens, then over examples."""
    return torch.stack([row[kept].mean() for row, kept in zip(values, mask.bool(), strict=True)]).mean()


def squared(own: Tensor, other: Tensor, mask: Tensor, *, relative: bool) -> Tensor:
    terms = []
    for b, kept in enumerate(mask.bool()):
        error = (own[b, kept] - other[b, kept]).square().mean()
        terms.append(error / other[b, kept].square().mean() if relative else error)
    return torch.stack(terms).mean()


def expected_terms(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    (mine, own), (yours, other) = outputs_of(student, batch), outputs_of(teacher, batch)
    mask = batch["attention_mask"]
    relative = options.get("matrix_norm", True)

    def matrices(names: tuple[str, ...]) -> Tensor:
        terms = [squared(own[s, n], other[t, n], mask, relative=relative) for s, t in PAIRS for n in names]
        return torch.stack(terms).mean()

    divergences, states = [], []
    for s, t in PAIRS:
        p, q = yours.attentions[t - 1], mine.attentions[s - 1]
        rows_of = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0).sum(-1)
        divergences.append(mean_of(rows_of.mean(1), mask))
        states.append(
            squared(mine.hidden_states[s], yours.hidden_states[t], mask, relative=options.get("hidden_norm", False))
        )
    size = options.get("temperature", 1.0)
    p, q = torch.softmax(yours.logits / size, -1), torch.softmax(mine.logits / size, -1)
    return {
        "mha": matrices(HEADS),
        "ffn": matrices(FEED_FORWARD),
        "attention": torch.stack(divergences).mean(),
        "hidden": torch.stack(states).mean(),
        "output": size**2 * (p * (p.log() - q.log())).sum(-1).mean(),
        "task": functional.cross_entropy(mine.logits, batch["labels"]),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matrix_norm": False, "hidden_norm": True, "temperature": 2.0, "alpha": 0.8},
        {"weights": {"matrix": 0.5, "layer": 2.0, "model": 3.0}, "terms": {"mha": 0.25, "ffn": 4.0, "hidden": 0.3}},
    ],
    ids=["defaults", "norms", "weights"],
)
def test_the_joint_loss_and_its_gradient_are_those_of_the_formula(options: dict[str, Any]):
    teacher, student = pair()
    twin = copy.deepcopy(student)
    data = [{**row, "labels": number % 3} for number, row in enumerate(rows(6))]
    batch = Collator(tokenizer())(data)
    method = registry.get("makd")
    context = Context(shape_of(teacher.config), shape_of(student.config), "depth", CLASSIFICATION, PAIRS)
    (stage,) = method.build(method.options.model_validate(options), context)
    distiller = Distiller(student, stage.terms, teacher=teacher, kind=CLASSIFICATION).train()
    found = distiller(batch)

    expected = expected_terms(twin, teacher, batch, options)
    assert float(expected["mha"].detach()) != pytest.approx(float(expected["ffn"].detach()), rel=0.1)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6, msg=name)
    level = {"matrix": 1.0, "layer": 1.0, "model": 1.0, **options.get("weights", {})}
    term = {"mha": 1.0, "ffn": 1.0, "attention": 1.0, "hidden": 1.0, **options.get("terms", {})}
    alpha = options.get("alpha", 0.5)
    loss = (
        level["matrix"] * (term["mha"] * expected["mha"] + term["ffn"] * expected["ffn"])
        + level["layer"] * (term["attention"] * expected["attention"] + term["hidden"] * expected["hidden"])
        + level["model"] * (alpha * expected["output"] + (1 - alpha) * expected["task"])
    )
    torch.testing.assert_close(found["loss"], loss, rtol=1e-4, atol=1e-6)
    found["loss"].backward()
    loss.backward()
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    distiller.close()


@pytest.mark.parametrize("name, option", [("makd", "hidden_norm"), ("hs", "match_norm")])
def test_states_of_decoders_are_compared_relative_to_their_size_unless_a_recipe_says_otherwise(name: str, option: str):
    method = registry.get(name)
    for family, given, relative in (("llama", {}, True), ("llama", {option: False}, False), ("bert", {}, False)):
        shape = shape_of(tiny(family).config)
        context = Context(shape, shape, "depth", CLASSIFICATION, [(1, 1), (2, 2)])
        (stage,) = method.build(method.options.model_validate(given), context)
        (hidden,) = (term.objective for term in stage.terms if term.name == "hidden")
        assert hidden.match_norm is relative
