"""GKD: the student learns from the teacher's distributions at tokens that the student itself wrote."""

from typing import Literal

from pydantic import Field

from kdcli.methods.base import Context, Method, Stage
from kdcli.methods.sampling import SamplingOptions, check_sampling
from kdcli.methods.terms import Temperature, need_equal_vocabulary, refuse_idle
from kdcli.recipe.schema import Share


class GKDOptions(SamplingOptions):
    """Whose text is learnt from, how it is written, and how the two models are compared on it."""

    on_policy: Share = Field(
        default=0.5,
        description="Share of the steps that learn from the student's own responses (lambda of the paper); the others "
        "learn from the given ones.",
    )
    divergence: Literal["js", "kl", "reverse-kl"] = Field(
        default="js",
        description="How the two distributions at a token are compared: the generalised Jensen-Shannon divergence, "
        "KL(teacher || student), or KL(student || teacher).",
    )
    beta: float = Field(default=0.5, gt=0.0, lt=1.0, description="Share of the teacher in the mean distribution of js.")
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens both distributions before they are compared."
    )


def check(options: GKDOptions, context: Context) -> None:
    """Raise InputError for options without effect, and for responses that no prompt leaves room for."""
    if options.divergence != "js":
        refuse_idle(options, ("beta",), 'without divergence = "js"')
    if options.on_policy == 0:
        refuse_idle(options, ("max_new_tokens", "sampling_temperature", "top_k", "top_p"), "where on_policy is 0")
    else:
        check_sampling(options, context)
    need_equal_vocabulary(context)


def build(options: GKDOptions, context: Context) -> list[Stage]:
    """Return one stage whose scheme lets the student write. Gold answers have no part: it wrote them itself."""
    from kdcli.objectives.term import Divergence
    from kdcli.training.schemes.on_policy import OnPolicyScheme

    scheme = OnPolicyScheme("gkd", options.on_policy, options.sampling(), max_new_tokens=options.max_new_tokens)
    divergence = Divergence(options.divergence, beta=options.beta)
    return [Stage("distil", [context.output_term(1.0, options.temperature, divergence=divergence)], scheme=scheme)]


METHOD = Method(
    name="gkd",
    title="Logits on the student's own text",
    paper="Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem (2024): On-Policy Distillation of Language Models: "
    "Learning from Self-Generated Mistakes. arXiv 2306.13649",
    formula="D(softmax(z_T / T) || softmax(z_S / T)) for each token of a response that the student drew (a share "
    "lambda of the steps) or that is given; D = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q",
    signals="logits on responses that the student writes, and on given ones",
    constraints="tasks of prompts and responses; the same vocabulary",
    cost="one teacher forward pass a step; on-policy steps let the student write a response a row before",
    options=GKDOptions,
    build=build,
    check=check,
    needs=frozenset({"prompts"}),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
)
