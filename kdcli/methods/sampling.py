"""Options of methods whose models write text."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from kdcli.errors import InputError
from kdcli.methods.base import Context, Options
from kdcli.methods.terms import refuse_idle
from kdcli.recipe.schema import Fraction, NonNegativeFloat, PositiveInt

if TYPE_CHECKING:
    from kdcli.models.generation import Sampling


class SamplingOptions(Options):
    """How text is written."""

    max_new_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens that a response has at most. Left out, what its prompt leaves of task.max_length, which "
        "holds both.",
    )
    sampling_temperature: NonNegativeFloat = Field(
        default=1.0,
        description="Temperature that the tokens of a response are drawn at. 0 takes the most probable one.",
    )
    top_k: Annotated[int, Field(ge=0, le=1_000_000_000)] = Field(
        default=0, description="Draw from this many of the most probable tokens. 0 draws from all."
    )
    top_p: Fraction = Field(
        default=1.0, description="Draw from the fewest tokens that have this share of the probability together."
    )

    def sampling(self) -> "Sampling":
        """Return what the generation takes."""
        from kdcli.models.generation import Sampling

        return Sampling(self.sampling_temperature, self.top_k, self.top_p)


def check_sampling(options: SamplingOptions, context: Context) -> None:
    """Raise InputError for responses that no prompt leaves room for, and for options without effect."""
    if options.sampling_temperature == 0:
        refuse_idle(options, ("top_k", "top_p"), "at sampling_temperature = 0")
    check_room(options.max_new_tokens, context)


def check_room(new_tokens: int | None, context: Context) -> None:
    """Raise InputError for responses that no prompt leaves room for."""
    if new_tokens is not None and new_tokens >= context.max_length:
        raise InputError(
            f"{new_tokens} new tokens leave no room for a prompt within task.max_length = {context.max_length}",
            where="method.max_new_tokens",
            hint=f"use at most {max(1, context.max_length // 2)}, or a larger task.max_length",
        )
