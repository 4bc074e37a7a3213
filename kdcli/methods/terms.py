"""What several methods share: the terms of a prediction beside their own, and checks of two models' shapes."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Options, Term
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.task import TaskObjective
from kdcli.objectives.vocabulary import MaskedLMObjective

Weight = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Temperature = Annotated[float, Field(gt=0.0)]

ALL_KINDS = frozenset({"classification", "regression", "text"})


class PredictionWeights(Options):
    """prediction: of logits and gold labels, on a task with labels; mlm: of the hidden words, on plain text."""

    prediction: Weight = 1.0
    mlm: Weight = 0.0


def prediction_terms(context: Context, weights: PredictionWeights, alpha: float, temperature: float) -> list[Term]:
    """Return the teacher's prediction and the gold labels, alpha to 1 - alpha; on plain text the hidden words."""
    if context.kind == "text":
        return [Term("mlm", MaskedLMObjective(), weights.mlm)]
    return [
        Term("output", OutputObjective(context.kind, temperature), weights.prediction * alpha),
        Term("task", TaskObjective(context.kind), weights.prediction * (1.0 - alpha)),
    ]


def weighted(terms: Iterable[Term]) -> list[Term]:
    """Return the terms that weigh something: of the others nothing is captured. Raises InputError without any."""
    found = [term for term in terms if term.weight > 0]
    if not found:
        raise InputError("all terms of this method have the weight 0 on this task", where="method.weights")
    return found


def refuse_strangers(options: BaseModel, context: Context, *, labels: Iterable[str], text: Iterable[str] = ()) -> None:
    """Raise InputError for an option that says nothing on this kind of task.

    labels, text: options (`alpha`, `weights.mlm`) that only tasks with labels, or only plain text, have.
    """
    strangers = labels if context.kind == "text" else text
    for name in strangers:
        inner: BaseModel = options
        *path, last = name.split(".")
        for part in path:
            inner = getattr(inner, part)
        if last in inner.model_fields_set:
            kind = "plain text" if context.kind == "text" else "a task with labels"
            raise InputError(f"{name} means nothing on {kind}", where=f"method.{name}", hint="leave it out")


def need_equal_vocabulary(context: Context) -> None:
    """Raise InputError when both models do not predict the same words."""
    teacher, student = context.teacher.vocab, context.student.vocab
    if teacher != student:
        raise InputError(
            f"words can be compared over the same vocabulary only; the teacher's has {teacher:,} tokens, the "
            f"student's {student:,}",
            where="student",
            hint="choose a student with the teacher's tokenizer",
        )


def need_equal_heads(context: Context, where: str = "student.heads", otherwise: str = "") -> None:
    """Raise InputError, with the nearest student that works, when the numbers of attention heads differ.

    otherwise: another way out, for the hint.
    """
    teacher, student = context.teacher, context.student
    if teacher.heads == student.heads:
        return
    if context.student_form == "checkpoint":
        hint = f"choose a student with {teacher.heads} heads"
    elif student.hidden % teacher.heads == 0:
        hint = f"use student.heads = {teacher.heads}"
    else:
        width = max(1, round(student.hidden / teacher.heads)) * teacher.heads
        hint = f"use student.hidden_size = {width} and student.heads = {teacher.heads}"
    raise InputError(
        f"attention can be compared between equal numbers of heads, not {teacher.heads} of the teacher and "
        f"{student.heads} of the student",
        where=where,
        hint=f"{hint}, or {otherwise}" if otherwise else hint,
    )


def needs_bridge(bridge: bool | None, context: Context) -> bool:
    """Return whether hidden states go through learned maps: as asked for, else where widths differ.

    Raises InputError when there must be one and the recipe says no.
    """
    differ = context.teacher.hidden != context.student.hidden
    if differ and bridge is False:
        raise InputError(
            f"hidden states of {context.student.hidden} and {context.teacher.hidden} features need a bridge",
            where="method.bridge",
            hint="leave it out, or make the student as wide as the teacher",
        )
    return differ if bridge is None else bridge
