"""Knowledge distillation from logits and labels."""

from pydantic import Field

from kdcli.methods.base import Context, Method, Options, Stage
from kdcli.methods.terms import Temperature
from kdcli.recipe.schema import Share


class KDOptions(Options):
    """The share and the temperature of the teacher's prediction."""

    alpha: Share = Field(default=0.5, description="Share of the teacher's prediction; the gold labels have the rest.")
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens teacher and student logits before they are compared."
    )


def build(options: KDOptions, context: Context) -> list[Stage]:
    """Return one stage with the two terms."""

    return [
        Stage(
            "distil",
            [
                context.output_term(options.alpha, options.temperature),
                context.gold_term(1.0 - options.alpha),
            ],
        )
    ]


METHOD = Method(
    name="kd",
    title="Logits and labels",
    paper="Hinton, Vinyals, Dean (2015): Distilling the Knowledge in a Neural Network. arXiv 1503.02531",
    formula="alpha T^2 KL(softmax(z_T / T) || softmax(z_S / T)) + (1 - alpha) CE(z_S, y)",
    signals="logits, gold labels",
    constraints="none",
    cost="student only: teacher logits are computed once and cached",
    options=KDOptions,
    build=build,
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
)
