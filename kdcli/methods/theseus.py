"""BERT-of-Theseus: teacher blocks are replaced one by one while the student learns the task among them."""

from typing import Literal

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import need_dividing_depth, refuse_idle
from kdcli.recipe.schema import Fraction, PositiveFloat, PositiveInt


class TheseusOptions(Options):
    """How the chance p that a student block replaces its teacher blocks goes to 1.

    schedule: "linear" (p = min(1, replacing_rate + k t) at optimizer step t) or "constant" (p = replacing_rate
    until `steps_for_replacing`, then 1). replacing_rate: 0.3 for linear and 0.5 for constant, unless given. k and
    steps_for_replacing count steps; without them p reaches 1 at the share `full_at` of all steps, whatever their
    number. predecessor_eval: run the teacher's blocks without dropout.
    """

    schedule: Literal["linear", "constant"] = "linear"
    replacing_rate: Fraction | None = None
    k: PositiveFloat | None = None
    steps_for_replacing: PositiveInt | None = None
    full_at: Fraction = 2 / 3
    predecessor_eval: bool = False


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
            f"theseus trains blocks inside the teacher, so they must be cut from it, not {context.student_form!r}",
            where="student.form",
            hint='use form = "depth"',
        )
    need_dividing_depth(context, "theseus replaces equal groups of teacher blocks")


def build(options: TheseusOptions, context: Context) -> list[Stage]:
    """Return one stage: the task's loss alone, under the replacement scheme."""
    from kdcli.objectives.gold import TaskObjective
    from kdcli.training.schemes.theseus import Replacement, TheseusScheme

    rate = options.replacing_rate or (0.3 if options.schedule == "linear" else 0.5)
    replacement = Replacement(options.schedule, rate, options.k, options.steps_for_replacing, options.full_at)
    return [
        Stage(
            "replace",
            [Term("task", TaskObjective(context.kind))],
            scheme=TheseusScheme(replacement, predecessor_eval=options.predecessor_eval),
        )
    ]


METHOD = Method(
    name="theseus",
    title="Progressive replacement of teacher blocks by student blocks",
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
