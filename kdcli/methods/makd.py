"""MaKD: multi-aspect distillation into a low-rank student."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import (
    RELATIVE_STATES,
    Temperature,
    Weight,
    need_equal_heads,
    need_equal_vocabulary,
    need_shares_of_one,
    refuse_idle,
    refuse_unsupported,
    relative_states,
    weighted,
)
from kdcli.recipe.schema import PositiveFloat, Share

Part = Annotated[float, Field(gt=0.0, le=1.0)]


class Levels(Options):
    """What the three levels weigh; nothing is captured for a level of weight 0."""

    matrix: Weight = Field(default=1.0, description="Weight of the outputs of the block matrices.")
    layer: Weight = Field(default=1.0, description="Weight of attention, hidden states and embeddings.")
    model: Weight = Field(
        default=1.0,
        description="Weight of the prediction; on masked text that of the masked tokens, for which the teacher needs a "
        "masked-LM head: 0 where it has none.",
    )


class Terms(Options):
    """What the terms inside the levels weigh."""

    mha: Weight = Field(
        default=1.0, description="Matrix level: weight of the query, key, value and attention output matrices."
    )
    ffn: Weight = Field(default=1.0, description="Matrix level: weight of the two feed-forward matrices.")
    attention: Weight = Field(
        default=1.0, description="Layer level: weight of the attention distributions; it needs equal numbers of heads."
    )
    hidden: Weight = Field(default=1.0, description="Layer level: weight of the hidden states.")
    embedding: Weight | None = Field(
        default=None,
        description="Layer level: weight of the embedding output. Left out, 1 where the student's word embeddings are "
        "low-rank factors, else 0.",
    )


class MaKDOptions(Options):
    """Weights of levels and terms, the share of the teacher's prediction, and the schedule."""

    weights: Levels = Field(default=Levels(), description="What the three levels weigh; 0 switches a level off.")
    terms: Terms = Field(default=Terms(), description="What the terms inside the levels weigh; 0 switches a term off.")
    alpha: Share = Field(
        default=0.5,
        description="Model level: share of the teacher's prediction; the gold labels, or masked tokens, have the rest.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens teacher and student logits before they are compared."
    )
    matrix_norm: bool = Field(
        default=True, description="Measure errors of matrix outputs relative to the size of the teacher's."
    )
    matrix_inputs: Literal["student", "teacher", "teacher-first"] | None = Field(
        default=None,
        description='What the student\'s matrices get whose outputs are compared: "student", its own states; '
        '"teacher", the teacher\'s input of each matrix, so that every matrix learns by itself; "teacher-first", the '
        'teacher\'s in the first stage of schedule = "staged" and then the student\'s. Left out, "student", or '
        '"teacher-first" where there are stages.',
    )
    hidden_norm: bool | None = Field(default=None, description=RELATIVE_STATES)
    schedule: Literal["joint", "staged"] = Field(
        default="joint", description="All levels at once, or in three stages: matrices, then layers too, then all."
    )
    shares: Annotated[list[Part], Field(min_length=3, max_length=3)] = Field(
        default=[0.4, 0.3, 0.3],
        description='"staged": shares of all steps of the three stages; they add up to 1. Where a level is switched '
        "off, the others keep their proportions and have all steps.",
    )
    final_learning_rate: PositiveFloat | None = Field(
        default=None,
        description='"staged": the highest learning rate of the third stage. Left out, that of the others.',
    )


def check(options: MaKDOptions, context: Context) -> None:
    """Raise InputError when shapes differ where the terms need them equal, or options contradict each other."""
    teacher, student = context.teacher, context.student
    if not any((options.weights.matrix, options.weights.layer, options.weights.model)):
        raise InputError(
            "all levels of MaKD are switched off", where="method.weights", hint="give one of them a weight above 0"
        )
    inner = options.weights.matrix > 0 or options.weights.layer > 0
    if inner and (teacher.hidden, teacher.intermediate) != (student.hidden, student.intermediate):
        raise InputError(
            f"MaKD compares matrices and layers of equal widths; the teacher's are {teacher.hidden} and "
            f"{teacher.intermediate}, the student's {student.hidden} and {student.intermediate}",
            where="method.name",
            hint="use a low-rank or depth student, or weights = {matrix = 0, layer = 0}",
        )
    if options.weights.layer > 0 and options.terms.attention > 0:
        need_equal_heads(context, otherwise="method.terms.attention = 0")
    refuse_unsupported(options, context, gold=("alpha",))
    if options.weights.model > 0:
        need_equal_vocabulary(context)
    if options.schedule == "joint":
        refuse_idle(options, ("shares", "final_learning_rate"), 'with schedule = "joint"', 'set schedule = "staged"')
        if options.matrix_inputs == "teacher-first":
            raise InputError(
                'matrix_inputs = "teacher-first" is about the first of several stages, and schedule = "joint" has one',
                where="method.matrix_inputs",
                hint='use "teacher", or set schedule = "staged"',
            )
    if options.weights.matrix == 0:
        refuse_idle(options, ("matrix_inputs",), "with weights.matrix = 0")
    if options.weights.model == 0:
        refuse_idle(options, ("final_learning_rate",), "with weights.model = 0: there is no third stage")
    need_shares_of_one(options.shares)


def build(options: MaKDOptions, context: Context) -> list[Stage]:
    """Return one joint stage, or three from fine to coarse."""
    from kdcli.objectives.hidden import HiddenObjective
    from kdcli.objectives.matrix import MatrixObjective
    from kdcli.objectives.relation import RelationObjective

    inputs = options.matrix_inputs or ("teacher-first" if options.schedule == "staged" else "student")

    def matrix_level(*, local: bool) -> list[Term]:
        weight, terms = options.weights.matrix, options.terms
        heads = ("query", "key", "value", "attention_output")
        gate = ("ffn_gate",) if context.teacher.gated and context.student.gated else ()
        return [
            Term(
                "mha",
                MatrixObjective(context.pairs, heads, match_norm=options.matrix_norm, local=local),
                weight * terms.mha,
            ),
            Term(
                "ffn",
                MatrixObjective(
                    context.pairs, ("ffn_in", *gate, "ffn_out"), match_norm=options.matrix_norm, local=local
                ),
                weight * terms.ffn,
            ),
        ]

    def layer_level() -> list[Term]:
        weight, terms = options.weights.layer, options.terms
        embedding = float(context.factored_embeddings) if terms.embedding is None else terms.embedding
        return [
            Term(
                "attention",
                # The attention distribution as a relation of queries and keys: nothing of it is kept for later.
                RelationObjective(context.pairs, relations={("query", "key"): 1.0}),
                weight * terms.attention,
            ),
            Term(
                "hidden",
                HiddenObjective(context.pairs, match_norm=relative_states(options.hidden_norm, context)),
                weight * terms.hidden,
            ),
            Term(
                "embedding",
                HiddenObjective([(0, 0)], match_norm=relative_states(options.hidden_norm, context)),
                weight * embedding,
            ),
        ]

    model = context.prediction_terms(options.weights.model, options.alpha, options.temperature)
    matrix, layer, _ = levels = matrix_level(local=inputs == "teacher"), layer_level(), model
    terms = weighted(matrix + layer + model)
    if options.schedule == "joint":
        return [Stage("distil", terms)]
    first, second, third = options.shares
    stages = [
        Stage("matrix", matrix_level(local=inputs != "student"), first),
        Stage("layer", matrix + layer, second),
        Stage("model", terms, third, learning_rate=options.final_learning_rate),
    ]
    # A level that is switched off has no stage; the stages of the others have all steps.
    active = [stage for stage, level in zip(stages, levels, strict=True) if any(term.weight > 0 for term in level)]
    steps = sum(stage.share for stage in active)
    return [replace(stage, terms=weighted(stage.terms), share=stage.share / steps) for stage in active]


METHOD = Method(
    name="makd",
    title="Matrices, layers and the prediction",
    paper="Liu, Mao, Xu, Peng, Huang (2026): Multi-Aspect Knowledge Distillation for Language Model with "
    "Low-rank Factorization. arXiv 2604.03110",
    formula="w_M mean_l(L_mha + L_ffn) + w_L (mean_l(KL_att + MSE_hid) + MSE_emb) "
    "+ w_P (alpha T^2 KL + (1 - alpha) CE)",
    signals="outputs of all matrices of every block, attention, hidden states, logits, gold labels (masked text: "
    "masked tokens)",
    constraints="student as wide as the teacher, with the same heads",
    cost="one teacher forward pass a step",
    options=MaKDOptions,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "low-rank", "budget": 0.5},
    train={"epochs": 3.0, "learning_rate": 1e-4},
    text_train={"learning_rate": 5e-4},
)
