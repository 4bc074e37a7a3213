"""Models that make other tokens of an image: what can be compared of them, and what is refused."""

from collections.abc import Sequence

from kdcli.distill.states import teacher_request, without_states
from kdcli.errors import InputError
from kdcli.methods.base import Context, Stage
from kdcli.models.tokens import difference, shared_tokens
from kdcli.recipe.schema import Recipe
from kdcli.signals import Request


def _requests(stages: Sequence[Stage]) -> list[Request]:
    """Return what stages compare of the inside of a teacher."""
    return [request for stage in stages if (request := teacher_request(stage.terms)).inside]


def check_tokens(recipe: Recipe, stages: Sequence[Stage], context: Context) -> None:
    """Raise InputError where tokens are compared that only one of two models has, and those that both have do not do.

    Raises it, too, where they have no tokens of patches in common.
    """
    requests, shapes = _requests(stages), (context.student, context.teacher)
    if not requests or shared_tokens(*shapes) is None:
        return
    name, line = recipe.method.name, difference(*shapes)
    if any(request.gradients for request in requests):
        raise InputError(
            f"{name} compares how much each token counts beside all others, and tokens could be {line}",
            where="student",
            hint="use another method, such as kd or hs",
        )
    if recipe.teacher.cache == "all":
        raise InputError(
            f"the teacher's states cannot be kept: tokens are {line}",
            where="teacher.cache",
            hint=without_states(context.kind),
        )


def notes_of_tokens(stages: Sequence[Stage], context: Context) -> list[str]:
    """Return a line about the tokens that are compared, where these are not all."""
    shapes = context.student, context.teacher
    return [f"tokens are {difference(*shapes)}"] if _requests(stages) and shared_tokens(*shapes) is not None else []
