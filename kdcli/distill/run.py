"""From a recipe to a run folder: what `kdcli distill` does, in its order."""

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import set_seed

from kdcli import runs
from kdcli.distill.filler import add_copies_to
from kdcli.distill.job import Job, attempt
from kdcli.distill.prepare import check_scored, prepare
from kdcli.distill.recipe import limits_of
from kdcli.distill.record import FinishedRun, finished
from kdcli.distill.score import score_student, score_teacher
from kdcli.distill.states import check_room
from kdcli.distill.student import distil
from kdcli.distill.teacher import make_teacher
from kdcli.distill.vocabulary import with_vocabulary
from kdcli.distill.write import document_of, write_graph, write_student
from kdcli.errors import ExitCode
from kdcli.evaluation.result import Result
from kdcli.gates import Gate, Limits, exit_code_of, parity_gates
from kdcli.machine import versions
from kdcli.recipe.load import portable
from kdcli.recipe.schema import Recipe
from kdcli.tasks.metrics import is_error
from kdcli.terminal import stderr, tell
from kdcli.training.distributed import agree, is_main, main_does

if TYPE_CHECKING:
    from kdcli.export.export import ExportResult


@dataclass
class RunResult:
    """A finished run, its record, and the gates that were set for it."""

    run: runs.Run
    record: FinishedRun
    gates: list[Gate]
    exported: "ExportResult | None" = None
    """What this call wrote as ONNX; `onnx` also knows what an earlier one wrote."""

    @property
    def exit_code(self) -> ExitCode:
        return exit_code_of(self.gates)

    @property
    def result(self) -> Result:
        return self.record.result

    @property
    def onnx(self) -> Path | None:
        """The folder of the exported graph, if there is one."""
        return self.run.onnx if self.record.export is not None and self.run.onnx.is_dir() else None

    def to_json(self) -> dict[str, Any]:
        """Return the run's record, with the places of what was written and the gates."""
        places = {"run": self.run.path, "student": self.run.student, "onnx": self.onnx}
        return {
            **self.run.document,
            "paths": {name: str(path.resolve()) if path is not None else None for name, path in places.items()},
            "gates": [gate.to_json() for gate in self.gates],
        }


def run_distill(
    recipe: Recipe,
    *,
    recipe_path: Path,
    output: Path | None = None,
    force: bool = False,
    resume: bool = False,
    refresh: bool = False,
    fail_under: float | None = None,
    fail_under_retention: float | None = None,
    overrides: list[str] | None = None,
    console: Console | None = None,
) -> RunResult:
    """Train or load the teacher, build the student, distil, contract, evaluate, report.

    Raises InputError for a wrong recipe, model or data; nothing is left behind then.
    """
    begun = time.perf_counter()
    console = stderr(quiet=True) if not is_main() else console or stderr()
    limits = limits_of(recipe, fail_under=fail_under, fail_under_retention=fail_under_retention)
    root, name = runs.place_of_run(recipe, recipe_path, output)
    document = recipe.model_dump(exclude_none=True)
    # Others would meet the folder that the main process has just made.
    before = agree(runs.find_run(root, name, document, force=force, resume=resume) if is_main() else None)
    assert before is not None
    whole = portable(recipe, name, recipe_path.resolve().parent)
    if resume and before.is_done:
        main_does(partial(before.tidy, whole, keep_checkpoints=recipe.train.keep_checkpoints))
        main_does(before.check_files)
        tell(console, f"{before.path} is finished already")
        return _with_gates(before, limits)

    prepared = prepare(recipe, recipe_path)
    check_scored(limits, prepared.task)
    check_room(prepared.state_bytes, before.checkpoints)
    prepared.load_sources()
    opened = runs.open_run(root, name, force=force, resume=resume, create=is_main())
    with opened as run, attempt(run, document, resume) as this_attempt:
        job = Job(prepared, run, console, resume=resume, refresh=refresh)
        main_does(
            lambda: run.begin(
                recipe=document,
                portable=whole,
                source=recipe_path,
                overrides=overrides or [],
                seed=recipe.seed,
                versions={**versions(), "threads": str(torch.get_num_threads())},
            )
        )
        for note in prepared.notes:
            job.tell(f"note: {note}")
        for note in prepared.method_notes:
            job.tell(f"{prepared.resolved.method.name}: {note}")
        task = prepared.task
        set_seed(recipe.seed)
        # Fine-tuning changes the model in place.
        keeps_base = bool(prepared.resolved.from_base) and prepared.teacher.trains
        base = copy.deepcopy(prepared.teacher.model) if keeps_base else None
        with job.timed("teacher"):
            teacher = make_teacher(prepared.teacher, recipe, task, prepared.head, **job.settings_of("teacher"))
            teacher_scores = score_teacher(job, task, teacher)
        teacher = replace(teacher, base=base)
        task = add_copies_to(task, job)
        nearest, trained = with_vocabulary(job, task, teacher), []
        for follower in prepared.followers:
            trained.append(distil(job, task, nearest, follower))
            this_attempt.keep()
            nearest = replace(nearest, model=trained[-1].model, path=None)
        *assistants, student = trained
        student = student.handed_over(task)
        with job.timed("evaluate"):
            result = score_student(job, task, teacher, teacher_scores, student)
        job.seconds["total"] = round(time.perf_counter() - begun, 3)
        record = document_of(job, task, teacher, assistants[0] if assistants else None, student, result)
        main_does(lambda: write_student(job, record, teacher, student))
        exported: list[ExportResult] = []
        if recipe.export.onnx:
            with job.timed("export"):
                main_does(lambda: exported.append(write_graph(job, task, teacher, student)))
        # Only now: a run that is killed while it exports goes on with that.
        main_does(lambda: run.update({"status": "done", "seconds": job.seconds}))
        if not recipe.train.keep_checkpoints:
            main_does(run.drop_checkpoints)
    return replace(_with_gates(run, limits), exported=exported[0] if exported else None)


def _with_gates(run: runs.Run, limits: Limits) -> RunResult:
    """Return a finished run with its gates."""
    record = finished(run)
    gates = []
    if (score := record.result.student.score) is not None:
        result = record.result
        gates = limits.gates(result.primary, score, result.retention, error=is_error(result.primary))
    if record.export is not None:
        gates.extend(parity_gates(record.export.parity.max_abs_difference, record.export.parity.tolerance))
    return RunResult(run, record, gates)
