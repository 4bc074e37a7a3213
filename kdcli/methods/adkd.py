"""AD-KD: the student rests its predictions on the same words as the teacher."""

from kdcli.errors import InputError
from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.terms import Temperature, Weight
from kdcli.recipe.schema import Share, Times, Width


class ADKDOptions(Options):
    """Weights and temperature of the prediction, and how attribution maps are made.

    alpha: the share of the teacher's prediction, 1 - alpha that of the gold labels. beta: the weight of the maps.
    anneal: let the temperature fall to 1 by the last epoch. top_k: how many features of the teacher's embedding
    count, the largest of each token; all without it. steps: points of integrated gradients, each one more pass of
    both models; 1 is gradient x input. Published weights differ by task, beta from 1 to 100; the defaults are the
    gentle end, from which beta can be raised.
    """

    alpha: Share = 0.9
    beta: Weight = 1.0
    temperature: Temperature = 2.0
    anneal: bool = False
    top_k: Width | None = None
    steps: Times = 1


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
    from kdcli.objectives.gold import TaskObjective
    from kdcli.objectives.output import AnnealedOutputObjective

    maps = AttributionObjective(context.kind, context.num_labels, top_k=options.top_k, steps=options.steps)
    return [
        Stage(
            "distil",
            [
                Term(
                    "output",
                    AnnealedOutputObjective(context.kind, options.temperature, anneal=options.anneal),
                    options.alpha,
                ),
                Term("task", TaskObjective(context.kind), 1.0 - options.alpha),
                Term("attribution", maps, options.beta),
            ],
        )
    ]


METHOD = Method(
    name="adkd",
    title="Attribution-driven distillation: the words that a prediction rests on",
    paper="Wu, Chen, Quan, Wang, Wang (2023): AD-KD: Attribution-Driven Knowledge Distillation for Language Model "
    "Compression. arXiv 2305.10010",
    formula="(1 - alpha) CE(z_S, y) + alpha KL(softmax(z_T / T) || softmax(z_S / T)) + beta sum_c "
    "mean_t (a_T - a_S)^2, a_t = |dF_c/dE_t * E_t| / |a|, F_c = -log p_c",
    signals="gradients at the embedding output, logits, gold labels",
    constraints="none; top_k at most the teacher's width",
    cost="a forward and a backward pass of the teacher a step, a second derivative of the student; "
    "K times with steps = K, C backward passes with C > 2 classes",
    options=ADKDOptions,
    build=build,
    check=check,
    student={"form": "depth"},
    train={"epochs": 6.0, "learning_rate": 4e-5, "warmup": 0.0, "weight_decay": 0.0},
)
