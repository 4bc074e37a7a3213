"""Knowledge distillation from logits and labels."""

from pydantic import Field

from kdcli.methods.base import Context, Method, Stage
from kdcli.methods.terms import (
    DivergenceOptions,
    Temperature,
    check_divergence,
    need_equal_vocabulary,
    refuse_unsupported,
)
from kdcli.recipe.schema import Share


class KDOptions(DivergenceOptions):
    """The share and the temperature of the teacher's prediction, and how it is compared."""

    alpha: Share = Field(
        default=0.5,
        description="Share of the teacher's prediction; the gold labels, masked or next tokens have the rest. "
        "Without any it has no effect.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens teacher and student logits before they are compared."
    )


def check(options: KDOptions, context: Context) -> None:
    """Raise InputError for a share of gold labels where there are none, and what cannot be compared."""
    refuse_unsupported(options, context, gold=("alpha",))
    check_divergence(options, context)
    need_equal_vocabulary(context)


def build(options: KDOptions, context: Context) -> list[Stage]:
    """Return one stage with the two terms; without gold labels with the first alone."""
    terms = context.prediction_terms(1.0, options.alpha, options.temperature, divergence=options.comparison)
    return [Stage("distil", terms)]


METHOD = Method(
    name="kd",
    title="Logits and labels",
    paper="Hinton, Vinyals, Dean (2015): Distilling the Knowledge in a Neural Network. arXiv 1503.02531",
    formula="alpha T^2 D(softmax(z_T / T), softmax(z_S / T)) + (1 - alpha) CE(z_S, y), D = KL or another divergence",
    signals="logits, gold labels (masked text: masked tokens; decoders: next tokens)",
    constraints="none; on tokens the same vocabulary",
    cost="student only: teacher logits are computed once and cached; on tokens one teacher forward pass a step, and "
    "logits are formed some tokens at a time",
    options=KDOptions,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
    text_train={"learning_rate": 5e-4},
)
