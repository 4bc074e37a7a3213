"""Running the cells of a comparison one after the other, each once."""

import gc
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdcli.compare.plan import Cell, ComparisonPlan, check_reusable, is_done, is_other_run
from kdcli.distill.record import FinishedRun, finished
from kdcli.distill.run import run_distill
from kdcli.errors import ExitCode, InputError
from kdcli.faults import explain
from kdcli.names import folder_of
from kdcli.runs import Run, remove_run
from kdcli.terminal import tell
from kdcli.training.distributed import state


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    cell: Cell
    message: str
    code: ExitCode
    traceback: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.cell.name,
            "task": self.cell.entry.task,
            "name": self.cell.entry.label,
            "seed": self.cell.seed,
            "recipe": str(self.cell.entry.file),
            "error": self.message,
            "traceback": self.traceback,
        }


@dataclass
class Results:
    """What the cells gave: the record of each finished run under its name, and the failures."""

    root: Path
    records: dict[str, FinishedRun] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """RUN when a cell broke, INPUT when all that failed were wrong input, else OK."""
        return max((failure.code for failure in self.failures), default=ExitCode.OK)


def run_cells(
    plan: ComparisonPlan, root: Path, *, console: Console, force: bool = False, refresh: bool = False
) -> Results:
    """Run every cell that is not finished, and return all results; what fails is noted, and the others go on.

    root: the folder of the runs. force: run those again that were made from another recipe. refresh: fine-tune
    the teachers again, and run everything again.
    Raises InputError, before anything runs, when a run there was made from another recipe and `force` is not given.
    """
    if state().num_processes > 1:
        raise InputError("compare runs in one process", hint="leave out torchrun; kdcli distill takes it")
    if not (force or refresh):
        check_reusable(plan, root)
    if refresh:
        # All at once: a comparison that is stopped must not go on with runs of the teacher before.
        for cell in plan.cells:
            remove_run(Run(folder_of(root, cell.name)))
    results = Results(root)
    fresh_teachers: set[str] = set()
    cells = plan.cells
    for number, cell in enumerate(cells, 1):
        run = Run(folder_of(root, cell.name))
        head = f"{number}/{len(cells)} {cell.name}"
        try:
            if is_done(cell, run):
                tell(console, f"{head}: done before")
                run.tidy(keep_checkpoints=cell.recipe.train.keep_checkpoints)
            else:
                tell(console, head)
                _run(cell, run, console, refresh=refresh and _teacher_of(cell) not in fresh_teachers)
                fresh_teachers.add(_teacher_of(cell))
            results.records[cell.name] = finished(run)
        except Exception as error:
            results.failures.append(_failure(cell, error))
            tell(console, f"{cell.name}: {type(error).__name__}", mark="failed")
        _free()
    return results


def _run(cell: Cell, run: Run, console: Console, *, refresh: bool) -> None:
    other = is_other_run(cell, run)
    resume = run.begun and not other
    if resume and any(run.checkpoints.rglob("checkpoint-*")):
        run.update({"interrupted": True})
    run_distill(
        cell.recipe,
        recipe_path=cell.entry.file,
        output=run.path.parent,
        force=other,
        resume=resume,
        refresh=refresh,
        overrides=[*cell.entry.overrides, *cell.entry.variant],
        console=console,
    )


def _teacher_of(cell: Cell) -> str:
    return f"{cell.entry.fingerprint} {cell.recipe.teacher}"


def _failure(cell: Cell, error: Exception) -> Failure:
    if (known := explain(error)) is not None:
        where = f"{known.where}: " if known.where else ""
        return Failure(cell, where + known.message, known.exit_code)
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return Failure(cell, message, ExitCode.RUN, "".join(traceback.format_exception(error)))


def _free() -> None:
    """Give back what the last run's models held, on the device, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
