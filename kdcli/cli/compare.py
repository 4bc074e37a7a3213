"""kdcli compare"""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="The recipes, TOML files.", show_default=False)],
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Runs of each recipe.")] = 3,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of every recipe; FIELD= removes it."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="FIELD=VALUE[,...]",
            help="Run every recipe with these fields changed, too, beside the plain recipe; repeatable.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Run all recipes on this task instead of their own; repeatable."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            help="Recipe to take differences from; default: that of method kd, or the first.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and the report.")] = Path(
        "comparison"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run again what was made from another recipe.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Fine-tune the teachers again, and run everything again.")
    ] = False,
    allow_unequal: Annotated[
        bool, typer.Option("--allow-unequal", help="Compare on unequal terms, and say so in the report.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Run recipes on equal terms with several seeds, and compare their students.

    The same command goes on where it was stopped: what is finished is not run again. Task, teacher, protocol,
    batch size, steps, precision and the students' sizes must be equal; methods and their options may differ.

    \b
    Examples:
      kdcli compare recipes/rte-*.toml --seeds 3
      kdcli compare recipes/rte-*.toml --dry-run
      kdcli compare kd.toml makd.toml --seeds 5 --task cola --task rte --set train.epochs=3
      kdcli compare adkd.toml lgtm.toml --variant overparam.length=1 --variant overparam.factorization=svd
      kdcli compare kd.toml mine.toml --baseline mine --output mine-or-kd --json > result.json
    """
    from kdcli.cli import render
    from kdcli.cli.console import emit, err, info
    from kdcli.compare.plan import check_folder, check_reusable, plan_comparison
    from kdcli.files import expanded

    plan = plan_comparison(
        recipes,
        seeds=seeds,
        console=err,
        overrides=set_,
        variants=variant,
        tasks=task,
        baseline=baseline,
        allow_unequal=allow_unequal,
    )
    output = expanded(output, "--output")
    check_folder(output)
    if dry_run:
        if not (force or refresh):
            check_reusable(plan, output / "runs")
        emit(plan.to_json(output / "runs"), table=render.comparison_plan(plan, output / "runs"), as_json=as_json)
        for difference in plan.unequal:
            info(f"not on equal terms: {difference}")
        for note in plan.left_out:
            info(note)
        return 0
    from kdcli.compare.run import run_cells

    results = run_cells(plan, output / "runs", console=err, force=force, refresh=refresh)
    from kdcli.compare.figure import draw
    from kdcli.compare.report import make_report

    report = make_report(plan, results)
    report.write(output, draw(report))
    emit(report.to_json(), table=render.comparison(report), as_json=as_json)
    for difference in report.unequal:
        info(f"not on equal terms: {difference}")
    for note in report.notes:
        info(note)
    for failure in report.failures:
        info(f"no result: {failure.cell.name}: {failure.message}")
    info(f"report: {output / 'comparison.md'}, .csv, .json, .png, .svg")
    return int(results.exit_code)
