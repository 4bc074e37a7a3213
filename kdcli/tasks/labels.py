"""Matching the classes of a model with the labels of a task, by their names."""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from kdcli.errors import InputError
from kdcli.models.classes import class_names_of, equal_names, name_classes
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


def hint_of_look_alikes(group: Sequence[str]) -> str:
    """Return the question about names that look like one class."""
    return f"{' and '.join(map(repr, group))} differ in case or spacing only: if they are one class, make them equal"


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


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` that another may have meant: a look-alike, or one of nearly the same letters."""
    for group in look_alikes([name, *names]):
        if name in group:
            return next(other for other in group if other != name)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    return near[0] if near and not re.search(r"\d", name) else None


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
    order = named_order(names, wanted)
    return list(range(len(names))) if order is None and _takes_order(names, wanted) else order


def named_order(names: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Return the place in `names` of each of the `wanted` ones; None where they are not the same names."""
    found = places_of(wanted, names) if len(names) == len(wanted) else None
    if found is None or len(set(found.values())) != len(names):
        return None
    return [found[label] for label in wanted]


def _takes_order(names: Sequence[str], wanted: Sequence[str]) -> bool:
    return len(names) == len(wanted) and is_unnamed(names) and named_order(names, wanted) is None


def note_of_order(config: "PretrainedConfig", wanted: Sequence[str], owner: object, remedy: str) -> str | None:
    """Return the note about a trained model whose classes have no names, and so get the `wanted` ones in their order.

    None for a model that names them, and where the wanted ones are the numbers of the classes. owner: the model.
    remedy: what says otherwise, such as "teacher.labels says otherwise".
    """
    if not _takes_order(class_names_of(config), wanted) or list(wanted) == [str(i) for i in range(len(wanted))]:
        return None
    return f"{owner} does not name its classes: taken in the order {listed(wanted)}; {remedy}"


def name_outputs(config: "PretrainedConfig", names: Sequence[str], where: str) -> None:
    """Give a model's classes the names that a user says they have, in the model's order, in place.

    where: the field or option that has them. Raises InputError when there are not as many, and for the model's own
    names in another order.
    """
    own = class_names_of(config)
    order = named_order(own, names)
    if order is not None and order != list(range(len(own))):
        raise InputError(
            f"the model names its classes already: {listed(own)}; {listed(names)} are the same names in another order",
            where=where,
            hint="leave it out: classes match by their names; if the model's own are wrong, correct id2label in its "
            "config.json",
        )
    name_classes(config, names, where)


def label_permutation(config: "PretrainedConfig", task: "Task") -> list[int] | None:
    """Return the model's class number for each of the task's labels, or None for regression.

    Names match as they are, else without case and punctuation; a model with the library's own names
    (LABEL_0, ...) is taken to have the task's order. Raises InputError when the number or the names differ.
    """
    if task.kind.distribution.is_point:
        if config.num_labels != 1:
            raise InputError(
                f"task {task.name} is a regression, but the model has {config.num_labels} outputs",
                where="teacher.model",
            )
        return None
    names = class_names_of(config)
    alike = look_alikes(task.label_names)
    if len(names) != len(task.label_names):
        raise InputError(
            f"the model has {counted(len(names), 'class', 'classes')} ({listed(names)}), task {task.name} has "
            f"{len(task.label_names)} ({listed(task.label_names)})",
            where="teacher.model",
            hint=hint_of_look_alikes(alike[0]) if alike else "fine-tune it on this task: [teacher.finetune]",
        )
    order = matching_order(names, task.label_names)
    if order is not None:
        return order
    hint = "name them in the model's order: teacher.labels = [...], with the task's words"
    if twice := equal_names(names):
        raise InputError(f"the model's {twice}", where="teacher.labels", hint=hint)
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
