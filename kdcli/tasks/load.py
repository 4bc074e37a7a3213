"""From `[task]` to a `Task`."""

import difflib
import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdcli.data import documents as plain_text
from kdcli.data import reviews
from kdcli.data.files import Column, Columns, chunked, read_file, read_hub
from kdcli.data.glue import GLUE, HUB, GlueTask
from kdcli.data.rows import TEXT, chunks_of, stored, stored_table
from kdcli.errors import InputError
from kdcli.files import expanded
from kdcli.models.classes import equal_names
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks import custom, registry
from kdcli.tasks.base import Masking, Task
from kdcli.tasks.labels import (
    are_numbers_of,
    class_names_of,
    is_unnamed,
    listed,
    name_outputs,
    named_order,
    places_of,
)
from kdcli.tasks.metrics import ERRORS, known
from kdcli.words import counted

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = "reviews"

FEW = 10
"""Rows below which a score is remarked on."""


def load_task(section: TaskSection, evaluate: EvaluateSection, *, base: Path, limit: int | None = None) -> Task:
    """Return the task that a recipe's `[task]` names.

    base: the folder that relative paths start from. Under the protocol "half-dev" the first half of the
    validation set chooses checkpoints and the second half is reported. limit: rows of every set that
    is reported, drawn at random; None reports them whole.
    Raises InputError when the data is missing, empty or does not fit.
    """
    if section.type == "text":
        return _text(section, base)
    if section.is_custom:
        return _custom(section, evaluate, base, limit)
    if section.name in GLUE:
        return _glue(section, evaluate, GLUE[section.name], limit)
    if section.name == BUILT_IN:
        return _built_in(section, evaluate, limit)
    names = [*GLUE, BUILT_IN]
    near = difflib.get_close_matches(section.name, names, n=1)
    raise InputError(
        f"unknown task {section.name!r}; known are {', '.join(names)}",
        where="task.name",
        hint=f"did you mean {near[0]!r}?" if near else "own data: task.data, task.train or task.hub",
    )


def _table(texts: Mapping[str, Any], labels: Any = None) -> pa.Table:
    """Return rows: text, [text_pair] and, of labelled ones, label."""
    columns = {
        name: values if isinstance(values, pa.ChunkedArray) else _text_array(values) for name, values in texts.items()
    }
    if labels is not None:
        columns["label"] = pa.array(labels)
    return pa.table(columns)


def _text_array(values: Iterable[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(chunk, TEXT) for chunk in chunked(values)], TEXT)


def _dataset(rows: pa.Table) -> "Dataset":
    return stored(rows.add_column(0, "index", pa.array(np.arange(len(rows)))).to_batches())


def _subset(rows: pa.Table, size: int | None, seed: int) -> pa.Table:
    """Return a fixed random subset in the data's own order; the same for every run with this split_seed."""
    if size is None or size >= len(rows):
        return rows
    return rows.take(sorted(random.Random(f"subset-{seed}").sample(range(len(rows)), size)))


def _halves(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    middle = len(rows) // 2
    if middle == 0:
        raise InputError("the validation set is too small to be halved", where="evaluate.protocol")
    return rows.slice(0, middle), rows.slice(middle)


def fingerprint_of(splits: Mapping[str, "pa.Table | Dataset | Mapping[str, Sequence[Any]]"]) -> str:
    """Return 16 hex digits over every split's rows: the same data, the same digits, on any machine."""
    digest = hashlib.sha256()
    for name, rows in sorted(splits.items()):
        digest.update(name.encode())
        for column in sorted(rows.column_names if hasattr(rows, "column_names") else rows):
            digest.update(column.encode())
            for chunk in _chunks(rows, column):
                digest.update("".join(map(repr, chunk)).encode())
    return digest.hexdigest()[:16]


def _chunks(rows: Any, column: str) -> Iterable[list[Any]]:
    if isinstance(rows, pa.Table):
        return Column(rows.column(column).chunks).chunks()
    return chunks_of(rows, column) if hasattr(rows, "column_names") else chunked(rows[column])


def _task(
    section: TaskSection,
    evaluate: EvaluateSection,
    *,
    kind: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    train: pa.Table,
    validation: dict[str, pa.Table],
    source: str,
    test: pa.Table | None = None,
    limit: int | None = None,
    notes: Sequence[str] = (),
    trains: bool = True,
) -> Task:
    if section.metrics is not None:
        fitting = known(kind)
        wrong = [name for name in section.metrics if name not in fitting]
        if wrong or not section.metrics or section.metrics[0] in ERRORS:
            said = f"metrics names none of a {kind} task"
            if section.metrics:
                bad = wrong[0] if wrong else section.metrics[0]
                said = f"{bad!r} cannot be the {'first ' if not wrong else ''}metric of a {kind} task"
            raise InputError(
                f"{said}; known are {', '.join(name for name in fitting if name not in ERRORS)}", where="task.metrics"
            )
        metrics = tuple(section.metrics)
    train = _subset(train, section.train_samples, section.split_seed)
    validation = {
        name: _subset(rows, section.validation_samples, section.split_seed) for name, rows in validation.items()
    }
    first = next(iter(validation.values()))
    report = validation
    selection = first
    if evaluate.protocol == "half-dev":
        if test is not None:
            raise InputError(
                "half of the validation set would be reported, and the test set never be looked at",
                where="evaluate.protocol",
                hint='leave out task.test, or use protocol = "dev", which reports the test set where there is one',
            )
        selection = _halves(first)[0]
        report = {name: _halves(rows)[1] for name, rows in validation.items()}
    elif test is not None:
        report = {"test": _subset(test, section.test_samples, section.split_seed)}
    if section.test_samples is not None and test is None:
        raise InputError(
            "there is no test set that it could be a part of",
            where="task.test_samples",
            hint="task.validation_samples cuts the validation set",
        )
    sets = {next(iter(validation)): selection, **report}
    few = {name: rows.num_rows for name, rows in sets.items() if rows.num_rows < FEW}
    remarks = [
        f"the {name} set has {counted(count, 'row')} only: a score on it says little" for name, count in few.items()
    ]
    if trains and labels and (unseen := set(range(len(labels))) - set(train.column("label").unique().to_pylist())):
        absent = [labels[number] for number in sorted(unseen)]
        remarks.append(f"no training rows of {counted(len(absent), 'class', 'classes')}: {listed(absent)}")
    report = {name: _subset(rows, limit, section.split_seed) for name, rows in report.items()}
    splits = {"train": train, "selection": selection, **{f"report-{k}": v for k, v in report.items()}}
    return Task(
        name=section.name,
        kind=registry.get(kind),
        label_names=labels,
        metrics=metrics,
        primary=metrics[0],
        is_pair="text_pair" in train.column_names,
        train=_dataset(train),
        selection=_dataset(selection),
        report={name: _dataset(rows) for name, rows in report.items()},
        description={
            "source": source,
            "protocol": evaluate.protocol,
            "labels": list(labels),
            "sizes": {name: len(rows) for name, rows in splits.items()},
            "max_length": section.max_length,
            "fingerprint": fingerprint_of({**splits, "labels": {"names": list(labels)}}),
        },
        notes=tuple(dict.fromkeys([*notes, *remarks])),
    )


def _text(section: TaskSection, base: Path) -> Task:
    notes: list[str] = []
    documents, source = plain_text.read_documents(section, base, os.environ.get("KDCLI_DATA_DIR"), notes)
    if not documents["train"]:
        raise InputError(f"{source} has no text", where="task")
    if not documents.get("validation"):
        documents = plain_text.hold_out(documents["train"], section.validation_fraction, section.split_seed)
    sizes = {"train": section.train_samples, "validation": section.validation_samples}
    splits = {
        name: _subset(_table({"text": documents[name]}), size, section.split_seed) for name, size in sizes.items()
    }
    held = _dataset(splits["validation"])
    return Task(
        name=section.name,
        kind=registry.get("text"),
        label_names=(),
        metrics=("loss",),
        primary="loss",
        is_pair=False,
        train=_dataset(splits["train"]),
        selection=held,
        report={"validation": held},
        masking=Masking(section.mask_probability, section.mask_smoothing),
        description={
            "source": source,
            "protocol": "held-out text",
            "sizes": {name: len(rows) for name, rows in splits.items()},
            "max_length": section.max_length,
            "fingerprint": fingerprint_of(splits),
        },
        notes=tuple(notes),
    )


def _built_in(section: TaskSection, evaluate: EvaluateSection, limit: int | None) -> Task:
    splits = reviews.reviews(section.split_seed)
    rows = {name: _table({"text": split["text"]}, split["label"]) for name, split in splits.items()}
    return _task(
        section,
        evaluate,
        kind="classification",
        labels=reviews.LABELS,
        metrics=("accuracy",),
        train=rows["train"],
        validation={"validation": rows["validation"]},
        source=f"built-in generator, label noise {reviews.NOISE}",
        limit=limit,
    )


def _glue(section: TaskSection, evaluate: EvaluateSection, glue: GlueTask, limit: int | None) -> Task:
    wanted = ["train", *(split for _, split in glue.report)]
    local: dict[str, Columns] = {}
    root = os.environ.get("KDCLI_DATA_DIR")
    if root is not None:
        for split in wanted:
            path = Path(root) / "glue" / glue.name / f"{split}.parquet"
            if path.is_file():
                local[split] = read_file(path, "KDCLI_DATA_DIR")
    reports = [(name, split) for name, split in glue.report if split in local]
    if "train" not in local or not reports:
        try:
            local = {**read_hub(HUB, glue.name, "task.name"), **local}
        except InputError as error:
            missing = [f"{split}.parquet" for split in wanted if split not in local]
            place = f"{root}/glue/{glue.name}" if root else "KDCLI_DATA_DIR (not set)"
            raise InputError(
                f"task {glue.name}: {', '.join(missing)} not found in {place}, and the hub's {HUB} cannot be reached",
                where="task.name",
                hint=error.message,
            ) from error
        reports = [(name, split) for name, split in glue.report if split in local]
    kind = "classification" if glue.labels else "regression"
    splits = {
        split: _glue_rows(local[split], glue, f"GLUE {glue.name} {split}")
        for split in ["train", *(split for _, split in reports)]
    }
    return _task(
        section,
        evaluate,
        kind=kind,
        labels=glue.labels,
        metrics=glue.metrics,
        train=splits["train"],
        validation={name: splits[split] for name, split in reports},
        source=f"GLUE {glue.name}",
        limit=limit,
    )


def _glue_rows(columns: Columns, glue: GlueTask, source: str) -> pa.Table:
    texts = custom.text_columns(columns, glue.columns, source)
    allowed = ", ".join(f"{i} ({name})" for i, name in enumerate(glue.labels))
    labels: list[Any] = []
    for row, value in enumerate(custom.need_column(columns, "label", "label", source), 1):
        if custom.is_missing(value):
            raise InputError(f"{source}: row {row} has no label", where="task.name")
        number = isinstance(value, int | float)
        if not number or (glue.labels and value not in range(len(glue.labels))):
            right = f"one of {allowed}" if glue.labels else "a number"
            raise InputError(f"{source}: row {row} has the label {value!r}, not {right}", where="task.name")
        labels.append(int(value) if glue.labels else float(value))
    return _table(texts, labels)


def _custom(section: TaskSection, evaluate: EvaluateSection, base: Path, limit: int | None) -> Task:
    notes: list[str] = []
    raw, source = _raw_splits(section, base, notes)
    label = custom.need_column(raw["train"], section.label or "label", "label", source)
    kind = custom.infer_kind(label, section, source, notes)
    files = {name: getattr(section, name, None) or source for name in raw}
    # What was read is let go of, file by file.
    cleaned = {name: custom.clean_rows(raw.pop(name), section, kind, files[name], notes) for name in list(raw)}
    labels: dict[str, Any] = {name: values for name, (_, values) in cleaned.items()}
    names: tuple[str, ...] = ()
    if kind == "classification":
        known = custom.known_names(section)
        labels = {name: custom.named_integers(values, known) or values for name, values in labels.items()}
        names = custom.class_names(labels["train"], section, source, notes)
        labels = {name: custom.to_ids(values, names, files[name]) for name, values in labels.items()}
    elif len(set(labels["train"])) < 2:
        raise InputError(f"{source}: all labels are equal: there is nothing to learn", where="task.label")
    splits = {name: _table(texts, labels.pop(name)) for name, (texts, _) in cleaned.items()}
    del cleaned
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split(splits["train"], section, kind)
    return _task(
        section,
        evaluate,
        kind=kind,
        labels=names,
        metrics=("pearson", "spearman") if kind == "regression" else ("accuracy", "f1"),
        train=splits["train"],
        validation={"validation": splits["validation"]},
        test=splits.get("test"),
        source=source,
        limit=limit,
        notes=notes,
    )


def _raw_splits(section: TaskSection, base: Path, notes: list[str]) -> tuple[dict[str, Columns], str]:
    def read(text: str, where: str) -> Columns:
        given = expanded(text, where)
        path = given if given.is_absolute() else base / given
        return read_file(path, where, delimiter=section.delimiter, encoding=section.encoding, notes=notes)

    if section.hub is not None:
        label = section.label or "label"
        splits = read_hub(section.hub, section.hub_config, "task.hub", label=label)
        if "train" not in splits:
            raise InputError(f"{section.hub} has no split named train; it has {', '.join(splits)}", where="task.hub")
        # Many sets keep the answers of their test split to themselves: nothing can be scored on such a split.
        if all(custom.is_missing(value) for value in splits.get("test", {}).get(label, [])):
            splits.pop("test", None)
        return {k: v for k, v in splits.items() if k in ("train", "validation", "test")}, section.hub
    if section.data is not None:
        return {"train": read(section.data, "task.data")}, section.data
    assert section.train is not None
    splits = {"train": read(section.train, "task.train")}
    for name in ("validation", "test"):
        given = getattr(section, name)
        if given is not None:
            splits[name] = read(given, f"task.{name}")
    return splits, section.train


def _split(rows: pa.Table, section: TaskSection, kind: str) -> tuple[pa.Table, pa.Table]:
    """Return a seeded split.

    The classes' shares are kept where every class has two examples, and both parts have room for all classes.
    """
    from sklearn.model_selection import train_test_split

    count = len(rows)
    size = round(count * section.validation_fraction)
    if not 0 < size < count:
        raise InputError(
            f"{counted(count, 'row')} cannot be split with validation_fraction = {section.validation_fraction}",
            where="task.validation_fraction",
        )
    labels = rows.column("label").to_numpy()
    counts = np.unique(labels, return_counts=True)[1] if kind == "classification" else np.array([], np.int64)
    enough = min(size, count - size) >= len(counts)
    stratify = labels if len(counts) and enough and counts.min() > 1 else None
    kept, held = train_test_split(np.arange(count), test_size=size, random_state=section.split_seed, stratify=stratify)
    # The held-out rows stay as they were drawn: halves of a set that is sorted by label would be no samples of it.
    chosen = np.zeros(count, bool)
    chosen[kept] = True
    marked = rows.append_column("chosen", pa.array(chosen))
    train = stored_table((batch.filter(batch.column("chosen")) for batch in marked.to_batches()), marked.schema)
    return train.drop_columns("chosen"), rows.take(held)


def load_rows(
    section: TaskSection, config: Any, *, names: Sequence[str] | None = None, limit: int | None = None
) -> Task:
    """Return a task of the held-out rows in the file `section.data`, whose labels are a model's own classes.

    section: its `labels` are names for integers in the file, in their order. names: what the user calls the classes;
    the model's own names are those of the file's integers, in place of `section.labels`, and other names are given to
    the classes of `config`, in the model's order. limit: rows that are drawn at random; None takes all.
    Raises InputError when the file, a column or a label does not fit.
    """
    regression = config.num_labels == 1
    kind = "regression" if regression else "classification"
    notes: list[str] = []
    path = section.data
    assert path is not None
    if names is not None:
        section = section.model_copy(update={"labels": list(names)})
    columns = read_file(Path(path), "--data", delimiter=section.delimiter, encoding=section.encoding, notes=notes)
    texts, found = custom.clean_rows(columns, section, kind, path, notes)
    named = None if regression else custom.named_integers(found, custom.known_names(section))
    if names is not None and (named is None or named_order(class_names_of(config), names) is None):
        name_outputs(config, names, "--labels")
    labels: Any = found
    classes: tuple[str, ...] = ()
    if not regression:
        labels = named or found
        classes, place = _places(set(labels), tuple(class_names_of(config)), path)
        labels = custom.to_ids(labels, classes, path, owner="the model does not have", place=place)
    rows = _table(texts, labels)
    return _task(
        section,
        EvaluateSection(),
        kind=kind,
        labels=classes,
        metrics=("pearson", "spearman") if regression else ("accuracy", "f1"),
        train=rows,
        validation={"rows": rows},
        source=path,
        limit=limit,
        notes=notes,
        trains=False,
    )


def _places(labels: set[str], names: tuple[str, ...], path: str) -> tuple[tuple[str, ...], dict[str, int] | None]:
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
                f"{path} has integer labels ({listed(numbers)}), but the model's classes have names ({listed(names)})",
                where="task.labels",
                hint=f"give the model's names in the order of the file's integers, from 0 on: --labels {example}",
            )
        return names, None
    if integers:
        return names, {label: int(label) for label in labels}
    if len(labels) != len(names):
        raise InputError(
            f"{path} has {counted(len(labels), 'class', 'classes')} ({listed(sorted(labels))}), and the model, which "
            f"does not name its own, has {len(names)}",
            where="task.labels",
            hint="name them in the model's order, with the file's words: --labels NAME,NAME,...",
        )
    return custom.in_order(labels), None
