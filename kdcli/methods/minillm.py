"""MiniLLM: reverse KL divergence between sequences, on responses that the student wrote with the teacher's help."""

from typing import Annotated

from pydantic import Field

from kdcli.methods.base import Context, Method, Options, Stage, Term
from kdcli.methods.sampling import check_room
from kdcli.methods.terms import need_equal_vocabulary
from kdcli.recipe.schema import PositiveInt


class MiniLLMOptions(Options):
    """How responses are drawn, and which parts of the gradient are used."""

    max_new_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens that a response has at most. Left out, what its prompt leaves of task.max_length, which "
        "holds both.",
    )
    teacher_share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.2,
        description="Share of the teacher's distribution in the one that tokens are drawn from (alpha of the paper).",
    )
    long_term: bool = Field(
        default=False,
        description="Add the part of the gradient by which a token answers for those after it, whose mean reward it "
        "is weighted with. false takes the single-step part alone, which is exact over the vocabulary.",
    )


def check(options: MiniLLMOptions, context: Context) -> None:
    """Raise InputError for responses that no prompt leaves room for, and for different vocabularies."""
    check_room(options.max_new_tokens, context)
    need_equal_vocabulary(context)


def build(options: MiniLLMOptions, context: Context) -> list[Stage]:
    """Return one stage in which every response is drawn."""
    from kdcli.models.generation import Sampling
    from kdcli.objectives.reverse import SequenceKLObjective
    from kdcli.training.schemes.on_policy import OnPolicyScheme

    scheme = OnPolicyScheme(
        "minillm",
        1.0,
        Sampling(1.0),
        max_new_tokens=options.max_new_tokens,
        teacher_share=options.teacher_share,
    )
    objective = SequenceKLObjective(
        context.kind.distribution, teacher_share=options.teacher_share, long_term=options.long_term
    )
    return [Stage("distil", [Term("output", objective)], scheme=scheme)]


METHOD = Method(
    name="minillm",
    title="Reverse KL on the student's own text",
    paper="Gu, Dong, Wei, Huang (2024): MiniLLM: Knowledge Distillation of Large Language Models. arXiv 2306.08543",
    formula="sum_t w_t KL(q_t || p_t) for each token y_t drawn from (1 - a) q_t + a p_t, w_t = q_t(y_t) / ((1 - a) "
    "q_t(y_t) + a p_t(y_t)); with long_term - sum_t w_t R_t log q_t(y_t), R_t the mean of log p / q at later tokens",
    signals="logits on responses that the student writes with the teacher's help",
    constraints="tasks of prompts and responses; the same vocabulary; a student that answers such prompts already",
    cost="both models write a response a row, and run once over it; each response is used for one step (no inner "
    "epochs, so that PPO's clip has nothing to do); no loss of plain text",
    options=MiniLLMOptions,
    build=build,
    check=check,
    needs=frozenset({"prompts"}),
    student={"form": "depth"},
    train={"epochs": 3.0, "learning_rate": 5e-6},
)
