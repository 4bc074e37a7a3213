"""From a recipe to a run folder: the one road that `kdcli distill` takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import set_seed

from kdcli import interrupts, runs
from kdcli.distill.card import model_card
from kdcli.distill.downstream import score_on_tasks
from kdcli.distill.filler import augment_task, make_filler
from kdcli.distill.prepare import prepare
from kdcli.distill.record import FinishedRun, finished, finished_of
from kdcli.distill.resolve import Resolved
from kdcli.distill.student import Road
from kdcli.distill.teacher import Teacher, make_teacher
from kdcli.errors import ExitCode, InputError
from kdcli.evaluation.result import Loss, Result
from kdcli.evaluation.score import describe_model, evaluate_model
from kdcli.faults import writing
from kdcli.files import atomic_folder
from kdcli.gates import Gate, Limits, exit_code_of, limits_of, parity_gate
from kdcli.machine import versions
from kdcli.manifest import write_manifest
from kdcli.models.finite import at_fault
from kdcli.models.hashing import hash_of_weights
from kdcli.models.heads import head_of
from kdcli.models.save import round_to_stored, save_model
from kdcli.models.student import StudentBuild
from kdcli.recipe.load import portable
from kdcli.recipe.schema import Recipe
from kdcli.runs import timed
from kdcli.tasks.base import Task
from kdcli.tasks.metrics import chance_level
from kdcli.tasks.predict import predict
from kdcli.terminal import stderr, warn
from kdcli.training.distributed import agree, is_main, main_does
from kdcli.training.teacher_cache import cached_predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    console = console or stderr()
    if not is_main():
        console = stderr(quiet=True)
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    limits = limits_of(recipe, fail_under=fail_under, fail_under_retention=fail_under_retention)
    root, name = runs.place_of_run(recipe, recipe_path, output)
    document = recipe.model_dump(exclude_none=True)
    # Others would meet the folder that the main process has just made.
    before = agree(runs.find_run(root, name, document, force=force, resume=resume) if is_main() else None)
    assert before is not None
    if resume and (begun_before := before.record) is not None and begun_before.status == "done":
        main_does(partial(_check_finished, before, recipe, portable(recipe, name, recipe_path.resolve().parent)))
        console.print(f"{before.path} is finished already", highlight=False)
        return _finished(before, limits)
    prepared = prepare(recipe, recipe_path)
    resolved, task, head = prepared.resolved, prepared.task, prepared.head
    resolved.method.load_sources(resolved.options, task, resolved.base)
    opened = runs.open_run(root, name, force=force, resume=resume, create=is_main())
    with opened as run, _attempt(run, document, resume) as attempt:
        main_does(
            lambda: run.begin(
                recipe=document,
                portable=portable(recipe, resolved.name, resolved.base),
                source=recipe_path,
                overrides=overrides or [],
                seed=recipe.seed,
                versions={**versions(), "threads": str(torch.get_num_threads())},
            )
        )
        for note in prepared.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        set_seed(recipe.seed)
        with timed(seconds, "teacher"):
            teacher = make_teacher(
                prepared.teacher,
                recipe,
                task,
                head,
                console=console,
                refresh=refresh,
                resume=resume,
                work=run.checkpoints / "teacher",
                log=run.log / "teacher",
            )
            silent = task.kind.scored_by_loss or not teacher.known
            teacher_scores = {} if silent else _teacher_scores(teacher, task, resolved, console)
        if teacher_scores:
            _warn_of_chance(teacher_scores, task, console)
        if prepared.filler is not None:
            with timed(seconds, "augment"):
                source = make_filler(
                    prepared.filler,
                    console=console,
                    refresh=refresh,
                    resume=resume,
                    work=run.checkpoints / "augment",
                    log=run.log / "augment",
                )
                task = augment_task(task, recipe, source, console=console)
        road = Road(task, resolved, run, console, seconds, resume=resume)
        made, nearest = None, teacher
        if resolved.assistant is not None:
            made = road.distil(teacher, resolved.assistant, None, folder="assistant", title="assistant: ")
            nearest = replace(teacher, model=made.build.model, path=None)
            attempt.keep()
        student = road.distil(nearest, resolved.student, recipe.overparam)
        attempt.keep()
        build, training = student.build, student.training
        if task.kind.scored_by_loss and not student.speaks:
            # Nothing taught its head to speak: what is handed over is the body.
            build = replace(build, model=build.model.base_model)  # type: ignore[arg-type]
        round_to_stored(build.model)
        with timed(seconds, "evaluate"):
            if task.kind.scored_by_loss:
                result = Result(
                    "loss",
                    describe_model(teacher.model),
                    describe_model(build.model),
                    loss=held_out_loss(training),
                    finetune=score_on_tasks(
                        build.model,
                        teacher.model,
                        teacher.tokenizer,
                        recipe,
                        prepared.downstream,
                        run=run,
                        console=console,
                        resume=resume,
                    ),
                )
            else:
                scores = _scores(build.model, teacher.tokenizer, task, resolved)
                result = Result(
                    task.primary,
                    describe_model(teacher.model, task, teacher_scores) if teacher.known else None,
                    describe_model(build.model, task, scores),
                    {name: len(rows) for name, rows in task.report.items()},
                )
        seconds["total"] = round(time.perf_counter() - begun, 3)
        record = {
            "method": {
                "name": resolved.method.name,
                "title": resolved.method.title,
                "paper": resolved.method.paper,
                "options": resolved.options.model_dump(),
            },
            "task": {**task.description, "name": task.name, "kind": task.kind.name, "primary": task.primary},
            **result.to_json(),
            "teacher_origin": teacher.origin,
            "teacher_path": str(teacher.path) if teacher.path else None,
            "student_form": resolved.student.form,
            "student_head": head_of(build.model),
            "teacher_layers": build.teacher_layers,
            "assistant": made.to_json() if made is not None else None,
            "overparam": student.overparam,
            "contraction": student.contraction,
            "teacher_training": teacher.training or None,
            "training": training,
            "seconds": seconds,
            "hashes": {
                "teacher": hash_of_weights(teacher.model) if teacher.known else None,
                "student_before": student.hash_before,
                "student": hash_of_weights(build.model),
                "data": task.description["fingerprint"],
            },
        }
        main_does(lambda: _keep(run, record, build, teacher, console))
        exported: list[ExportResult] = []
        if recipe.export.onnx:
            with timed(seconds, "export"):
                main_does(lambda: exported.append(_export(run, build, teacher, task, resolved)))
        # Only now: a run that is killed while it exports goes on with that.
        main_does(lambda: run.update({"status": "done", "seconds": seconds}))
        if not recipe.train.keep_checkpoints:
            main_does(run.drop_checkpoints)
    return replace(_finished(run, limits), exported=exported[0] if exported else None)


def _check_finished(run: runs.Run, recipe: Recipe, document: dict[str, Any]) -> None:
    """Remove what a run was killed at when it was done. Raises InputError when its student was changed since.

    document: what its recipe.toml holds, and holds again after this.
    """
    run.tidy(document, keep_checkpoints=recipe.train.keep_checkpoints)
    for name in run.document.get("files", {}):
        if (problem := run.changed(run.path / name)) is not None:
            raise InputError(
                f"{run.path} is finished, but {run.path / name} is not what it wrote: {problem}",
                hint="--force makes it again",
            )


def _finished(run: runs.Run, limits: Limits) -> RunResult:
    """Return the run's result with its gates."""
    record = finished(run)
    gates = []
    if (score := record.result.student.score) is not None:
        gates = limits.gates(record.result.primary, score, record.result.retention)
    if record.export is not None:
        gates.append(parity_gate(record.export.parity.max_abs_difference, record.export.parity.tolerance))
    return RunResult(run, record, gates)


@dataclass
class _Attempt:
    """Whether a run holds something that took work: a trained assistant or student."""

    run: runs.Run
    worth_keeping: bool

    def keep(self) -> None:
        """From now on this run is worth more than none, and than the one that it replaces."""
        self.worth_keeping = True
        main_does(self.run.settle)


@contextmanager
def _attempt(run: runs.Run, document: dict[str, Any], resume: bool) -> Iterator[_Attempt]:
    """Leave of a run what is worth keeping, however it ends.

    When the input turns out to be wrong before a model was trained, nothing is left behind, and a run that was to be
    replaced is put back; after that everything stays, for `--resume`.
    """
    if resume:
        runs.check_same_recipe(run, document)
    attempt = _Attempt(run, resume)
    try:
        # What fails on a disk, and says not where, fails in the run's folder most likely.
        with writing(run.path):
            yield attempt
    except InputError:
        if is_main():
            run.mark("failed") if attempt.worth_keeping else run.discard()
        raise
    except BaseException as error:
        if is_main():
            stopped = isinstance(error, KeyboardInterrupt) or interrupts.received() is not None
            run.mark("interrupted" if stopped else "failed")
        raise


def _scores(
    model: "PreTrainedModel",
    tokenizer: Any,
    task: Task,
    resolved: Resolved,
    ask: Callable[..., Any] = predict,
    owner: str = "the student",
) -> dict[str, dict[str, float]]:
    return evaluate_model(
        model,
        tokenizer,
        task,
        batch_size=resolved.recipe.evaluate.batch_size,
        max_length=resolved.recipe.task.max_length,
        ask=ask,
        owner=owner,
        device=resolved.recipe.train.device,
    )


def _teacher_scores(teacher: Teacher, task: Task, resolved: Resolved, console: Console) -> dict[str, dict[str, float]]:
    # Many students have the same teacher: what it says of the report sets is kept like all that it says.
    ask = partial(cached_predictions, use_cache=resolved.recipe.teacher.cache, console=console)
    with at_fault("teacher.model"):
        return _scores(teacher.model, teacher.tokenizer, task, resolved, ask, "the teacher")


def _warn_of_chance(scores: dict[str, dict[str, float]], task: Task, console: Console) -> None:
    score = sum(values[task.primary] for values in scores.values()) / len(scores)
    chance = chance_level(task)
    if score <= chance + 0.02:
        warn(
            console,
            f"the teacher scores {task.primary} {score:.4f}, no better than chance "
            f"({chance:.4f}). A student cannot learn the task from it. Is the model fine-tuned on this task, "
            "and are its classes named in their order (id2label in its config.json)?",
        )


def held_out_loss(training: list[dict[str, Any]]) -> Loss:
    """Return the first and the last held-out loss of the last stage; None where it was not measured."""
    losses = [entry["eval_loss"] for entry in training[-1].get("history", []) if "eval_loss" in entry]
    return Loss(losses[0], losses[-1]) if losses else Loss(None, None)


def _keep(run: runs.Run, record: dict[str, Any], build: StudentBuild, teacher: Teacher, console: Console) -> None:
    if teacher.path is None and teacher.known:
        with atomic_folder(run.path / "teacher", ours=True) as folder:
            save_model(teacher.model, folder, teacher.tokenizer)
            write_manifest(folder, record["hashes"])
        record["teacher_path"] = str(run.path / "teacher")
    card = model_card(finished_of({**run.document, **record}, run))
    with atomic_folder(run.student, ours=True) as folder:
        save_model(build.model, folder, teacher.tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
    run.note_files(run.student)
    run.update(record)
    if (note := run.mark_latest()) is not None:
        console.print(note, highlight=False, soft_wrap=True)


def _export(run: runs.Run, build: StudentBuild, teacher: Teacher, task: Task, resolved: Resolved) -> "ExportResult":
    from kdcli.export.export import export_model

    section = resolved.recipe.export
    run.forget_files(run.onnx)
    result = export_model(
        build.model,
        teacher.tokenizer,
        run.onnx,
        task=task,
        max_length=resolved.recipe.task.max_length,
        opset=section.opset,
        batch_sizes=section.batch_sizes,
        sequence_lengths=section.sequence_lengths,
        threads=section.threads,
        runs=section.runs,
        teacher=teacher.model if teacher.known else None,
        ours=True,
    )
    run.update({"export": result.to_json()})
    run.note_files(run.onnx)
    return result
