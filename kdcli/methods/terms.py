"""What several methods share: the terms of a prediction beside their own, and checks of two models' shapes."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Options, Term
from kdcli.objectives.term import FORWARD_KL, Divergence, DivergenceName
from kdcli.recipe.schema import NonNegativeFloat
from kdcli.words import counted

Weight = NonNegativeFloat
Temperature = Annotated[float, Field(gt=0.0, le=1000.0)]
Between = Annotated[float, Field(gt=0.0, lt=1.0)]


class PredictionWeights(Options):
    """What the prediction weighs."""

    prediction: Weight = Field(
        default=1.0, description="All tasks but masked text: weight of the teacher's prediction and the gold labels."
    )
    mlm: Weight = Field(default=0.0, description="Masked text: weight of the masked tokens.")


def prediction_terms(context: Context, weights: PredictionWeights, alpha: float, temperature: float) -> list[Term]:
    """Return the teacher's prediction and the gold labels, alpha to 1 - alpha; on masked text the masked tokens."""
    if context.plain_text:
        return [context.gold_term(weights.mlm)]
    return context.prediction_terms(weights.prediction, alpha, temperature)


class DivergenceOptions(Options):
    """How the student's distributions over classes or tokens are compared with the teacher's."""

    divergence: DivergenceName = Field(
        default=FORWARD_KL.name,
        description='How predictions are compared: "kl" of the student from the teacher, "reverse-kl" of the teacher '
        'from the student, "js" (Jensen-Shannon, of both from a mean of both; GKD), "skew-kl" and "skew-reverse-kl" '
        '(of one from its mean with the other; DistiLLM), "hard" (cross-entropy with the most probable class of the '
        "teacher; DeiT). Tasks that predict no classes have the first alone.",
    )
    beta: Between = Field(
        default=FORWARD_KL.beta,
        description="Of js, the teacher's share in the mean. Near 0 gradients are like those of kl, near 1 of "
        "reverse-kl.",
    )
    skew: Between = Field(
        default=FORWARD_KL.skew,
        description="Of skew-kl the teacher's share in the mean, of skew-reverse-kl the student's.",
    )

    @property
    def comparison(self) -> Divergence:
        """The divergence, as `Context.output_term` takes it."""
        return Divergence(self.divergence, self.beta, self.skew)


def check_divergence(options: DivergenceOptions, context: Context) -> None:
    """Raise InputError for a divergence that the kind of task does not have, and options of another one."""
    context.kind.distribution.compared_by(options.comparison, where="method.divergence")
    for name, users in (("beta", ("js",)), ("skew", ("skew-kl", "skew-reverse-kl"))):
        if options.divergence not in users:
            refuse_idle(
                options, [name], f"beside divergence {options.divergence}", f"it belongs to {' and '.join(users)}"
            )


RELATIVE_STATES = (
    "Measure errors of hidden states relative to the size of the teacher's; of decoders and models of images token by "
    "token. Left out, only of these: some of their tokens have states that outweigh all others."
)
"""The description of an option that `relative_states` reads."""


def relative_states(option: bool | None, context: Context) -> bool:
    """Return whether errors of hidden states are relative. option: as given; None where it is left out."""
    return context.teacher.uneven if option is None else option


WHERE_PREDICTED: dict[str, Iterable[str]] = {
    "tasks": ("alpha", "temperature", "weights.prediction"),
    "text": ("weights.mlm",),
    "gold": ("alpha",),
}
"""Where the options of `prediction_terms` have an effect, for `refuse_unsupported`."""


def weighted(terms: Iterable[Term]) -> list[Term]:
    """Return the terms that weigh something: of the others nothing is captured. Raises InputError without any."""
    found = [term for term in terms if term.weight > 0]
    if not found:
        raise InputError(
            "all terms of this method have the weight 0 on this task",
            where="method.weights",
            hint="give one of them a weight above 0",
        )
    return found


def refuse_unsupported(
    options: BaseModel,
    context: Context,
    *,
    tasks: Iterable[str] = (),
    text: Iterable[str] = (),
    gold: Iterable[str] = (),
) -> None:
    """Raise InputError for an option that has no effect on this kind of task.

    tasks, text: options (`temperature`, `weights.mlm`) that masked text does not have, or only masked text has. gold:
    those (`alpha`) that need gold answers.
    """
    if context.plain_text:
        refuse_idle(options, tasks, "on masked text")
    else:
        refuse_idle(options, text, "without masked tokens")
    if not context.has_gold:
        refuse_idle(options, gold, "without gold labels")


def refuse_idle(options: BaseModel, names: Iterable[str], where_it_is_idle: str, hint: str = "leave it out") -> None:
    """Raise InputError for options that were given where they have no effect, such as "beside recorded decisions".

    names: `alpha`, or `weights.mlm` of an inner table.
    """
    for name in names:
        inner: BaseModel = options
        *path, last = name.split(".")
        for part in path:
            inner = getattr(inner, part)
        if last in inner.model_fields_set:
            raise InputError(f"{name} has no effect {where_it_is_idle}", where=f"method.{name}", hint=hint)


def need_shares_of_one(shares: Sequence[float]) -> None:
    """Raise InputError, with the nearest shares that work, when the stages' shares do not add up to 1."""
    total = sum(shares)
    if abs(total - 1.0) > 1e-6:
        nearest = ", ".join(f"{share / total:.3g}" for share in shares)
        raise InputError(f"the shares must add up to 1, not {total:g}", where="method.shares", hint=f"use [{nearest}]")


def need_dividing_depth(context: Context, why: str) -> None:
    """Raise InputError, with the nearest depth that works, when the student's depth does not divide the teacher's.

    why: what the method does with the blocks, such as "tinybert follows every c-th teacher block".
    """
    depth, blocks = context.teacher.layers, context.student.layers
    if depth % blocks:
        nearest = min((n for n in range(1, depth + 1) if depth % n == 0), key=lambda n: (abs(n - blocks), n))
        raise InputError(
            f"{why}: {counted(depth, 'block')} cannot be divided among {blocks}",
            where="student.layers",
            hint=f"use {counted(nearest, 'block')}",
        )


def need_equal_vocabulary(context: Context) -> None:
    """Raise InputError when both models predict words, and not the same ones."""
    if not context.over_vocabulary:
        return
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
        hint = f"choose a student with {counted(teacher.heads, 'head')}"
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


def bridging(bridge: bool | None, context: Context, *, embeddings: bool = False) -> dict[str, Any]:
    """Return how hidden states become comparable, as arguments of `HiddenObjective`.

    Left out, those of a student of projections go through these, and nothing else is learnt. embeddings: whether the
    student's embedding output is one of them: that of an image comes from no projection.
    """
    projected = context.projected and bridge is None and not (embeddings and context.student.vocab is None)
    return {
        "widths": (context.student.hidden, context.teacher.hidden),
        "bridge": needs_bridge(bridge, context) and not projected,
        "projected": projected,
    }
