"""`[student.vocabulary]`: what follows the teacher has only the pieces that text uses, and a tokenizer of them.

The teacher is trained and scored as it is. Then its embeddings and its tokenizer are trimmed, once, and all that
follows is made from that teacher and taught by it: teacher and students read the same ids, as in any other run, an
`embedding_rank` is that of the small table, and a masked language model predicts the pieces that stay. A student of
all pieces that is trimmed at its end would be the same but for these, and would train rows that no text uses.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdcli.data.texts import check_columns, read_texts
from kdcli.distill.resolve import Resolved
from kdcli.distill.teacher import Teacher, TeacherStart
from kdcli.models.load import load_config
from kdcli.models.tokenizer_trim import Pieces, changes_of
from kdcli.models.vocabulary import (
    Trimming,
    check_has_vocabulary,
    check_outputs,
    needed_ids,
    trim_vocabulary,
    trimmed,
    vocabulary_megabytes,
)
from kdcli.tasks.base import Task

if TYPE_CHECKING:
    from kdcli.distill.job import Job
    from kdcli.distill.student import Distilled


def plan_vocabulary(resolved: Resolved, task: Task, downstream: list[Task], teacher: TeacherStart) -> Trimming | None:
    """Return which pieces of the teacher's vocabulary what follows it has; None where a recipe does not ask.

    Raises InputError where a text cannot be read, or no piece would stay.
    """
    section = resolved.student.vocabulary
    if section is None:
        return None
    check_has_vocabulary(teacher.model.config, "the teacher", where="student.vocabulary", hint="leave it out")
    notes: list[str] = []
    training = [text for one in (task, *downstream) for text in texts_of(one, teacher.processor)]
    if section.text is None:
        texts, apart, which = (
            training,
            list(task.kind.texts_read(task.selection, teacher.processor)),
            "the task's selection rows",
        )
    else:
        options: dict[str, Any] = {"columns": section.columns or (), "notes": notes}
        where = "student.vocabulary.text"
        if section.columns is not None:
            check_columns(section.text, resolved.base, "student.vocabulary.columns")
        texts = [one for source in section.text for one in read_texts(source, resolved.base, where, **options)]
        apart, which = training, "the task's training text"
    # A student from a checkpoint may have other special ids than the teacher.
    models = {each.model for each in resolved.sections.values() if each.model is not None}
    return trim_vocabulary(
        teacher.processor,
        teacher.model.config,
        texts,
        keep=section.keep,
        min_count=section.min_count,
        characters=section.characters,
        held_out=apart,
        held_out_text=which,
        needed={number for name in sorted(models) for number in needed_ids(load_config(name))},
        told=notes,
        place=lambda field: f"student.vocabulary.{field}",
    )


def texts_of(task: Task, processor: Any) -> list[str]:
    """Return the text that models are trained on, as a tokenizer gets it, with that of rows set aside of it."""
    parts = [task.train, *([task.calibration] if task.calibration is not None else [])]
    return [text for rows in parts for text in task.kind.texts_read(rows, processor)]


def with_vocabulary(job: "Job", task: Task, teacher: Teacher) -> Teacher:
    """Return the teacher with the vocabulary of what follows it, once it gives the same outputs for the same texts.

    task: with the copies of its rows. Raises RunError where an output differs.
    """
    trimming = job.prepared.trimming
    if trimming is None:
        return teacher
    small = trimmed(teacher.model, trimming.kept)
    difference = check_outputs(
        teacher.model,
        small,
        (teacher.processor, trimming.tokenizer),
        (*trimming.sample, *trimming.parts),
        trimming.kept,
        job.prepared.head.outputs,
    )
    job.tell(f"vocabulary: {trimming.compared(difference, 'the teacher')}")
    if job.prepared.filler is not None:
        found = changes_of(
            texts_of(task, teacher.processor), Pieces(teacher.processor), trimming.tokenizer, trimming.kept
        )
        job.tell(f"vocabulary: of the training text with its copies, {found.in_words}")
    base = trimmed(teacher.base, trimming.kept) if teacher.base is not None else None
    return replace(teacher, model=small, processor=trimming.tokenizer, base=base)


def vocabulary_of(job: "Job", teacher: Teacher, student: "Distilled") -> dict[str, Any] | None:
    """Return what run.json says of a trimmed vocabulary; None where it was not. teacher: with its own."""
    trimming = job.prepared.trimming
    if trimming is None:
        return None
    sizes = [vocabulary_megabytes(one) for one in (teacher.model, student.model)]
    return {**trimming.to_json(), "megabytes": sizes}
