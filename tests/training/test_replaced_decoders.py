"""Theseus on decoders: blocks of two models in one pass, each with keys and values of this pass alone."""

import copy
from typing import Any

import pytest
import torch
from families import tiny
from training.stages import batch_of, rows, setting

from kdcli.models.blocks import blocks_of
from kdcli.models.inputs import model_inputs
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection
from kdcli.training.schemes.theseus import Replacement, TheseusScheme

STILL: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "llama": {},
    "opt": {"dropout": 0.0},
}


@pytest.mark.parametrize("family", STILL)
def test_a_replaced_block_of_a_decoder_runs_among_those_of_the_teacher(family: str) -> None:
    teacher = tiny(family, layers=4, **STILL[family])
    student = build_student(teacher, StudentSection(form="depth", layers=2, select="first"), seed=0).model
    with torch.no_grad():
        for parameter in blocks_of(student).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    alone = copy.deepcopy(student)
    place = setting(student, teacher, rows(16))
    scheme = TheseusScheme(Replacement())
    scheme.begin(place)
    student.train()
    inputs = model_inputs(student, batch_of(place))
    for drawn in ([True, False], [False, True], [True, True], [False, False]):
        for unit, replaced in zip(scheme.units, drawn, strict=True):
            unit.replaced = replaced
        mixed = copy.deepcopy(teacher)
        ours = copy.deepcopy(blocks_of(alone))
        groups = [[ours[k]] if drawn[k] else list(blocks_of(mixed)[2 * k : 2 * k + 2]) for k in (0, 1)]
        path, _, name = place_of_blocks(mixed)
        setattr(mixed.get_submodule(path), name, torch.nn.ModuleList([block for group in groups for block in group]))
        torch.testing.assert_close(student(**inputs).logits, mixed(**inputs).logits, atol=1e-6, rtol=0)


def place_of_blocks(model: torch.nn.Module) -> tuple[str, str, str]:
    """Return where a model's list of blocks is: the module, and its name there."""
    blocks = blocks_of(model)  # type: ignore[arg-type]
    path = next(name for name, module in model.named_modules() if module is blocks)
    return path.rpartition(".")
