"""Labels with names: read from a column, numbered, and matched with the outputs of a model by their names."""

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.data.columns import Column, Columns, is_missing, need_column, shape_of_value
from kdcli.errors import InputError
from kdcli.models.classes import class_names_of, equal_names, name_classes, reorder_classes
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

    from kdcli.tasks.base import Owner


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


def named_outputs(labels: Sequence[str]) -> dict[str, Any]:
    """Return what a configuration says of outputs with these names."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


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


def output_order(config: "PretrainedConfig", labels: Sequence[str], owner: "Owner") -> list[int]:
    """Return the model's output number for each of the labels.

    Names match as they are, else without case and punctuation; a model with the library's own names (LABEL_0, ...) is
    taken to have the order of the labels, and `owner.notes` says so. Raises InputError when the number or the names
    differ.
    """
    names = class_names_of(config)
    if len(names) != len(labels):
        alike = look_alikes(labels)
        raise InputError(
            f"{owner.name} has {counted(len(names), 'class', 'classes')} ({listed(names)}), the task has "
            f"{len(labels)} ({listed(labels)})",
            where=owner.model,
            hint=hint_of_look_alikes(alike[0]) if alike else owner.remedy,
        )
    order = matching_order(names, labels)
    if order is not None:
        if _takes_order(names, labels) and list(labels) != [str(i) for i in range(len(labels))]:
            owner.notes.append(
                f"{owner.name} does not name its classes: taken in the order {listed(labels)}; {owner.naming} says "
                "otherwise"
            )
        return order
    where = owner.labels or owner.model
    hint = f"name them in the model's order, with the task's words: {owner.example}"
    if twice := equal_names(names):
        raise InputError(f"{owner.name}: {twice}", where=where, hint=hint)
    if are_numbers_of(labels, names):
        hint = (
            "names for the integers, in their order: task.labels = [...]; or the task's integers for the model's "
            f"classes, in the model's order: {owner.example}"
        )
    raise InputError(
        f"the classes of {owner.name} ({listed(names)}) are not the task's labels ({listed(labels)})",
        where=where,
        hint=hint,
    )


PROBLEMS = {
    "regression": "a regression",
    "single_label_classification": "a single-label classifier",
    "multi_label_classification": "a multi-label classifier",
}
"""The library's values of `problem_type`, and what such a model is."""


def check_problem(config: "PretrainedConfig", wanted: str, owner: "Owner") -> None:
    """Raise InputError for a model whose outputs mean something else. wanted: the library's `problem_type`."""
    found = config.problem_type
    if found not in (None, wanted):
        raise InputError(
            f"{owner.name} is {PROBLEMS[found]}, and the task needs {PROBLEMS[wanted]}",
            where=owner.model,
            hint=f"{owner.remedy}; if its config.json is wrong about problem_type, correct it",
        )


def align_outputs(
    model: Any,
    labels: Sequence[str],
    owner: "Owner",
    names: Sequence[str] | None = None,
    *,
    settings: Sequence[str] = (),
) -> Any:
    """Return `model` with its logits in the order of the labels, and named like them: a PyTorch model in place.

    names: what a user says its outputs are. settings: of its configuration, where they hold a value for each output.
    Raises InputError when they are not the labels.
    """
    if names is not None:
        name_outputs(model.config, names, owner.labels or owner.model)
    order = output_order(model.config, labels, owner)
    from torch import Tensor, nn

    config = model.config
    for name in settings:
        if (values := getattr(config, name, None)) is not None:
            setattr(config, name, [values[place] for place in order])
    if isinstance(model, nn.Module):
        reorder_classes(model, order)  # type: ignore[arg-type]
        name_classes(config, labels, "task.labels")
        return model
    if order == list(range(len(order))):
        return model

    def permuted(**inputs: Tensor) -> Any:
        found = model(**inputs)
        found.logits = found.logits[..., order]
        return found

    permuted.config = config  # type: ignore[attr-defined]
    return permuted


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


# Labels of rows


def label_column(columns: Columns, name: str | None, source: str) -> Column:
    """Return the column of labels. Raises InputError for a row without one, and for what is no text or number."""
    values = need_column(columns, name or "label", "label", source)
    holes = [row for row, value in enumerate(values, 1) if is_missing(value)]
    if holes:
        raise InputError(
            f"{source}: {counted(len(holes), 'row')} without a label, the first is row {holes[0]}",
            where="task.label",
            hint="remove or label them",
        )
    for row, value in enumerate(values, 1):
        if isinstance(value, list | dict | bytes):
            raise InputError(
                f"{source}: the label of row {row} is {shape_of_value(value)}, not one text or number",
                where="task.label",
            )
    return values


def readable(text: str, row: int, source: str, where: str) -> str:
    """Return `text`. Raises InputError for half of a character, such as an emoji that was cut."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: row {row} has half of a character at place {error.start + 1}, which is no Unicode text",
            where=where,
            hint="was the text cut between two bytes? Write it again, or remove the row",
        ) from error
    return text


def named_labels(values: Iterable[tuple[int, Any]], known: Sequence[str], source: str, notes: list[str]) -> list[str]:
    """Return the name of each label. values: of rows, with their numbers. known: the labels that a recipe names.

    What was cleaned goes into `notes`.
    """
    # By type, too: True and 1 are equal.
    names: dict[tuple[type, Any], str] = {}
    cleaned: Counter[str] = Counter()
    found = []
    for row, value in values:
        key = (type(value), value)
        if key not in names:
            names[key] = _label_name(readable(value, row, source, "task.label") if type(value) is str else value, known)
        if type(value) is str and value != clean_name(value):
            cleaned[value] += 1
        found.append(names[key])
    if cleaned:
        name = cleaned.most_common(1)[0][0]
        spaced = name != name.strip()
        what = "white space around them" if spaced else "another Unicode form than NFC"
        notes.append(
            f"{source}: {cleaned.total():,} labels have {what}: {repr(name) if spaced else ascii(name)} is read as "
            f"{clean_name(name)!r}"
        )
    return found


def counted_labels(labels: list[str], known: Sequence[str]) -> list[str] | None:
    """Return the labels that integers from 0 count among those that a recipe names; None for other labels."""
    return [known[int(label)] for label in labels] if known and are_numbers_of(set(labels), known) else None


def _label_name(value: Any, known: Sequence[str]) -> str:
    """Return a label's name, the same whatever kind of file it comes from.

    Whole numbers have no decimals (1.0 is "1"), and truth values are "true" and "false", unless the recipe names them.
    """
    name = clean_name(value)
    if name in known:
        return name
    if (lower := name.lower()) in ("true", "false"):
        return next((other for other in known if other.lower() == lower), lower)
    return name.split(".")[0] if re.fullmatch(r"-?\d+\.0+", name, re.ASCII) else name


def known_labels(given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the labels that a recipe names, in its order; none where it leaves them to the data."""
    return tuple(map(clean_name, given or ()))


def all_labels(labels: Iterable[str], known: tuple[str, ...], source: str, notes: list[str]) -> tuple[str, ...]:
    """Return the labels of a task in order: as the recipe names them (`known`), else sorted (numbers as numbers).

    notes: takes a warning about names that look like one label. Raises InputError when there is only one, and for one
    that is given twice.
    """
    present = set(labels)
    if len(set(known)) < len(known):
        raise InputError("a class is listed twice", where="task.labels")
    if len(present) < 2:
        raise InputError(
            f"{source} has one class only ({next(iter(present))!r}): there is nothing to learn",
            where="task.label",
        )
    if known:
        return known
    for group in look_alikes(sorted(present))[:5]:
        notes.append(
            f"{source}: the classes {' and '.join(map(repr, group))} differ in case or spacing only; are they one? "
            "Make them equal, or list both in task.labels"
        )
    return in_order(present)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of labels sorted, numbers as numbers."""
    numeric = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numeric else 0, name)))


def to_ids(
    labels: Sequence[str],
    names: Sequence[str],
    source: str,
    *,
    where: str = "task.label",
    owner: str = "the training data does not have",
    place: Mapping[str, int] | None = None,
    rows: Sequence[int] | None = None,
) -> "np.ndarray":
    """Return the number of each label, int64. place: of each label, where it is not that among `names`.

    Raises InputError for a label without one; owner: ends the sentence about it. rows: the number of each label's row,
    where rows do not have one each.
    """
    import numpy as np

    place = place if place is not None else {name: i for i, name in enumerate(names)}
    # Integers that would count names where all labels did are not what is wrong.
    unknown = sorted(set(labels) - place.keys(), key=lambda label: (are_numbers_of([label], names), label))
    if unknown:
        first = labels.index(unknown[0])
        row = rows[first] if rows is not None else first + 1
        raise InputError(
            f"{source}: row {row} has the label {unknown[0]!r}, which {owner} ({listed(names, unknown[0])})",
            where=where,
            hint=f"did you mean {near!r}?" if (near := nearest(unknown[0], names)) is not None else None,
        )
    return np.fromiter((place[label] for label in labels), np.int64, len(labels))


def places_in_model(
    labels: set[str], names: tuple[str, ...], source: str
) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """Return a model's classes, and the number of the one that each label means. Names decide.

    names: the model's. Where it has none, integers count its classes, and as many names as it has classes are theirs
    in sorted order, as for a teacher. None in place of the numbers stands for names as they are.
    Raises InputError for integers where the model's classes have names, and for other names where they have none.
    """
    found = places_of(labels, names)
    if found is not None:
        return names, found
    if twice := equal_names(names):
        raise InputError(
            f"the model's {twice}",
            where="task.labels",
            hint="name them in the model's order, with the file's words: --labels NAME,NAME,...",
        )
    integers = are_numbers_of(labels, names)
    if not is_unnamed(names):
        if integers:
            numbers = sorted(map(int, labels))
            example = f"{','.join(names)} if 0 is {names[0]!r}" if len(names) <= 5 else "NAME,NAME,..."
            raise InputError(
                f"{source} has integer labels ({listed(numbers)}), but the model's classes have names "
                f"({listed(names)})",
                where="task.labels",
                hint=f"give the model's names in the order of the file's integers, from 0 on: --labels {example}",
            )
        return names, None
    if integers:
        return names, {label: int(label) for label in labels}
    if len(labels) != len(names):
        raise InputError(
            f"{source} has {counted(len(labels), 'class', 'classes')} ({listed(sorted(labels))}), and the model, "
            f"which does not name its own, has {len(names)}",
            where="task.labels",
            hint="name them in the model's order, with the file's words: --labels NAME,NAME,...",
        )
    return in_order(labels), None


def labels_of_model(
    labels: list[str],
    known: tuple[str, ...],
    config: "PretrainedConfig",
    source: str,
    names: Sequence[str] | None,
    *,
    rows: Sequence[int] | None = None,
) -> "tuple[np.ndarray, tuple[str, ...]]":
    """Return the number of each label among a model's own, and those, for rows that a model is scored on.

    known: names for integers among the labels. names: what a user calls the model's outputs; where they are not its
    own names, they are given to it, in its order. rows: as in `to_ids`.
    """
    named = counted_labels(labels, names or known)
    if names is not None and (named is None or named_order(class_names_of(config), names) is None):
        name_outputs(config, names, "--labels")
    labels = named or labels
    classes, place = places_in_model(set(labels), tuple(class_names_of(config)), source)
    return to_ids(labels, classes, source, owner="the model does not have", place=place, rows=rows), classes
