"""kdcli distill"""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcli.cli.limits import FailUnder, FailUnderRetention

if TYPE_CHECKING:
    from kdcli.distill.run import RunResult
    from kdcli.recipe.schema import Recipe


def distill(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe; FIELD= removes it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train and write nothing.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            min=1,
            max=65_536,
            help="With --dry-run: tell what each of so many processes needs.",
        ),
    ] = None,
    config_only: Annotated[
        bool,
        typer.Option(
            "--config-only",
            help="With --dry-run: look at configurations alone; weights need not be there.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for runs (default: runs/ here).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run of the same name.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Fine-tune the teacher again.")] = False,
    fail_under: FailUnder = None,
    fail_under_retention: FailUnderRetention = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Train or load the teacher, build the student, distil, contract, evaluate, report.

    \b
    Examples:
      kdcli distill recipes/quickstart.toml
      kdcli distill recipes/sst2-makd.toml --dry-run
      kdcli distill recipes/sst2-makd.toml --set student.budget=0.25 --set name=quarter
      kdcli distill recipe.toml --json --fail-under 0.9 > result.json
      kdcli distill recipe.toml --dry-run --config-only --processes 8
      torchrun --nproc-per-node 2 -m kdcli distill recipe.toml
    """
    from kdcli.distill.recipe import limits_of, load_recipe
    from kdcli.errors import InputError
    from kdcli.recipe.load import with_place

    if (processes is not None or config_only) and not dry_run:
        raise typer.BadParameter("--processes and --config-only go with --dry-run")
    if force and resume:
        raise typer.BadParameter("--force and --resume exclude each other")
    loaded = load_recipe(recipe, set_ or [])
    from kdcli.cli import render
    from kdcli.cli.console import emit, err, info, settle, shown_path
    from kdcli.cli.imports import uncollected

    if os.environ.get("RANK", "0") == "0":
        # Before the libraries are imported, which takes seconds.
        info(f"{recipe}: {_summary(loaded)}")
    if dry_run:
        from kdcli.runs import find_run, place_of_run

        try:
            limits = limits_of(loaded, fail_under=fail_under, fail_under_retention=fail_under_retention)
            place = place_of_run(loaded, recipe, output)
            run = find_run(*place, loaded.model_dump(exclude_none=True), force=force, resume=resume)
            with uncollected():
                from kdcli.distill.plan import make_plan
                from kdcli.distill.prepare import check_scored, prepare
                from kdcli.distill.states import check_room
                from kdcli.models.checkpoint import configurations_alone

                with configurations_alone(config_only):
                    prepared = prepare(loaded, recipe, processes)
                    check_scored(limits, prepared.task)
                    check_room(prepared.state_bytes, run.checkpoints)
                    plan = make_plan(prepared)
        except InputError as error:
            raise with_place(error, recipe, set_) from error
        emit(plan.to_json(), table=render.plan(plan), as_json=as_json)
        return 0
    with uncollected():
        from kdcli.distill.run import run_distill
    from kdcli.terminal import warn, wide
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
            fail_under_retention=fail_under_retention,
            overrides=set_ or [],
            console=err,
        )
    except InputError as error:
        raise with_place(error, recipe, set_) from error
    if not is_main():
        return int(result.exit_code)
    if result.exported is not None:
        wide(err).print(render.exported(result.exported))
        if result.exported.latency is not None and (doubt := result.exported.latency.doubt()) is not None:
            warn(err, doubt)
    scores = shown_path(result.run.path / "run.json")
    emit(result.to_json(), table=render.scores(result.result), as_json=as_json, kept=scores)
    info(f"student: {shown_path(result.run.student)}")
    info(f"scores: {scores}")
    if result.onnx is not None:
        info(f"onnx: {shown_path(result.onnx)}")
    for command in _next_commands(result):
        info(f"next: {command}")
    return settle(result.gates)


def _next_commands(result: "RunResult") -> list[str]:
    """Return what a user may want to run after this run."""
    from kdcli.cli.console import shown_path

    run, tuned = shlex.quote(shown_path(result.run.path)), ""
    if result.record.is_general:
        if not result.result.finetune:
            return []
        tuned = f" --task {shlex.quote(result.result.finetune[0].task)}"
    commands = [f"kdcli eval {run}{tuned}"] if tuned or result.result.loss is None else []
    return commands if result.onnx is not None else [*commands, f"kdcli export {run}{tuned}"]


def _summary(recipe: "Recipe") -> str:
    """Return what a recipe is about in a few words: `makd on sst2, low-rank student`."""
    from kdcli.methods import registry

    form = recipe.student.form or registry.get(recipe.method.name).student.get("form", "depth")
    return f"{recipe.method.name} on {recipe.task.name}, {form} student"
