"""OD transfer: the student learns the teacher's distribution over the vocabulary, of masked or next tokens."""

from typing import Literal

from pydantic import Field

from kdcli.methods.base import Context, Method, Options, Stage
from kdcli.methods.terms import Temperature, Weight, need_equal_vocabulary, weighted


class Weights(Options):
    """What the two terms weigh."""

    output: Weight = Field(default=1.0, description="Weight of the teacher's distribution over the vocabulary.")
    mlm: Weight = Field(
        default=0.0, description="Weight of the masked tokens themselves; of a decoder, the next tokens."
    )


class ODOptions(Options):
    """Where and how distributions over the vocabulary are compared."""

    positions: Literal["masked", "all"] = Field(
        default="masked",
        description="Where the distributions are compared: at the masked tokens (of a decoder, where the next token is "
        "predicted) or at all tokens.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens teacher and student logits before they are compared."
    )
    weights: Weights = Field(default=Weights(), description="How much each part weighs; 0 switches a part off.")


def check(options: ODOptions, context: Context) -> None:
    """Raise InputError when the vocabularies differ."""
    need_equal_vocabulary(context)


def build(options: ODOptions, context: Context) -> list[Stage]:
    """Return one stage with the distribution, and the masked tokens where they weigh something."""
    everywhere = options.positions == "all"
    terms = [
        context.output_term(options.weights.output, options.temperature, all_positions=everywhere),
        context.gold_term(options.weights.mlm),
    ]
    return [Stage("distil", weighted(terms))]


METHOD = Method(
    name="od",
    title="The distribution over the vocabulary",
    paper="Udagawa, Trivedi, Merler, Bhattacharjee (2023): A Comparative Analysis of Task-Agnostic Distillation "
    "Methods for Compressing Transformer Language Models. arXiv 2310.08797",
    formula="T^2 KL(softmax(z_T / T) || softmax(z_S / T)) at masked or before next tokens (+ w_mlm CE of these)",
    signals="masked-LM or causal-LM logits",
    constraints="same vocabulary; a teacher with a head over it",
    cost="one teacher forward pass a step; both heads run at the compared words only",
    options=ODOptions,
    build=build,
    check=check,
    needs=frozenset({"vocabulary"}),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-4},
)
