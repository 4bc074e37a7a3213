"""The pipeline from a recipe to a run folder. The package itself can be called: `kdcli.distill("recipe.toml")`."""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcli.distill.run import RunResult


class _Pipeline(ModuleType):
    def __call__(
        self, recipe: "str | Path | dict[str, Any]", *, overrides: list[str] | None = None, **options: Any
    ) -> "RunResult":
        """Run a recipe, as `kdcli distill` does, and return its result; progress is told on stderr.

        recipe: a file, or what such a file holds; the paths of a dictionary start from the working folder.
        overrides: FIELD=VALUE, as for --set, of a file. options: of `run_distill`, such as output, force and resume.
        Raises the errors of `kdcli.errors`.
        """
        from kdcli.distill.recipe import SCHEMAS, load_recipe
        from kdcli.distill.run import run_distill
        from kdcli.recipe.load import recipe_of

        if isinstance(recipe, dict):
            path, loaded = Path("recipe.toml"), recipe_of(recipe, SCHEMAS)
        else:
            path = Path(recipe)
            loaded = load_recipe(path, overrides)
        return run_distill(loaded, recipe_path=path, overrides=overrides, **options)


sys.modules[__name__].__class__ = _Pipeline
