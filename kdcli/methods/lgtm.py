"""LGTM: the teacher learns, too, guided by how it influences the student on rows held out from training."""

from typing import Annotated

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage
from kdcli.methods.terms import Temperature, refuse_idle
from kdcli.recipe.schema import PositiveFloat, Share


class LGTMOptions(Options):
    """What student and teacher learn from each other, and where they start.

    The paper starts from a teacher that is not fine-tuned and from zero classifiers (`from_base`, `zero_classifiers`);
    left out, the teacher is fine-tuned on the task first, and the student's head is a copy of its own.
    """

    alpha_student: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="Share of the teacher's prediction in the student's loss; the gold labels have the rest.",
    )
    alpha_teacher: Share = Field(
        default=0.4,
        description="Share of the student's prediction in the teacher's loss; the gold labels have the rest.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens teacher and student logits before they are compared."
    )
    teacher_learning_rate: PositiveFloat = Field(
        default=3e-5,
        description="The teacher's highest learning rate; it follows a linear schedule with the student's warm-up.",
    )
    held_out: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        default=0.05,
        description="Share of the training rows, never of the validation set, that the teacher's influence is "
        "measured on.",
    )
    influence: bool = Field(
        default=True,
        description="Guide the teacher by its influence on the student. false gives a teacher that learns without it "
        "(ProKT).",
    )
    from_base: bool = Field(
        default=False,
        description="Start the teacher that learns, and a student that is cut from it, from what the teacher was "
        "before its fine-tuning, as the paper does. Scores are still compared with the fine-tuned teacher's.",
    )
    zero_classifiers: bool = Field(
        default=False, description="Start both classifiers with weights and biases of zero, as the paper does."
    )


def check(options: LGTMOptions, context: Context) -> None:
    """Raise InputError for options that have no effect beside each other, and for copies of what is held out."""
    if options.influence and context.augmented:
        raise InputError(
            "lgtm holds training rows out, and their noised copies would stay in training",
            where="task.augment",
            hint="leave it out, or set influence = false",
        )
    if options.influence and options.alpha_teacher == 0:
        raise InputError(
            "the influence goes through the student's share of the teacher's loss, so it is zero with "
            "alpha_teacher = 0",
            where="method.alpha_teacher",
            hint="use the default 0.4, or influence = false",
        )
    if not options.influence:
        refuse_idle(options, ("held_out",), "without influence", "leave it out, or set influence = true")


def build(options: LGTMOptions, context: Context) -> list[Stage]:
    """Return one stage: the student's two terms, and the scheme that trains the teacher before every step."""
    from kdcli.training.schemes.lgtm import Learning, LGTMScheme

    learning = Learning(
        kind=context.kind,
        alpha_student=options.alpha_student,
        alpha_teacher=options.alpha_teacher,
        temperature=options.temperature,
        learning_rate=options.teacher_learning_rate,
        influence=options.influence,
        held_out=options.held_out,
        zero_classifiers=options.zero_classifiers,
    )
    return [
        Stage(
            "distil",
            [
                context.output_term(options.alpha_student, options.temperature, scale=False),
                context.gold_term(1.0 - options.alpha_student),
            ],
            scheme=LGTMScheme(learning),
        )
    ]


METHOD = Method(
    name="lgtm",
    title="A teacher that learns to teach",
    paper="Ren, Zhong, Shi, Zhu, Yuan, Li (2023): Tailoring Instructions to Student's Learning Levels Boosts "
    "Knowledge Distillation. arXiv 2305.09651",
    formula="student: a_S KL(p_T || p_S) + (1 - a_S) CE(z_S, y); teacher: gradient of a_T KL(p_S || p_T) + "
    "(1 - a_T) CE(z_T, y), less eta_T a_T d^2 KL(p_S || p_T) / d theta_T d theta_S v; v: gradient of the held-out CE "
    "of the student after its next step",
    signals="logits, gold labels; 5% of the training rows to measure influence",
    constraints="none on the models; the teacher must be a model here, gradient_accumulation = 1",
    cost="a step runs the teacher three times forward and twice backward, the student five and three times; with "
    "influence = false twice and once, twice and once",
    options=LGTMOptions,
    build=build,
    check=check,
    from_base=lambda options: frozenset({"student", "teacher"}) if options.from_base else frozenset(),
    student={"form": "depth"},
    train={"epochs": 6.0, "learning_rate": 5e-5, "warmup": 0.0, "weight_decay": 0.0},
)
