"""Knowledge distillation from logits and labels."""

from pydantic import Field

from kdcli.methods.base import Context, Method, Options, Stage
from kdcli.methods.terms import Temperature, need_equal_vocabulary, refuse_unsupported
from kdcli.recipe.schema import Share


class KDOptions(Options):
    """The share and the temperature of the teacher's prediction."""

    alpha: Share = Field(
        default=0.5,
        description="Share of the teacher's prediction; the gold labels, or masked tokens, have the rest. Without "
        "any it has no effect.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens teacher and student logits before they are compared."
    )


def check(options: KDOptions, context: Context) -> None:
    """Raise InputError for a share of gold labels where there are none, and for different vocabularies."""
    refuse_unsupported(options, context, gold=("alpha",))
    need_equal_vocabulary(context)


def build(options: KDOptions, context: Context) -> list[Stage]:
    """Return one stage with the two terms; without gold labels with the first alone."""
    return [Stage("distil", context.prediction_terms(1.0, options.alpha, options.temperature))]


METHOD = Method(
    name="kd",
    title="Logits and labels",
    paper="Hinton, Vinyals, Dean (2015): Distilling the Knowledge in a Neural Network. arXiv 1503.02531",
    formula="alpha T^2 KL(softmax(z_T / T) || softmax(z_S / T)) + (1 - alpha) CE(z_S, y)",
    signals="logits, gold labels (plain text: masked tokens)",
    constraints="none; on plain text the same vocabulary",
    cost="student only: teacher logits are computed once and cached; on plain text one teacher forward pass a step",
    options=KDOptions,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
    text_train={"learning_rate": 5e-4},
)
