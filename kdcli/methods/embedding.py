"""Embeddings: each text's own, and how the texts of a batch are alike."""

from typing import Annotated, Literal

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import Weight, weighted


class Weights(Options):
    """What each of the three comparisons weighs."""

    mse: Weight = Field(
        default=0.0, description="Weight of the squared distance from the teacher's embedding, relative to its size."
    )
    cosine: Weight = Field(default=1.0, description="Weight of 1 - cosine with the teacher's embedding.")
    similarity: Weight = Field(
        default=1.0,
        description="Weight of the divergence of each text's similarities to the other texts of its batch; widths may "
        "differ.",
    )


class EmbeddingOptions(Options):
    """What of the embeddings is compared, and what becomes of a bridge between two widths."""

    weights: Weights = Field(default=Weights(), description="How much each part weighs; 0 switches a part off.")
    temperature: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(
        default=0.05, description="Temperature of the similarities, which are cosines: below 1 the nearest texts count."
    )
    bridge: Literal["drop", "keep"] | None = Field(
        default=None,
        description="A learned linear map from the student's embedding to the teacher's width, for mse and cosine: "
        '"drop" throws it away after the training, so that the student keeps its own width; with "keep" it becomes the '
        'last dense layer of the student, which then has the teacher\'s width. Left out, "drop" where the widths '
        "differ, else none.",
    )


def check(options: EmbeddingOptions, context: Context) -> None:
    """Raise InputError for a bridge that nothing trains."""
    if options.bridge is not None and options.weights.mse == 0 and options.weights.cosine == 0:
        raise InputError(
            "similarities alone train no bridge", where="method.bridge", hint="leave it out, or give weights.cosine"
        )


def build(options: EmbeddingOptions, context: Context) -> list[Stage]:
    """Return one stage with the terms that weigh something."""
    from torch import nn

    from kdcli.objectives.embedding import EmbeddingObjective, SimilarityObjective, cosine_distance, squared_distance

    weights, widths = options.weights, (context.student.embedding, context.teacher.embedding)
    assert widths[0] is not None and widths[1] is not None
    bridge = None
    if (options.bridge or widths[0] != widths[1]) and (weights.mse or weights.cosine):
        bridge = nn.Linear(widths[0], widths[1])
    keep = options.bridge == "keep"
    terms = [
        Term("mse", EmbeddingObjective(squared_distance, bridge=bridge, keep=keep), weights.mse),
        Term("cosine", EmbeddingObjective(cosine_distance, bridge=bridge, keep=keep), weights.cosine),
        Term("similarity", SimilarityObjective(options.temperature), weights.similarity),
    ]
    return [Stage("distil", weighted(terms))]


METHOD = Method(
    name="embedding",
    title="Sentence embeddings, and similarities in a batch",
    paper="Reimers, Gurevych (2020): Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation. "
    "arXiv 2004.09813; similarities: Passalis, Tefas (2018): Learning Deep Representations with Probabilistic "
    "Knowledge Transfer. arXiv 1803.10837; their temperature: Fang et al. (2021): SEED. arXiv 2101.04731",
    formula="w_m |W e_S - e_T|^2 / |e_T|^2 + w_c (1 - cos(W e_S, e_T)) + w_s mean_i KL(p_T(. | i) || p_S(. | i)), "
    "p(j | i) = softmax_(j != i)(cos(e_i, e_j) / T) over the batch",
    signals="embeddings; no labels",
    constraints="none; any depth and width",
    cost="student only: teacher embeddings are computed once and cached",
    options=EmbeddingOptions,
    build=build,
    check=check,
    needs=frozenset({"embedding"}),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 1e-4},
)
