"""MiniLMv2: relations within queries, keys and values of one teacher block, over heads split again."""

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import (
    WHERE_PREDICTED,
    PredictionWeights,
    Temperature,
    Weight,
    prediction_terms,
    refuse_unsupported,
    weighted,
)
from kdcli.recipe.schema import Heads, Share

if TYPE_CHECKING:
    from kdcli.objectives.base import Objective

PROJECTIONS = {"q": "query", "k": "key", "v": "value"}
LARGE_WIDTH = 1024


class Weights(PredictionWeights):
    """What relations weigh beside the prediction."""

    relation: Weight = Field(default=1.0, description="Weight of the sum over all relations.")


class Relations(Options):
    """What each relation weighs."""

    qq: Weight = Field(default=1.0, description="Weight of the relation of queries to each other.")
    kk: Weight = Field(default=1.0, description="Weight of the relation of keys to each other.")
    vv: Weight = Field(default=1.0, description="Weight of the relation of values to each other.")
    qk: Weight = Field(default=0.0, description="Weight of the relation of queries to keys.")
    qv: Weight = Field(default=0.0, description="Weight of the relation of queries to values.")
    kq: Weight = Field(default=0.0, description="Weight of the relation of keys to queries.")
    kv: Weight = Field(default=0.0, description="Weight of the relation of keys to values.")
    vq: Weight = Field(default=0.0, description="Weight of the relation of values to queries.")
    vk: Weight = Field(default=0.0, description="Weight of the relation of values to keys.")


class MiniLMv2Options(Options):
    """Which block is followed, and how its projections are compared."""

    relation_heads: Heads | None = Field(
        default=None,
        description="Heads that the projections are split into again; the number divides the widths of both models' "
        "projections: with grouped queries also the narrower ones of keys and values. Left out, 48 (64 where the "
        "teacher is 1024 or more wide), or the next lower number that divides them all.",
    )
    teacher_layer: Annotated[int, Field(ge=-256, le=256)] = Field(
        default=-2,
        description="The teacher's block that is followed: from 1, or from the end with -1 as the last. A teacher of "
        "one block has that one.",
    )
    relations: Relations = Field(default=Relations(), description="What each relation weighs; 0 leaves it out.")
    direct: bool = Field(
        default=False,
        description="Compare queries, keys and values themselves, through learned maps, instead of their relations.",
    )
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


def _widths(options: MiniLMv2Options, context: Context) -> list[int]:
    """Return the widths of all projections that are compared, of the teacher and of the student, each once."""
    given = [name for name, weight in options.relations.model_dump().items() if weight > 0]
    names = [name for letter, name in PROJECTIONS.items() if any(letter in relation for relation in given)]
    found = [shape.width_of(name) for name in names or ["query"] for shape in (context.teacher, context.student)]
    return list(dict.fromkeys(found))


def _listed(widths: list[int]) -> str:
    *first, last = map(str, widths)
    return f"{', '.join(first)} and {last}" if first else last


def relation_heads(options: MiniLMv2Options, context: Context) -> int:
    """Return the number of relation heads. Raises InputError when the one asked for does not divide all widths."""
    widths = _widths(options, context)
    common = math.gcd(*widths)
    wanted = options.relation_heads or (64 if context.teacher.hidden >= LARGE_WIDTH else 48)
    fitting = [heads for heads in range(1, common + 1) if common % heads == 0]
    if options.relation_heads is None:
        return max(heads for heads in fitting if heads <= wanted)
    if wanted not in fitting:
        each = {1: "a width of {}", 2: "both {}, the widths"}.get(len(widths), "all of {}, the widths")
        raise InputError(
            f"{wanted} relation heads do not divide {each.format(_listed(widths))}",
            where="method.relation_heads",
            hint=f"use {min(fitting, key=lambda heads: (abs(heads - wanted), heads))}",
        )
    return wanted


def teacher_layer(options: MiniLMv2Options, context: Context) -> int:
    """Return the number of the teacher's block, from 1. Raises InputError when it has no such block."""
    depth, layer = context.teacher.layers, options.teacher_layer
    if "teacher_layer" not in options.model_fields_set:
        # A teacher of one block has no block below its last.
        layer = max(layer, -depth)
    found = layer + depth + 1 if layer < 0 else layer
    if not 1 <= found <= depth:
        raise InputError(
            f"the teacher has no block {layer}: it has {depth}",
            where="method.teacher_layer",
            hint=f"use 1 to {depth}, or -1 to -{depth} from the end" if depth > 1 else "use 1",
        )
    return found


def check(options: MiniLMv2Options, context: Context) -> None:
    """Raise InputError for heads that divide no width, a block that is not there, or options that contradict."""
    refuse_unsupported(options, context, **WHERE_PREDICTED)
    relation_heads(options, context)
    teacher_layer(options, context)
    given = {name: weight for name, weight in options.relations.model_dump().items() if weight > 0}
    if options.weights.relation > 0 and not given:
        raise InputError("all relations have the weight 0", where="method.relations")
    crossed = [name for name in given if name[0] != name[1]]
    if options.direct and crossed:
        raise InputError(
            f"with direct = true nothing is related, so there is no {crossed[0]}",
            where=f"method.relations.{crossed[0]}",
            hint="use qq, kk and vv as weights of queries, keys and values",
        )


def _objective(options: MiniLMv2Options, context: Context) -> "Objective":
    from kdcli.objectives.relation import DirectRelationObjective, RelationObjective

    pairs = [(context.student.layers, teacher_layer(options, context))]
    heads = relation_heads(options, context)
    given = {
        (PROJECTIONS[name[0]], PROJECTIONS[name[1]]): weight
        for name, weight in options.relations.model_dump().items()
        if weight > 0
    }
    if not options.direct:
        return RelationObjective(pairs, relations=given, heads=heads)
    names = {rows: weight for (rows, columns), weight in given.items() if rows == columns}
    widths = {name: (context.student.width_of(name), context.teacher.width_of(name)) for name in names}
    return DirectRelationObjective(pairs, widths=widths, heads=heads, names=names)


def build(options: MiniLMv2Options, context: Context) -> list[Stage]:
    """Return one stage: the student's last block follows one block of the teacher."""
    terms = [
        Term("relation", _objective(options, context), options.weights.relation),
        *prediction_terms(context, options.weights, options.alpha, options.temperature),
    ]
    return [Stage("distil", weighted(terms))]


def notes(options: MiniLMv2Options, context: Context) -> list[str]:
    """Say how many relation heads there are where it is not the published number."""
    heads = relation_heads(options, context)
    if options.relation_heads is not None or heads in (48, 64):
        return []
    widths = _widths(options, context)
    return [f"{heads} relation heads: the usual number does not divide the widths {_listed(widths)}"]


METHOD = Method(
    name="minilmv2",
    title="Query, key, value relations of one block",
    paper="Wang, Bao, Huang, Dong, Wei (2021): MiniLMv2: Multi-Head Self-Attention Relation Distillation for "
    "Compressing Pretrained Transformers. arXiv 2012.15828",
    formula="sum_(X = Q, K, V) KL(R_T || R_S), R = softmax(X X^T / sqrt(d_r)) over d / d_r relation heads "
    "(+ w_p (alpha T^2 KL + (1 - alpha) CE), not on masked text)",
    signals="queries, keys and values of one block; except on masked text also logits and gold labels",
    constraints="relation heads that divide the widths of both models' projections, with grouped queries also the "
    "narrower ones of keys and values; any depth, width and number of heads. Of decoders relations are those after "
    "rotation, of each token to itself and those before it",
    cost="the teacher's forward pass up to that block a step; except on masked text its prediction once, and cached",
    options=MiniLMv2Options,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
    text_train={"learning_rate": 6e-4, "epsilon": 1e-6},
    notes=notes,
)
