"""MiniLM: the last block's attention, and how its values relate to each other."""

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import (
    WHERE_PREDICTED,
    PredictionWeights,
    Temperature,
    Weight,
    need_equal_heads,
    prediction_terms,
    refuse_unsupported,
    weighted,
)
from kdcli.recipe.schema import Share


class Weights(PredictionWeights):
    """What the last block's attention weighs beside the prediction."""

    attention: Weight = Field(default=1.0, description="Weight of the attention distributions.")
    value: Weight = Field(default=1.0, description="Weight of the relations between values.")


class MiniLMOptions(Options):
    """Weights, and the share and temperature of the teacher's prediction."""

    weights: Weights = Field(default=Weights(), description="How much each part weighs; 0 switches a part off.")
    alpha: Share = Field(
        default=0.5,
        description="All tasks but masked text: share of the teacher's prediction; the gold labels have the rest. "
        "Without any it has no effect.",
    )
    temperature: Temperature = Field(
        default=1.0,
        description="All tasks but masked text: temperature that softens teacher and student logits before they are "
        "compared.",
    )


def check(options: MiniLMOptions, context: Context) -> None:
    """Raise InputError when the numbers of heads differ."""
    refuse_unsupported(options, context, **WHERE_PREDICTED)
    need_equal_heads(context, otherwise="the method minilmv2, which needs no equal heads")
    teacher, student = context.teacher.kv_heads, context.student.kv_heads
    if options.weights.value > 0 and teacher != student:
        raise InputError(
            f"values can be related over equal numbers of their heads, not {teacher} of the teacher and {student} of "
            "the student",
            where="method.weights.value",
            hint="use method.weights.value = 0, or the method minilmv2, which needs no equal heads",
        )


def build(options: MiniLMOptions, context: Context) -> list[Stage]:
    """Return one stage over the last block of both models."""
    from kdcli.objectives.relation import Relation, RelationObjective

    def last(relation: Relation) -> RelationObjective:
        return RelationObjective([(context.student.layers, context.teacher.layers)], relations={relation: 1.0})

    terms = [
        # Queries against keys are the attention itself, and relations need no (heads, seq, seq) in memory for long.
        Term("attention", last(("query", "key")), options.weights.attention),
        Term("value", last(("value", "value")), options.weights.value),
        *prediction_terms(context, options.weights, options.alpha, options.temperature),
    ]
    return [Stage("distil", weighted(terms))]


METHOD = Method(
    name="minilm",
    title="Last-block attention and value relations",
    paper="Wang, Wei, Dong, Bao, Yang, Zhou (2020): MiniLM: Deep Self-Attention Distillation for Task-Agnostic "
    "Compression of Pre-Trained Transformers. arXiv 2002.10957",
    formula="KL(A_T || A_S) + KL(R_T || R_S) of the last blocks, A = softmax(Q K^T / sqrt(d_k)), "
    "R = softmax(V V^T / sqrt(d_k)) (+ w_p (alpha T^2 KL + (1 - alpha) CE), not on masked text)",
    signals="queries, keys and values of the last block; except on masked text also logits and gold labels",
    constraints="as many heads as the teacher, of keys and values, too; any depth and width. For a student of at most "
    "half the depth and width an [assistant] of the teacher's depth and the student's width helps",
    cost="one teacher forward pass a step",
    options=MiniLMOptions,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
    text_train={"learning_rate": 5e-4},
)
