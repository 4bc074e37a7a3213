"""AD-KD: the student rests its predictions on the same tokens (of images, patches) as the teacher."""

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import Temperature, Weight
from kdcli.recipe.schema import Share, Times, Width


class ADKDOptions(Options):
    """Weights and temperature of the prediction, and how attribution maps are made."""

    alpha: Share = Field(default=0.9, description="Share of the teacher's prediction; the gold labels have the rest.")
    beta: Weight = Field(
        default=1.0,
        description="Weight of the attribution maps. Published values go from 1 to 100 by task; the default is the "
        "gentle end.",
    )
    temperature: Temperature = Field(
        default=2.0, description="Temperature of the teacher's and the student's prediction."
    )
    anneal: bool = Field(default=False, description="Let the temperature fall linearly to 1 by the last epoch.")
    top_k: Width | None = Field(
        default=None,
        description="How many features of the teacher's embedding count, the largest ones of each token. Left out, "
        "all.",
    )
    steps: Times = Field(
        default=1,
        description="Points of integrated gradients, each one more pass of both models; 1 is gradient x input.",
    )


def check(options: ADKDOptions, context: Context) -> None:
    """Raise InputError when more features are to count than the teacher has."""
    width = context.teacher.hidden
    if options.top_k is not None and options.top_k > width:
        raise InputError(
            f"the teacher's embeddings have {width} features, so {options.top_k} of them cannot count",
            where="method.top_k",
            hint=f"use at most {width}, or leave it out",
        )


def build(options: ADKDOptions, context: Context) -> list[Stage]:
    """Return one stage with the three terms."""
    from kdcli.objectives.attribution import AttributionObjective

    one_each = "one-per-example" in context.kind.provides
    maps = AttributionObjective(context.kind.distribution, one_each=one_each, top_k=options.top_k, steps=options.steps)
    return [
        Stage(
            "distil",
            [
                # Without T^2, as published.
                context.output_term(options.alpha, options.temperature, scale=False, anneal=options.anneal),
                context.gold_term(1.0 - options.alpha),
                Term("attribution", maps, options.beta),
            ],
        )
    ]


METHOD = Method(
    name="adkd",
    title="Prediction and the tokens that it rests on",
    paper="Wu, Chen, Quan, Wang, Wang (2023): AD-KD: Attribution-Driven Knowledge Distillation for Language Model "
    "Compression. arXiv 2305.10010",
    formula="(1 - alpha) CE(z_S, y) + alpha KL(softmax(z_T / T) || softmax(z_S / T)) + beta sum_c "
    "mean_t (a_T - a_S)^2, a_t = |dF_c/dE_t * E_t| / |a|, F_c = -log p_c; for several predictions r an example, which "
    "the paper has not: F = -sum_r log p(y_r), one for each table of them (starts and ends of spans)",
    signals="gradients at the embedding output, logits, gold labels",
    constraints="none; top_k at most the teacher's width",
    cost="a forward and a backward pass of the teacher a step, a second derivative of the student; "
    "K times with steps = K, C backward passes with C > 2 classes of one prediction an example, one a table otherwise",
    options=ADKDOptions,
    build=build,
    check=check,
    student={"form": "depth"},
    train={"epochs": 6.0, "learning_rate": 4e-5, "warmup": 0.0, "weight_decay": 0.0},
)
