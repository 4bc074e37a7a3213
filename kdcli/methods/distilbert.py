"""DistilBERT: the teacher's prediction, the gold answer, and the direction of the last hidden states."""

from typing import Literal

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import Temperature, Weight, need_equal_vocabulary, refuse_unsupported, weighted


class Weights(Options):
    """What each of the three terms weighs."""

    output: Weight = Field(default=5.0, description="Weight of the teacher's prediction.")
    task: Weight = Field(default=2.0, description="Weight of the gold answers: labels, masked tokens or next tokens.")
    cosine: Weight = Field(
        default=1.0, description="Weight of the cosine between the last hidden states; it needs equal widths."
    )


class DistilBERTOptions(Options):
    """Weights and temperature; the paper masks rare tokens more often: `task.mask_smoothing = 0.7`."""

    weights: Weights = Field(default=Weights(), description="How much each part weighs; 0 switches a part off.")
    temperature: Temperature = Field(
        default=2.0, description="Temperature that softens teacher and student logits before they are compared."
    )
    positions: Literal["all", "masked"] = Field(
        default="all", description="Masked text: where predictions are compared, at all tokens or at the masked ones."
    )


def check(options: DistilBERTOptions, context: Context) -> None:
    """Raise InputError when vocabularies or widths differ."""
    refuse_unsupported(options, context, text=("positions",), gold=("weights.task",))
    need_equal_vocabulary(context)
    if options.weights.cosine == 0:
        return
    teacher, student = context.teacher.hidden, context.student.hidden
    if teacher != student:
        raise InputError(
            f"directions can be compared between equal widths, not {teacher} of the teacher and {student} of the "
            "student",
            where="student.hidden_size",
            hint=f"use {teacher}, or method.weights.cosine = 0",
        )


def build(options: DistilBERTOptions, context: Context) -> list[Stage]:
    """Return one stage with the three terms."""
    from kdcli.objectives.cosine import CosineObjective

    weights = options.weights
    everywhere = context.plain_text and options.positions == "all"
    terms = [
        context.output_term(weights.output, options.temperature, all_positions=everywhere),
        *([context.gold_term(weights.task)] if context.has_gold else []),
    ]
    if weights.cosine > 0:
        last = CosineObjective([(context.student.layers, context.teacher.layers)])
        terms.append(Term("cosine", last, weights.cosine))
    return [Stage("distil", weighted(terms))]


METHOD = Method(
    name="distilbert",
    title="Prediction, masked tokens, hidden states",
    paper="Sanh, Debut, Chaumond, Wolf (2019): DistilBERT, a distilled version of BERT: smaller, faster, cheaper and "
    "lighter. arXiv 1910.01108",
    formula="5 T^2 KL(softmax(z_T / T) || softmax(z_S / T)) + 2 CE of the masked tokens (or labels) + "
    "1 (1 - cos(h_S[n], h_T[N]))",
    signals="logits, gold labels (masked text: masked tokens), last hidden states",
    constraints="same vocabulary and width",
    cost="one teacher forward pass a step",
    options=DistilBERTOptions,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "depth", "select": "spread"},
    train={"epochs": 3.0, "learning_rate": 5e-5, "warmup": 0.05, "weight_decay": 0.0},
    text_train={"learning_rate": 5e-4, "betas": [0.9, 0.98], "epsilon": 1e-6, "max_grad_norm": 5.0},
)
