"""What a recipe would do, told without doing it (`kdcli distill --dry-run`)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.data.rows import array_of, values_of
from kdcli.distill.prepare import Prepared
from kdcli.distill.resolve import Resolved, context_of, placed, stages_of
from kdcli.distill.student import stage_loop
from kdcli.machine import resolve_precision
from kdcli.methods.base import Stage
from kdcli.models.counts import count_parameters
from kdcli.models.overparam import overparameterise, teacher_factors
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.tasks.base import Task
from kdcli.tasks.packing import pack

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Plan:
    """The resolved plan: models, counts, steps, matched matrices and memory."""

    document: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.document


def make_plan(prepared: Prepared) -> Plan:
    """Return the plan of a recipe that has been checked. Trains nothing, writes nothing."""
    resolved, task, start = prepared.resolved, prepared.task, prepared.teacher
    recipe, section, teacher = resolved.recipe, resolved.recipe.teacher, start.model
    nearest, way = teacher, []
    for name, student in resolved.sections.items():
        with placed(name):
            build = build_student(nearest, student, seed=recipe.seed, overparam=resolved.overparam_of(name))
            assert student.form is not None
            context = context_of(nearest, build.model, student.form, task, recipe)
            known = nearest if start.known else None
            way.append((build, stages_of(resolved, context, build.model, known, len(task.train))))
        followed, nearest = nearest, build.model
    parameters = count_parameters(build.model)
    chain = None
    if recipe.overparam is not None:
        report = overparameterise(build.model, recipe.overparam)
        matched: Any = {}
        skipped: Any = []
        if recipe.overparam.aux_weight > 0:
            matched, skipped = teacher_factors(followed, build.model, context.pairs, recipe.overparam)
        chain = {
            "matrices": len(report.rows),
            "tensors": recipe.overparam.length + 2 if recipe.overparam.factorization == "mpo" else 2,
            "parameters": count_parameters(build.model),
            "matched": len(matched),
            "unmatched": len(skipped),
        }
    packed = task.masking is not None
    examples = _blocks(task.train, prepared) if packed else len(task.train)
    if (augment := recipe.task.augment) is not None:
        # At most: a row of few words may not give so many different copies.
        examples *= 1 + augment.copies
    total = resolved.loop.steps(examples)
    rows = [[_stage_row(stage, resolved, total, examples) for stage in stages] for _, stages in way]
    assistant = None
    if resolved.assistant is not None:
        assistant = {
            "form": resolved.assistant.form,
            "parameters": count_parameters(way[0][0].model),
            "notes": way[0][0].notes,
            "stages": rows[0],
        }
    return Plan(
        {
            "name": resolved.name,
            "seed": recipe.seed,
            "task": {
                "name": task.name,
                "kind": task.kind.name,
                "fingerprint": task.description["fingerprint"],
                "sizes": (
                    {"train blocks": examples, "selection blocks": _blocks(task.selection, prepared)}
                    if packed
                    else {
                        "train" if augment is None else "train with copies": examples,
                        "selection": len(task.selection),
                        **{name: len(rows_) for name, rows_ in task.report.items()},
                    }
                ),
                "classes": classes_of(task),
                "notes": prepared.notes,
            },
            "method": {
                "name": resolved.method.name,
                "title": resolved.method.title,
                "options": resolved.options.model_dump(),
            },
            "teacher": {
                "origin": start.origin,
                "preparation": "fine-tuned first, or taken from the cache" if start.trains else "used as it is",
                "parameters": None if section.black_box else count_parameters(teacher),
            },
            "assistant": assistant,
            "student": {
                "form": resolved.student.form,
                "parameters": parameters,
                "notes": build.notes,
                "teacher_layers": build.teacher_layers,
            },
            "finetune": [
                {
                    "task": tuned.name,
                    "sizes": {"train": len(tuned.train), **{name: len(rows_) for name, rows_ in tuned.report.items()}},
                    "seeds": table.seeds,
                    "against": list(dict.fromkeys(table.against)),
                }
                for tuned, table in zip(prepared.downstream, recipe.finetune, strict=True)
            ],
            "overparam": chain,
            "pairs": [list(pair) for pair in context.pairs],
            "stages": rows[-1],
            "train": {
                "batch_size": resolved.loop.batch_size,
                "precision": resolve_precision(resolved.loop.precision, resolved.loop.device),
            },
            "memory_megabytes": estimate_memory(
                resolved, count_parameters(teacher), count_parameters(build.model), shape_of(teacher.config)
            ),
        }
    )


def classes_of(task: Task, most: int = 5) -> dict[str, Any] | None:
    """Return the number of a task's classes, and those with the fewest training rows; None where it has none."""
    if not task.label_names:
        return None
    import numpy as np

    counts = np.bincount(array_of(task.train, "label"), minlength=len(task.label_names))
    rarest = np.argsort(counts, kind="stable")[:most]
    return {
        "number": len(task.label_names),
        "rarest": {task.label_names[i]: int(counts[i]) for i in rarest},
    }


def _blocks(rows: "Dataset", prepared: Prepared) -> int:
    """Return how many blocks plain text makes."""
    return len(pack(values_of(rows, "text"), prepared.teacher.tokenizer, prepared.resolved.recipe.task.max_length))


def _stage_row(stage: Stage, resolved: Resolved, total: int, examples: int) -> dict[str, Any]:
    loop = stage_loop(resolved, stage, total, examples)
    return {
        "name": stage.name,
        "steps": loop.max_steps,
        "learning_rate": loop.learning_rate,
        "terms": {term.name: term.weight for term in stage.terms},
    }


def estimate_memory(resolved: Resolved, teacher: int, student: int, shape: Any) -> int:
    """Return the megabytes that training needs, roughly.

    Teacher weights once; student weights, gradients and two Adam moments, all fp32; and what the backward pass
    keeps of each block: about 10 vectors of the hidden and 3 of the feed-forward width a token.
    """
    tokens = resolved.loop.batch_size // resolved.loop.gradient_accumulation * resolved.recipe.task.max_length
    width = 10 * shape.hidden + 3 * shape.intermediate
    element = 2 if resolve_precision(resolved.loop.precision, resolved.loop.device) == "bf16" else 4
    activations = tokens * width * shape.layers * element
    return round((4 * teacher + 16 * student + activations) / 1e6)
