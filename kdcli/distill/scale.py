"""What sharding and activation checkpointing ask of a recipe, checked when it is planned."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kdcli.errors import InputError
from kdcli.methods.base import Stage
from kdcli.models.families import family_of
from kdcli.models.sharding import units_of
from kdcli.recipe.schema import OverparamSection, Recipe
from kdcli.signals import Request
from kdcli.training.distributed import may_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_scale(
    recipe: Recipe, stages: Sequence[Stage], student: "PreTrainedModel", overparam: OverparamSection | None
) -> None:
    """Raise InputError where a student cannot be trained sharded, or with activation checkpointing, as a recipe asks.

    student: its shape.
    """
    name = recipe.method.name
    request = _student_request(stages)
    if recipe.train.gradient_checkpointing:
        reason = None
        if not student.supports_gradient_checkpointing:
            reason = f"the library has none for {family_of(student.config).title}"
        elif request.gradients > 1:
            reason = f"{name} differentiates the student's gradients, which needs all activations"
        if reason is not None:
            raise InputError(
                f"activations cannot be checkpointed: {reason}",
                where="train.gradient_checkpointing",
                hint="leave it out",
            )
    if may_shard(recipe.train.sharding):
        reasons = _unsharded(name, stages, request, student, overparam)
        if reasons:
            raise InputError(
                f"the student cannot be sharded: {reasons[0]}",
                where="train.sharding",
                hint='use "none", which gives each process a whole student',
            )


def _unsharded(
    name: str,
    stages: Sequence[Stage],
    request: Request,
    student: "PreTrainedModel",
    overparam: OverparamSection | None,
) -> list[str]:
    """Return the reasons for which a student's weights cannot be shared out over processes."""
    reasons = []
    if any(stage.scheme is not None and not stage.scheme.works_sharded for stage in stages):
        reasons.append(f"{name} changes how a training step runs, and looks at weights that other processes hold")
    if overparam is not None and overparam.aux_weight > 0:
        reasons.append(
            "the loss between the chains of both models looks at all weights at once; overparam.aux_weight = 0 drops it"
        )
    if request.gradients:
        reasons.append(f"{name} differentiates by the student's embeddings within a step")
    if request.local or request.projections or request.factors:
        reasons.append(f"{name} uses weights of the student's blocks beside their forward pass")
    counts = Counter(parameter for unit in _parts(student) for parameter in set(unit))
    if any(count > 1 for count in counts.values()):
        reasons.append("its blocks share weights, and are gathered one after the other")
    return reasons


def _parts(student: "PreTrainedModel") -> Iterable[list[int]]:
    """Yield the parameters of each part that is gathered on its own: the blocks, and the rest."""
    units = [[id(parameter) for parameter in unit.parameters()] for unit in units_of(student)]
    inside = {id(module) for unit in units_of(student) for module in unit.modules()}
    yield from units
    yield [
        id(parameter)
        for module in student.modules()
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    ]


def _student_request(stages: Iterable[Stage]) -> Request:
    """Return what all stages together ask of the student."""
    request = Request()
    for stage in stages:
        for term in stage.terms:
            if term.weight > 0:
                request |= term.objective.student_request()
    return request
