"""What `teacher.cache = "all"` keeps for a student: planned from its stages, and refused where it cannot be kept."""

import functools
import operator
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.errors import InputError
from kdcli.methods.base import Stage, Term
from kdcli.recipe.schema import Recipe
from kdcli.signals import Request
from kdcli.training.teacher_states import Layout, layout_of
from kdcli.words import one

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind

FOLDER = "states"
"""Where they are, in the folder of a student's checkpoints."""


@dataclass(frozen=True)
class StatesPlan:
    """What the stages of one student ask for together, and the table that holds it."""

    request: Request
    layout: Layout


def plan_states(
    recipe: Recipe, kind: "TaskKind", stages: Sequence[Stage], teacher: "PreTrainedModel"
) -> StatesPlan | None:
    """Return what is to be kept of a teacher; None where the recipe does not ask, or the stages ask for predictions.

    Raises InputError, with the reason, for what can never be kept.
    """
    if recipe.teacher.cache != "all":
        return None
    requests = [teacher_request(stage.terms) for stage in stages]
    request = functools.reduce(operator.or_, filter(can_be_kept, requests), Request())
    name = recipe.method.name
    reasons = [f"{name}: {stage.scheme.unkept}" for stage in stages if stage.scheme is not None and stage.scheme.unkept]
    if any(each.gradients for each in requests):
        reasons.append(f"{name} compares gradients of the teacher, which are no states")
    if not request.inside and any(each.linear for each in requests):
        reasons.append(f"{name} feeds matrices the teacher's inputs, with which the teacher runs in each step")
    if kind.inputs_change:
        reasons.append(f"on {one(kind.name)} task the inputs are drawn again in every epoch")
    elif kind.chosen_by_loss:
        reasons.append(
            f"on {one(kind.name)} task checkpoints are chosen by the loss on other rows than those of training"
        )
    if reasons:
        raise InputError(
            f"the teacher's states cannot be kept: {reasons[0]}", where="teacher.cache", hint=without_states(kind)
        )
    return StatesPlan(request, layout_of(teacher, request, recipe.teacher.cache_dtype)) if request.inside else None


def without_states(kind: "TaskKind") -> str:
    """Return the hint where states cannot be kept: predictions can, unless inputs change."""
    return "set teacher.cache = false, or leave it out" if kind.inputs_change else "set teacher.cache = true"


def teacher_request(terms: Iterable[Term]) -> Request:
    """Return what the terms of weight ask for of the teacher."""
    request = Request()
    for term in terms:
        if term.weight > 0:
            request |= term.objective.teacher_request()
    return request


def can_be_kept(request: Request) -> bool:
    """True when a stage asks for states of the inside, and for no inputs of matrices: there the teacher runs."""
    return request.inside and not request.linear


def check_room(sizes: dict[str, int], checkpoints: Path) -> None:
    """Raise InputError where a disk has less room than the states of a student need.

    sizes: bytes by student ("assistant", "student"); each is removed before the next is made. What an earlier start of
    this run has made counts as free.
    """
    if not any(sizes.values()):
        return
    place = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    for name, size in sizes.items():
        folder = checkpoints_of(checkpoints, name) / FOLDER
        there = sum(file.stat().st_size for file in folder.glob("*")) if folder.is_dir() else 0
        if size > free + there:
            raise InputError(
                f"the teacher's states for the {name} take {size / 1e9:,.2f} GB, and the disk of {checkpoints} has "
                f"{free / 1e9:,.2f} GB free",
                where="teacher.cache",
                hint='make room there, give another --output, set teacher.cache_dtype = "bf16" for half the size, or '
                "teacher.cache = true",
            )


def checkpoints_of(checkpoints: Path, follower: str) -> Path:
    """Return the folder of a student's checkpoints: the assistant's has its name."""
    return checkpoints if follower == "student" else checkpoints / follower
