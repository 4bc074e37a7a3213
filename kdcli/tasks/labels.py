"""Matching the classes of a model with the labels of a task, by their names."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdcli.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from kdcli.tasks.base import Task


def _normal(name: object) -> str:
    """Return a name without case and punctuation, in any script; the sign of a number stays."""
    text = str(name).casefold()
    return text if re.fullmatch(r"[+-]?\d+", text) else re.sub(r"[\W_]+", "_", text).strip("_") or text


def class_names_of(config: "PretrainedConfig") -> list[str]:
    """Return a model's class names in the order of its logits."""
    names = config.id2label or {}
    return [str(names[i]) for i in sorted(names)]  # type: ignore[index, type-var]


def label_permutation(config: "PretrainedConfig", task: "Task") -> list[int] | None:
    """Return the model's class number for each of the task's labels, or None for regression.

    Names match as they are, else without case and punctuation; a model with the library's own names
    (LABEL_0, ...) is taken to have the task's order. Raises InputError when the number or the names differ.
    """
    if task.kind == "regression":
        if config.num_labels != 1:
            raise InputError(
                f"task {task.name} is a regression, but the model has {config.num_labels} outputs",
                where="teacher.model",
            )
        return None
    names = class_names_of(config)
    if len(names) != len(task.label_names):
        raise InputError(
            f"the model has {len(names)} classes ({', '.join(map(str, names))}), task {task.name} has "
            f"{len(task.label_names)} ({', '.join(task.label_names)})",
            where="teacher.model",
            hint="fine-tune it on this task: [teacher.finetune]",
        )
    found: list[int | None] = []
    for form in (str, _normal):
        place = {form(name): i for i, name in enumerate(names)}
        found = [place.get(form(label)) for label in task.label_names]
        if set(found) == set(range(len(names))):
            break
    else:
        if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            return list(range(len(names)))
        raise InputError(
            f"the model's classes ({', '.join(map(str, names))}) are not the task's labels "
            f"({', '.join(task.label_names)})",
            where="teacher.labels",
            hint="name them in the model's order: teacher.labels = [...], with the task's words",
        )
    return [i for i in found if i is not None]


def class_of(answer: object, names: Sequence[str]) -> int | None:
    """Return the class that an answer names, or None when it names none.

    An answer is a class's name, whatever its case and punctuation, or the number of a class from 0; a name comes
    before a number, where the names are numbers themselves.
    """
    value = answer.item() if hasattr(answer, "item") else answer
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text in names:
        return list(names).index(text)
    normal = [_normal(name) for name in names]
    number = re.fullmatch(r"[-+\d.,]+", text) is not None
    if not number and all(normal) and len(set(normal)) == len(normal) and _normal(text) in normal:
        return normal.index(_normal(text))
    return int(text) if text.isdecimal() and int(text) < len(names) else None
