"""Which tokens of an image two models are compared at."""

from typing import Any

import pytest
import torch
from families import IMAGES, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context
from kdcli.models.capture import Capture
from kdcli.models.shape import shape_of
from kdcli.models.tokens import shared_tokens
from kdcli.objectives.hidden import HiddenObjective
from kdcli.objectives.relation import RelationObjective
from kdcli.objectives.term import Term
from kdcli.signals import Request
from kdcli.tasks import registry as kinds
from kdcli.training.step import Distiller

KIND = kinds.get("image-classification")
COMPARED = [name for name in IMAGES if shape_of(tiny(name).config).tokens is not None]


@pytest.mark.parametrize("family", COMPARED)
def test_patches_stand_last_from_left_to_right_and_from_top_to_bottom(family: str):
    model = tiny(family)
    tokens = shape_of(model.config).tokens
    assert tokens is not None
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    # The second patch of the first row, and the first of the last one.
    pixels[1, :, 0:4, 4:8] += 1.0
    pixels[2, :, 12:16, 0:4] += 1.0
    capture = Capture(model, Request(hidden=frozenset({0})), KIND)
    with torch.no_grad(), capture:
        states = capture.run({"pixel_values": pixels}).hidden[0]
    capture.close()
    assert states.shape[1] == tokens
    for image, patch in ((1, 1), (2, 12)):
        changed = (states[image] - states[0]).abs().sum(-1).nonzero().flatten().tolist()
        assert changed == [tokens - 16 + patch]


def test_of_other_special_tokens_the_class_token_and_the_patches_are_left():
    shapes = {name: shape_of(tiny(name).config) for name in ("vit", "deit", "ijepa")}
    assert shared_tokens(shapes["vit"], shapes["vit"]) is None
    assert shared_tokens(shapes["deit"], shapes["deit"]) is None
    assert shared_tokens(shapes["vit"], shapes["deit"]) == ([*range(17)], [0, *range(2, 18)])
    assert shared_tokens(shapes["deit"], shapes["ijepa"]) == ([*range(2, 18)], [*range(16)])
    assert shared_tokens(shape_of(tiny("bert").config), shape_of(tiny("roberta").config)) is None
    with pytest.raises(
        InputError, match=r"tokens of the student's 2 x 2 patches .* among the teacher's 4 x 4"
    ) as caught:
        shared_tokens(shape_of(tiny("vit", patch_size=8).config), shapes["deit"])
    assert "4 x 4" in (caught.value.hint or "")


def test_a_student_without_a_distillation_token_follows_the_other_tokens():
    teacher, student = tiny("deit", labels=3), tiny("vit", labels=3, seed=1)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    terms = [
        Term("hidden", HiddenObjective([(1, 1)]), 1.0),
        Term("relation", RelationObjective([(2, 2)], relations={("value", "value"): 1.0}), 1.0),
    ]
    distiller = Distiller(student, terms, kind=KIND, teacher=teacher)
    distiller.train()
    student.eval()
    found = distiller(batch)
    distiller.close()

    values = {}
    for model in (student, teacher):
        values_of = model.base_model.layers[1].attention.v_proj
        values_of.register_forward_hook(lambda _, __, output, key=model: values.__setitem__(key, output))
    pixels = batch["pixel_values"]
    own, other = (
        model(pixel_values=pixels, output_hidden_states=True).hidden_states[1] for model in (student, teacher)
    )
    kept = [0, *range(2, 18)]
    torch.testing.assert_close(found["hidden"], (own - other[:, kept]).square().mean())
    heads = (values[model].unflatten(-1, (4, 8)).transpose(1, 2) for model in (student, teacher))
    own, other = next(heads), next(heads)[:, :, kept]
    own, other = (torch.log_softmax(side @ side.mT / 8**0.5, -1) for side in (own, other))
    torch.testing.assert_close(found["relation"], (other.exp() * (other - own)).sum(-1).mean())


@pytest.mark.parametrize(
    ("teacher", "student"), [("vit", "deit"), ("vit", "dinov2_with_registers"), ("deit", "vit"), ("deit", "deit")]
)
@pytest.mark.parametrize("options", [{"schedule": "staged"}, {"matrix_inputs": "teacher"}])
def test_a_student_of_more_tokens_learns_matrices_on_the_inputs_of_the_teacher(
    teacher: str, student: str, options: dict[str, Any]
):
    theirs, own = tiny(teacher, labels=3), tiny(student, labels=3, seed=1)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    shapes = shape_of(theirs.config), shape_of(own.config)
    context = Context(*shapes, "checkpoint", KIND, [(1, 1), (2, 2)])
    method = registry.get("makd")
    values = []
    for stage in method.build(method.options(**options), context):
        distiller = Distiller(own, stage.terms, kind=KIND, teacher=theirs)
        values.append(distiller(batch))
        distiller.close()
    assert all(torch.isfinite(value["loss"]) for value in values)

    def linears(model: PreTrainedModel) -> list[nn.Module]:
        return [module for name, module in model.named_modules() if name.endswith((".fc1", ".fc2"))]

    kept = (shared_tokens(shapes[1], shapes[0]) or (None, [*range(shapes[0].tokens or 0)]))[1]
    taken: list[tuple[Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, given, output: taken.append((given[0][:, kept], output[:, kept])))
        for module in linears(theirs)
    ]
    theirs(batch["pixel_values"])
    for hook in hooks:
        hook.remove()
    found = [module(x) for module, (x, _) in zip(linears(own), taken, strict=True)]
    errors = [
        ((mine - other).square().sum(-1) / other.square().sum(-1)).mean()
        for mine, (_, other) in zip(found, taken, strict=True)
    ]
    torch.testing.assert_close(values[0]["ffn"], torch.stack(errors).mean())
