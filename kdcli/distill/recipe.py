"""Recipes with all that they may name: methods and kinds of tasks."""

from collections.abc import Sequence
from pathlib import Path

from kdcli.errors import InputError
from kdcli.gates import Limits
from kdcli.methods import registry as methods
from kdcli.recipe.check import Schemas
from kdcli.recipe.load import read_recipe
from kdcli.recipe.schema import Recipe
from kdcli.tasks import registry as kinds

SCHEMAS = Schemas(lambda name: methods.get(name).options, kinds.kind_of, lambda: kinds.usable()[0])


def load_recipe(path: Path, overrides: list[str] | None = None, *, variant: Sequence[str] = ()) -> Recipe:
    """Return the recipe in `path` with `--set FIELD=VALUE` overrides on top, and then those of a `--variant`.

    Raises InputError with every problem found: file and line (or the option), field, what was found, and what is
    allowed.
    """
    return read_recipe(path, SCHEMAS, overrides, variant=variant)


def limits_of(recipe: Recipe, *, fail_under: float | None = None, fail_under_retention: float | None = None) -> Limits:
    """Return the limits of a recipe, options before fields. Raises InputError where there will be no such score."""
    given = {"--fail-under": fail_under, "--fail-under-retention": fail_under_retention}
    for option, value in given.items():
        if value is not None and (kind := kinds.kind_of(recipe.task)).scored_by_loss:
            raise InputError(
                f'needs a task with a score; type = "{kind.name}" has none',
                where=option,
                hint=f"score a fine-tuned student: kdcli eval RUN/finetune/TASK --task TASK {option} ..."
                if kind.general
                else None,
            )
    if fail_under_retention is not None and recipe.teacher.black_box:
        raise InputError("a black box has no score to keep a share of", where="--fail-under-retention")
    section = recipe.evaluate
    return Limits(
        fail_under if fail_under is not None else section.fail_under,
        fail_under_retention if fail_under_retention is not None else section.fail_under_retention,
    )
