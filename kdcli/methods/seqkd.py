"""SeqKD: the student learns from text that the teacher writes."""

from pydantic import Field

from kdcli.methods.base import Context, Method, Stage
from kdcli.methods.sampling import SamplingOptions, check_sampling
from kdcli.methods.terms import Temperature, need_equal_vocabulary, refuse_idle
from kdcli.recipe.schema import Seed, Share


class SeqKDOptions(SamplingOptions):
    """How the teacher writes, and what its distributions weigh beside its text."""

    generation_seed: Seed = Field(
        default=0,
        description="Seed of what the teacher writes, apart from the recipe's seed, so that runs of several seeds "
        "share its responses.",
    )
    token_kd: Share = Field(
        default=0.0,
        description="Share of the teacher's distribution at each token that it wrote; the tokens themselves have the "
        "rest. The paper of MiniLLM describes 0; its released script of SeqKD uses 0.5.",
    )
    temperature: Temperature = Field(
        default=1.0, description="Temperature that softens both distributions of token_kd before they are compared."
    )


def check(options: SeqKDOptions, context: Context) -> None:
    """Raise InputError for options without effect, and for responses that no prompt leaves room for."""
    check_sampling(options, context)
    if options.token_kd == 0:
        refuse_idle(options, ("temperature",), "where token_kd is 0")
    need_equal_vocabulary(context)


def build(options: SeqKDOptions, context: Context) -> list[Stage]:
    """Return one stage on the teacher's text."""
    from kdcli.training.schemes.seqkd import TeacherTextScheme

    scheme = TeacherTextScheme(options.sampling(), max_new_tokens=options.max_new_tokens, seed=options.generation_seed)
    terms = context.prediction_terms(1.0, options.token_kd, options.temperature)
    return [Stage("distil", terms, scheme=scheme)]


METHOD = Method(
    name="seqkd",
    title="Text that the teacher writes",
    paper="Kim, Rush (2016): Sequence-Level Knowledge Distillation. arXiv 1606.07947",
    formula="-(1 - k) log p_S(y | x) + k T^2 KL(softmax(z_T / T) || softmax(z_S / T)) for each token of y, drawn from "
    "the teacher given the prompt x",
    signals="responses that the teacher writes; with token_kd its logits on them",
    constraints="tasks of prompts and responses; the same vocabulary",
    cost="student only (with token_kd one teacher forward pass a step); before it the teacher writes one response a "
    "row, evaluate.batch_size at a time, once for all students",
    options=SeqKDOptions,
    build=build,
    check=check,
    needs=frozenset({"prompts"}),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-5},
)
