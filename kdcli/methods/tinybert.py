"""TinyBERT: attention scores and hidden states first, then the prediction."""

from typing import Annotated

from pydantic import Field

from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import (
    Temperature,
    Weight,
    bridging,
    need_dividing_depth,
    need_equal_heads,
    need_shares_of_one,
    needs_bridge,
    refuse_unsupported,
    relative_states,
    weighted,
)
from kdcli.recipe.schema import PositiveFloat, Share


class Weights(Options):
    """What the sums over blocks weigh."""

    attention: Weight = Field(
        default=1.0, description="Weight of the attention scores; it needs equal numbers of heads."
    )
    hidden: Weight = Field(default=1.0, description="Weight of the hidden states, embeddings included.")


class TinyBERTOptions(Options):
    """Two stages; on masked text the first one alone (general distillation)."""

    weights: Weights = Field(
        default=Weights(), description="First stage: how much each part weighs; 0 switches a part off."
    )
    bridge: bool | None = Field(
        default=None,
        description="One learned linear map of the student's hidden states and embeddings, shared by all blocks. Left "
        "out, only where the widths differ.",
    )
    shares: Annotated[list[Annotated[float, Field(gt=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.77, 0.23], description="Shares of all steps of the two stages; they add up to 1."
    )
    final_learning_rate: PositiveFloat | None = Field(
        default=3e-5, description="The highest learning rate of the second stage."
    )
    alpha: Share | None = Field(
        default=None,
        description="Second stage: share of the teacher's prediction; the gold labels have the rest. Left out, 1, and "
        "0 for regression.",
    )
    temperature: Temperature = Field(
        default=1.0,
        description="Second stage: temperature that softens teacher and student logits before they are compared.",
    )


def check(options: TinyBERTOptions, context: Context) -> None:
    """Raise InputError when depths do not divide, or heads differ."""
    refuse_unsupported(
        options, context, tasks=("shares", "final_learning_rate", "alpha", "temperature"), gold=("alpha",)
    )
    need_dividing_depth(context, "tinybert follows every c-th teacher block")
    if options.weights.attention > 0:
        need_equal_heads(context, otherwise="method.weights.attention = 0")
    needs_bridge(options.bridge, context)
    need_shares_of_one(options.shares)


def _inside(options: TinyBERTOptions, context: Context) -> list[Term]:
    from kdcli.objectives.attention import AttentionObjective
    from kdcli.objectives.hidden import HiddenObjective

    depth, blocks = context.teacher.layers, context.student.layers
    pairs = [(m, m * depth // blocks) for m in range(blocks + 1)]
    hidden = HiddenObjective(
        pairs,
        shared=True,
        match_norm=relative_states(None, context),
        **bridging(options.bridge, context, embeddings=True),
    )
    # Objectives are means over blocks, the published terms are sums.
    return weighted(
        [
            Term("attention", AttentionObjective(pairs[1:], measure="mse"), options.weights.attention * blocks),
            Term("hidden", hidden, options.weights.hidden * (blocks + 1)),
        ]
    )


def build(options: TinyBERTOptions, context: Context) -> list[Stage]:
    """Return the stages: the inside of the model, then its prediction; on masked text only the first."""

    if context.plain_text:
        return [Stage("general", _inside(options, context))]
    alpha = options.alpha
    if alpha is None:
        alpha = 0.0 if context.kind.distribution.is_point else 1.0
    prediction = context.prediction_terms(1.0, alpha, options.temperature)
    first, second = options.shares
    return [
        Stage("intermediate", _inside(options, context), first, scheduler="constant", warmup=0.0),
        Stage("prediction", weighted(prediction), second, learning_rate=options.final_learning_rate),
    ]


METHOD = Method(
    name="tinybert",
    title="Attention, hidden states, then prediction",
    paper="Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu (2020): TinyBERT: Distilling BERT for Natural Language "
    "Understanding. arXiv 1909.10351",
    formula="1: sum_m MSE(Q K^T / sqrt(d_k)) + sum_(m >= 0) MSE(h_S[m] W, h_T[m N / n]); 2: KL(p_T || p_S) at T = 1, "
    "for regression MSE(z_S, y)",
    signals="1: queries, keys, hidden states, embeddings; 2: logits, for regression gold labels",
    constraints="a depth that divides the teacher's, as many heads; any width",
    cost="1: one teacher forward pass a step; 2: student only: teacher logits are computed once and cached",
    options=TinyBERTOptions,
    build=build,
    check=check,
    needs=frozenset(),
    # Block m follows block m N / n.
    student={"form": "depth", "select": "even"},
    # Even blocks are without the first, which a model of images cannot do without.
    image_student={"select": "ends"},
    # About 10 epochs for the first and 3 for the second stage.
    train={"epochs": 13.0, "learning_rate": 5e-5},
    text_train={"epochs": 3.0},
)
