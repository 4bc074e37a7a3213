"""kdcli distill"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kdcli.recipe.schema import Recipe


def distill(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train and write nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for runs (default: runs/ here).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run of the same name.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Fine-tune the teacher again.")] = False,
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit with 1 when the student scores less (0 to 1).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Train or load the teacher, build the student, distil, contract, evaluate, report.

    \b
    Examples:
      kdcli distill recipes/quickstart.toml
      kdcli distill recipes/sst2-makd.toml --dry-run
      kdcli distill recipes/sst2-makd.toml --set student.budget=0.25 --set name=quarter
      kdcli distill recipe.toml --json --fail-under 0.9 > result.json
      torchrun --nproc-per-node 2 -m kdcli distill recipe.toml
    """
    from kdcli.errors import InputError
    from kdcli.recipe.load import load_recipe, with_place

    if force and resume:
        raise typer.BadParameter("--force and --resume exclude each other")
    loaded = load_recipe(recipe, set_ or [])
    from kdcli.cli.console import emit, err, info

    if os.environ.get("RANK", "0") == "0":
        # Before the libraries are imported, which takes seconds.
        info(f"{recipe}: {_summary(loaded)}")
    if dry_run:
        from kdcli.runs import find_run, place_of_run

        try:
            place = place_of_run(loaded, recipe, output)
            find_run(*place, loaded.model_dump(exclude_none=True), force=force, resume=resume)
            from kdcli.plan import make_plan
            from kdcli.prepare import check_gate, prepare

            check_gate(loaded, fail_under)
            plan = make_plan(prepare(loaded, recipe))
        except InputError as error:
            raise with_place(error, recipe, set_) from error
        emit(plan.to_json(), table=plan.table(), as_json=as_json)
        return 0
    from kdcli.pipeline import run_distill
    from kdcli.training.distributed import is_main

    try:
        result = run_distill(
            loaded,
            recipe_path=recipe,
            output=output,
            force=force,
            resume=resume,
            refresh=refresh,
            fail_under=fail_under,
            overrides=set_ or [],
            console=err,
        )
    except InputError as error:
        raise with_place(error, recipe, set_) from error
    if is_main():
        emit(result.to_json(), table=result.table(), as_json=as_json)
    return int(result.exit_code)


def _summary(recipe: "Recipe") -> str:
    """Return what a recipe is about in a few words: `makd on sst2, low-rank student`."""
    from kdcli.methods import registry

    form = recipe.student.form or registry.get(recipe.method.name).student.get("form", "depth")
    return f"{recipe.method.name} on {recipe.task.name}, {form} student"
