"""HS transfer: hidden states of the student's blocks follow those of the teacher's, by any layer map."""

import difflib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.layer_maps import MAPS, Pairs, layer_map
from kdcli.methods.terms import (
    RELATIVE_STATES,
    WHERE_PREDICTED,
    PredictionWeights,
    Temperature,
    Weight,
    bridging,
    need_equal_heads,
    needs_bridge,
    prediction_terms,
    refuse_unsupported,
    relative_states,
    weighted,
)
from kdcli.recipe.schema import NonNegativeInt, Seed, Share

if TYPE_CHECKING:
    from kdcli.objectives.base import Objective

NAMES = (*MAPS, "emd")
EMD_PAPER = "Li et al. (2020), arXiv 2010.06133"


class Weights(PredictionWeights):
    """What hidden states weigh beside the prediction."""

    hidden: Weight = Field(default=1.0, description="Weight of the hidden states of the mapped blocks.")
    embedding: Weight = Field(default=0.0, description="Weight of the embedding output.")


class EMDOptions(Options):
    """What `layer_map = "emd"` does beside finding the cheapest transport of hidden states between all blocks."""

    attention: bool = Field(
        default=False, description="Transport attention scores, too; it needs equal numbers of heads."
    )
    learn_weights: bool = Field(default=True, description="Give more weight to layers that are cheap to match.")
    separate: bool = Field(default=False, description="Keep the layer weights of attention and of hidden states apart.")


class HSOptions(Options):
    """Which block follows which, and what else is learnt."""

    layer_map: str | list[list[NonNegativeInt]] | None = Field(
        default=None,
        description='Which teacher block a student block follows: "last", "uniform" (also called "skip"), "last-k", '
        '"all", "uniform-consecutive", "uniform+last", "random", "emd"; or a list of pairs [student '
        "block, teacher block] from 1, where 0 is the embeddings. Left out, uniform; of a decoder or a "
        "model of images that keeps some blocks, those that they are copies of.",
    )
    consecutive: Literal["closed", "half-open"] = Field(
        default="closed",
        description='"uniform-consecutive": whether an interval of blocks includes both its ends or the upper one '
        "only.",
    )
    seed: Seed | None = Field(
        default=None,
        description='"random": seed of the map, which is drawn again in every epoch. Left out, the recipe\'s seed.',
    )
    emd: EMDOptions = Field(default=EMDOptions(), description='"emd": how the transport is made.')
    bridge: bool | None = Field(
        default=None,
        description="Learned linear maps of the student's hidden states before the comparison: one a block, or with "
        '"emd" one for all blocks and the embeddings. Left out, only where the widths differ.',
    )
    match_norm: bool | None = Field(default=None, description=RELATIVE_STATES)
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

    @field_validator("layer_map")
    @classmethod
    def _known(cls, value: str | list[list[int]] | None) -> str | list[list[int]] | None:
        if isinstance(value, str) and value not in NAMES:
            near = difflib.get_close_matches(value, NAMES, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown layer map {value!r}; known are {', '.join(NAMES)}{meant}")
        return value


def _pairs(options: HSOptions, context: Context, epoch: int = 0) -> Pairs:
    if options.layer_map is None:
        return context.pairs
    half_open = options.consecutive == "half-open"
    depths = context.student.layers, context.teacher.layers
    seed = context.seed if options.seed is None else options.seed
    return layer_map(options.layer_map, *depths, half_open=half_open, seed=seed, epoch=epoch)


def check(options: HSOptions, context: Context) -> None:
    """Raise InputError when the map does not fit both depths, leaves blocks untrained, or options contradict."""
    refuse_unsupported(options, context, **WHERE_PREDICTED)
    for name, owner in (("consecutive", "uniform-consecutive"), ("seed", "random"), ("emd", "emd")):
        if name in options.model_fields_set and options.layer_map != owner:
            raise InputError(
                f'{name} belongs to layer_map = "{owner}"',
                where=f"method.{name}",
                hint=f'leave it out, or set method.layer_map = "{owner}"',
            )
    needs_bridge(options.bridge, context)
    if options.layer_map == "emd":
        if options.match_norm:
            raise InputError(
                'match_norm has no effect with layer_map = "emd"', where="method.match_norm", hint="leave it out"
            )
        if options.emd.attention:
            need_equal_heads(context, "method.emd.attention", "leave attention out")
        elif options.emd.separate:
            raise InputError(
                "without attention there are no other layer weights to keep apart",
                where="method.emd.separate",
                hint="leave it out, or set method.emd.attention = true",
            )
        return
    top = max((s for s, _ in _pairs(options, context)), default=0)
    if context.plain_text and options.weights.mlm == 0 and top < context.student.layers:
        raise InputError(
            f"nothing trains the student's blocks above {top}: no teacher block is mapped to them",
            where="method.layer_map",
            hint=f"map block {context.student.layers} to some teacher block, or give weights.mlm",
        )


def _hidden(options: HSOptions, context: Context, how: dict[str, Any]) -> "Objective":
    """Return the objective of the blocks. how: `bridging`, with the map itself where all share one."""
    from kdcli.objectives.hidden import HiddenObjective
    from kdcli.objectives.transport import EMDObjective

    if options.layer_map == "emd":
        return EMDObjective(
            (context.student.layers, context.teacher.layers),
            attention=options.emd.attention,
            bridge=how["bridge"] or None,
            learn_weights=options.emd.learn_weights,
            separate=options.emd.separate,
        )
    random = options.layer_map == "random"
    return HiddenObjective(
        _pairs(options, context),
        match_norm=relative_states(options.match_norm, context),
        redraw=(lambda epoch: _pairs(options, context, epoch)) if random else None,
        teacher_layers=range(1, context.teacher.layers + 1) if random else (),
        **how,
    )


def build(options: HSOptions, context: Context) -> list[Stage]:
    """Return one stage: hidden states, embeddings where they weigh something, and the prediction or masked tokens."""
    from torch import nn

    from kdcli.objectives.hidden import HiddenObjective

    how, of_embeddings = (bridging(options.bridge, context, embeddings=some) for some in (False, True))
    if options.layer_map == "emd":
        # BERT-EMD's is TinyBERT's: one for all blocks and the embeddings.
        bridge = nn.Linear(*how["widths"]) if needs_bridge(options.bridge, context) else False
        how = of_embeddings = {"widths": how["widths"], "bridge": bridge}
    elif any(own == 0 for own, _ in _pairs(options, context)):
        how = of_embeddings
    embedding = HiddenObjective([(0, 0)], match_norm=relative_states(options.match_norm, context), **of_embeddings)
    terms = [
        Term("hidden", _hidden(options, context, how), options.weights.hidden),
        Term("embedding", embedding, options.weights.embedding),
        *prediction_terms(context, options.weights, options.alpha, options.temperature),
    ]
    return [Stage("distil", weighted(terms))]


METHOD = Method(
    name="hs",
    title="Hidden states, by a choice of layer maps",
    paper="Udagawa, Trivedi, Merler, Bhattacharjee (2023): A Comparative Analysis of Task-Agnostic Distillation "
    f"Methods for Compressing Transformer Language Models. arXiv 2310.08797; emd: {EMD_PAPER}",
    formula="mean_(i, j) MSE(W_i h_S[i], h_T[j]) (+ w_p (alpha T^2 KL + (1 - alpha) CE), not on masked text)",
    signals="hidden states; except on masked text also logits and gold labels",
    constraints='none; "all" needs equal depths, "last-k", "uniform+last" and "random" a student no deeper',
    cost="the teacher's forward pass up to its highest mapped block a step",
    options=HSOptions,
    build=build,
    check=check,
    needs=frozenset(),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
    text_train={"learning_rate": 5e-4},
)
