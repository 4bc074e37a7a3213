"""The scores of a run: its teacher's before anything is distilled, and its student's beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kdcli.distill.downstream import score_on_tasks
from kdcli.distill.job import Job
from kdcli.distill.student import Distilled
from kdcli.distill.teacher import Teacher
from kdcli.evaluation.result import Loss, Metrics, Result
from kdcli.evaluation.score import calibrate, describe_model, evaluate_model, primary_score
from kdcli.models.finite import at_fault
from kdcli.tasks.base import Task
from kdcli.tasks.by_class import ByClass
from kdcli.tasks.predict import predict
from kdcli.terminal import warn
from kdcli.training.generated import generate_together
from kdcli.training.teacher_cache import cached_predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scores:
    """What a model scores on each report set, and on each class of it."""

    metrics: Metrics = field(default_factory=dict)
    by_class: ByClass = field(default_factory=dict)


def score_teacher(job: Job, task: Task, teacher: Teacher) -> Scores:
    """Return the teacher's scores; none on plain text, nor of a black box. Warns of one that has learnt nothing."""
    if task.scored_by_loss or not teacher.known:
        return Scores()
    # Many students have the same teacher: what it predicts for the report sets is cached like all its predictions.
    use_cache = bool(job.recipe.teacher.cache)
    kept = partial(cached_predictions, use_cache=use_cache, console=job.console)
    ask = kept if task.kind.outputs_are_kept else predict
    with at_fault("teacher.model"):
        scores = _scores(job, teacher.model, teacher.processor, task, ask, "the teacher", use_cache=use_cache)
    score = primary_score(scores.metrics, task.primary)
    doubt = task.kind.doubt(score, list(task.report.values()), task.label_names, task.primary)
    if doubt is not None:
        warn(job.console, f"the teacher scores {task.primary} {score:.4f}, {doubt}")
    return scores


def score_student(job: Job, task: Task, teacher: Teacher, scores: Scores, student: Distilled) -> Result:
    """Return the result of a run: the student beside its teacher. scores: the teacher's.

    On plain text the student has a held-out loss, and the scores of what is fine-tuned from it.
    """
    if task.scored_by_loss:
        return Result(
            "loss",
            describe_model(teacher.model),
            describe_model(student.model),
            loss=held_out_loss(student.training, task.parts),
            finetune=score_on_tasks(job, student, teacher),
        )
    calibrate(
        student.model,
        student.processor,
        task,
        max_length=job.recipe.task.max_length,
        batch_size=job.recipe.evaluate.batch_size,
        owner="the student",
        device=job.recipe.train.device,
    )
    own = _scores(job, student.model, student.processor, task)
    return Result(
        task.primary,
        describe_model(teacher.model, task, scores.metrics, scores.by_class) if teacher.known else None,
        describe_model(student.model, task, own.metrics, own.by_class),
        task.scored,
        fewer=task.fewer(student.processor, job.recipe.task.max_length),
    )


def _scores(
    job: Job,
    model: "PreTrainedModel",
    processor: Any,
    task: Task,
    ask: Callable[..., Any] = predict,
    owner: str = "the student",
    *,
    use_cache: bool = False,
) -> Scores:
    by_class: ByClass = {}
    metrics = evaluate_model(
        model,
        processor,
        task,
        batch_size=job.recipe.evaluate.batch_size,
        max_length=job.recipe.task.max_length,
        ask=ask,
        owner=owner,
        device=job.recipe.train.device,
        generate=partial(generate_together, use_cache=use_cache),
        console=job.console,
        by_class=by_class,
    )
    return Scores(metrics, by_class)


def held_out_loss(training: list[dict[str, Any]], parts: Sequence[str] = ()) -> Loss:
    """Return the first and the last held-out loss of the last stage; None where it was not measured."""
    entries = [entry for entry in training[-1].get("history", []) if "eval_loss" in entry]
    if not entries:
        return Loss(None, None)
    first, last = entries[0], entries[-1]
    each = {name: (first[f"eval_{name}_loss"], last[f"eval_{name}_loss"]) for name in parts}
    return Loss(first["eval_loss"], last["eval_loss"], each)
