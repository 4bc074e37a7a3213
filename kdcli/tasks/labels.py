"""Matching the classes of a model with the labels of a task, by their names."""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from kdcli.errors import InputError
from kdcli.models.classes import class_names_of
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from kdcli.tasks.base import Task


def clean_name(name: object) -> str:
    """Return a class's name without white space around it, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", str(name)).strip()


def _normal(name: object) -> str:
    """Return a name without case and punctuation, in any script; the sign of a number stays."""
    text = clean_name(name).casefold()
    return text if re.fullmatch(r"[+-]?\d+", text) else re.sub(r"[\W_]+", "_", text).strip("_") or text


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that differ in case, spacing, joining characters or Unicode's look-alikes only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        text = unicodedata.normalize("NFKC", name).casefold()
        number = re.fullmatch(r"[-+\d.,\s]+", text) is not None
        form = text if number else re.sub(r"[\s_\u2010-\u2015\u200b-\u200f\u00ad-]+", "", text)
        groups.setdefault(form, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def listed(names: Sequence[object], wanted: object = None) -> str:
    """Return names for a message: all of a few; of many the five nearest to `wanted`, or the first five."""
    texts = [str(name) for name in names]
    if len(texts) <= 12:
        return ", ".join(texts)
    if wanted is None:
        return f"{', '.join(texts[:5])} and {len(texts) - 5:,} more"
    forms: dict[str, str] = {}
    for text in texts:
        forms.setdefault(text.casefold(), text)
    near = difflib.get_close_matches(str(wanted).casefold(), forms, n=5, cutoff=0.0)
    return f"{len(texts):,} classes; the nearest are {', '.join(forms[form] for form in near)}"


def is_unnamed(names: Sequence[str]) -> bool:
    """True for the library's own names of classes (LABEL_0, ...), which say nothing but their order."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def are_numbers_of(labels: Iterable[str], names: Collection[str]) -> bool:
    """True when all labels are whole numbers from 0 that count `names`, and none of them is such a name itself."""
    return all(
        re.fullmatch(r"0|[1-9]\d*", label, re.ASCII) and int(label) < len(names) and label not in names
        for label in labels
    )


def places_of(labels: Collection[str], names: Sequence[str]) -> dict[str, int] | None:
    """Return the number of the class that each label names, or None when some label names none.

    Names match as they are, else without case and punctuation where that leaves them different.
    """
    for form in (clean_name, _normal):
        place = {form(name): i for i, name in enumerate(names)}
        found = {label: place[form(label)] for label in labels if form(label) in place}
        if len(found) == len(labels) and len(place) == len(names):
            return found
    return None


def matching_order(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the place in a model's class `names` of each of the `wanted` ones; None where they are not the same.

    A model with the library's own names is taken to have the wanted order.
    """
    if len(names) != len(wanted):
        return None
    found = places_of(wanted, names)
    if found is not None and len(set(found.values())) == len(names):
        return [found[label] for label in wanted]
    return list(range(len(names))) if is_unnamed(names) else None


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
            f"the model has {counted(len(names), 'class', 'classes')} ({listed(names)}), task {task.name} has "
            f"{len(task.label_names)} ({listed(task.label_names)})",
            where="teacher.model",
            hint="fine-tune it on this task: [teacher.finetune]",
        )
    order = matching_order(names, task.label_names)
    if order is not None:
        return order
    hint = "name them in the model's order: teacher.labels = [...], with the task's words"
    if are_numbers_of(task.label_names, names):
        hint = (
            "names for the integers, in their order: task.labels = [...]; or the task's integers for the model's "
            "classes, in the model's order: teacher.labels = [...]"
        )
    raise InputError(
        f"the model's classes ({listed(names)}) are not the task's labels ({listed(task.label_names)})",
        where="teacher.labels",
        hint=hint,
    )


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
