"""What a run leaves in its folder: the student with its card, the teacher, the record, the exported graph."""

from typing import TYPE_CHECKING, Any

from kdcli.distill.card import model_card
from kdcli.distill.job import Job
from kdcli.distill.record import finished_of
from kdcli.distill.student import Distilled
from kdcli.distill.teacher import Teacher
from kdcli.distill.vocabulary import vocabulary_of
from kdcli.evaluation.result import Result
from kdcli.files import atomic_folder
from kdcli.manifest import write_manifest
from kdcli.models.hashing import hash_of_weights
from kdcli.models.heads import head_of
from kdcli.models.save import save_model
from kdcli.runs import CARD
from kdcli.tasks.base import Task
from kdcli.tasks.heads import heads

if TYPE_CHECKING:
    from kdcli.export.export import ExportResult


def document_of(
    job: Job, task: Task, teacher: Teacher, assistant: Distilled | None, student: Distilled, result: Result
) -> dict[str, Any]:
    """Return what run.json says of a trained and scored student; `record.FinishedRun` reads it."""
    method, options = job.resolved.method, job.resolved.options
    return {
        "method": {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "options": options.model_dump(),
        },
        "task": {**task.description, "name": task.name, "kind": task.kind.name, "primary": task.primary},
        **result.to_json(),
        "teacher_origin": teacher.origin,
        "teacher_path": str(teacher.path) if teacher.path else None,
        "teacher_settings": teacher.settings,
        "student_form": student.build.form,
        "student_head": head.name if (head := head_of(student.model, heads())) is not None else None,
        "teacher_layers": student.build.teacher_layers,
        "vocabulary": vocabulary_of(job, teacher, student),
        "assistant": assistant.to_json() if assistant is not None else None,
        "overparam": student.overparam,
        "contraction": student.contraction,
        "teacher_training": teacher.training or None,
        "training": student.training,
        "seconds": job.seconds,
        "hashes": {
            "teacher": hash_of_weights(teacher.model) if teacher.known else None,
            "student_before": student.hash_before,
            "student": hash_of_weights(student.model),
            "data": task.description["fingerprint"],
        },
    }


def write_student(job: Job, document: dict[str, Any], teacher: Teacher, student: Distilled) -> None:
    """Write the student with its card, the teacher where no other place keeps it, and the record."""
    run = job.run
    if teacher.path is None and teacher.known:
        with atomic_folder(run.path / "teacher", ours=True) as folder:
            save_model(teacher.model, folder, teacher.processor)
            write_manifest(folder, document["hashes"])
        document = {**document, "teacher_path": str(run.path / "teacher")}
    card = model_card(finished_of({**run.document, **document}, run))
    with atomic_folder(run.student, ours=True) as folder:
        save_model(student.model, folder, student.processor)
        (folder / CARD).write_text(card, encoding="utf-8")
    run.note_files(run.student)
    run.update(document)
    if (note := run.mark_latest()) is not None:
        job.tell(note)


def write_graph(job: Job, task: Task, teacher: Teacher, student: Distilled) -> "ExportResult":
    """Write the student as ONNX, and its parity and latency into the record."""
    from kdcli.export.export import export_model

    run, section = job.run, job.recipe.export
    run.forget_files(run.onnx)
    result = export_model(
        student.model,
        student.processor,
        run.onnx,
        task=task,
        max_length=job.recipe.task.max_length,
        opset=section.opset,
        builder=section.builder,
        precision=section.precision,
        batch_sizes=section.batch_sizes,
        sequence_lengths=section.sequence_lengths,
        image_sizes=section.image_sizes,
        threads=section.threads,
        runs=section.runs,
        teacher=teacher.model if teacher.known else None,
        ours=True,
    )
    run.update({"export": result.to_json()})
    run.note_files(run.onnx)
    return result
