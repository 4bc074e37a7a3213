"""BERT-of-Theseus: teacher blocks are replaced one by one while the student learns the task among them."""

from typing import Literal

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage
from kdcli.methods.terms import need_dividing_depth, refuse_idle
from kdcli.recipe.schema import Fraction, PositiveFloat, PositiveInt


class TheseusOptions(Options):
    """How the chance p that a student block replaces its teacher blocks goes to 1."""

    schedule: Literal["linear", "constant"] = Field(
        default="linear",
        description="How p grows: linearly, p = min(1, replacing_rate + k t) at optimizer step t; or constant, p = "
        "replacing_rate until steps_for_replacing and then 1.",
    )
    replacing_rate: Fraction | None = Field(
        default=None, description="p at the start. Left out, 0.3 for linear and 0.5 for constant."
    )
    k: PositiveFloat | None = Field(
        default=None, description='"linear": growth of p in one optimizer step. Left out, p reaches 1 at `full_at`.'
    )
    steps_for_replacing: PositiveInt | None = Field(
        default=None, description='"constant": optimizer steps until p becomes 1. Left out, `full_at` decides.'
    )
    full_at: Fraction = Field(
        default=2 / 3,
        description="Share of all steps at which p reaches 1, where neither k nor steps_for_replacing is given.",
    )
    predecessor_eval: bool = Field(default=False, description="Run the teacher's blocks without dropout.")


def check(options: TheseusOptions, context: Context) -> None:
    """Raise InputError when the student's blocks are not equal shares of the teacher's, or options contradict."""
    if options.k is not None and options.schedule != "linear":
        raise InputError(
            'k belongs to schedule = "linear"', where="method.k", hint="use steps_for_replacing, or leave it out"
        )
    if options.steps_for_replacing is not None and options.schedule != "constant":
        raise InputError(
            'steps_for_replacing belongs to schedule = "constant"',
            where="method.steps_for_replacing",
            hint="use k, or leave it out",
        )
    if options.k is not None or options.steps_for_replacing is not None:
        refuse_idle(options, ("full_at",), "beside k or steps_for_replacing", "give one of them")
    if context.student_form != "depth":
        raise InputError(
            f"theseus trains blocks inside the teacher, so they must be cut from its {context.teacher.layers}, not "
            f"{context.student_form!r}",
            where="student.form",
            hint='use form = "depth"',
        )
    need_dividing_depth(context, "theseus replaces equal groups of teacher blocks")


def build(options: TheseusOptions, context: Context) -> list[Stage]:
    """Return one stage: the task's loss alone, under the replacement scheme."""
    from kdcli.training.schemes.theseus import Replacement, TheseusScheme

    rate = options.replacing_rate or (0.3 if options.schedule == "linear" else 0.5)
    replacement = Replacement(options.schedule, rate, options.k, options.steps_for_replacing, options.full_at)
    return [
        Stage(
            "replace",
            [context.gold_term()],
            scheme=TheseusScheme(replacement, predecessor_eval=options.predecessor_eval),
        )
    ]


METHOD = Method(
    name="theseus",
    title="Labels, among the teacher's own blocks",
    paper="Xu, Zhou, Ge, Wei, Zhou (2020): BERT-of-Theseus: Compressing BERT by Progressive Module Replacing. "
    "arXiv 2002.02925",
    formula="CE(z, y), block i = student's with chance p_t, else its N / n teacher blocks; p_t = min(1, b + k t)",
    signals="gold labels, through the teacher's own blocks",
    constraints="depth student whose number of blocks divides the teacher's; same width, embeddings and head",
    cost="no teacher pass: a step runs at most as many blocks as the teacher has",
    options=TheseusOptions,
    build=build,
    check=check,
    student={"form": "depth", "select": "first"},
    train={"epochs": 15.0, "learning_rate": 2e-5, "warmup": 0.0, "weight_decay": 0.0},
)
