"""The term that aligns a student of projections with its teacher: of shapes alone, beside the terms of every method."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdcli.errors import InputError
from kdcli.methods.base import Stage, Term
from kdcli.models.families import family_of
from kdcli.models.student import StudentBuild
from kdcli.objectives.hidden import ProjectionObjective
from kdcli.recipe.schema import StudentSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def alignment_of(teacher: "PreTrainedModel", build: StudentBuild, section: StudentSection) -> list[Term]:
    """Return the term that compares a student of projections with `teacher`; nothing for other students."""
    if not build.projected or section.alignment == 0:
        return []
    assert build.teacher_layers is not None
    family = family_of(teacher.config)
    # Turned by their positions, queries and keys pass through no projection any more.
    names = [name for name in family.matrices if not (family.rotary and name in ("query", "key"))]
    pairs = [(number, layer + 1) for number, layer in enumerate(build.teacher_layers, 1)]
    return [Term("alignment", ProjectionObjective(pairs, names), section.alignment)]


def aligned(stages: Sequence[Stage], alignment: Sequence[Term], *, known: bool) -> list[Stage]:
    """Return a method's stages, those in which a teacher runs beside the student with the alignment added, in place.

    known: whether the teacher is a model here. Raises InputError for a weight in the recipe that no stage could use.
    """
    added = [stage for stage in stages if known and (stage.scheme is None or stage.scheme.runs_teacher)]
    for stage in added:
        stage.terms = [*stage.terms, *alignment]
    default = StudentSection.model_fields["alignment"].default
    if not added and any(term.weight != default for term in alignment):
        raise InputError(
            "no teacher runs beside the student here, so there is nothing to align it with",
            where="student.alignment",
            hint="leave it out",
        )
    return list(stages)
