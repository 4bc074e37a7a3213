"""From `[task]` to a `Task`."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdcli.data.columns import Column, chunked
from kdcli.data.files import read_file
from kdcli.data.rows import chunks_of
from kdcli.data.sets import named_sets
from kdcli.data.tables import dataset_of, halves, split, subset
from kdcli.errors import InputError
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks import registry
from kdcli.tasks.base import Task
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.labels import listed
from kdcli.words import counted

if TYPE_CHECKING:
    from datasets import Dataset

FEW = 10
"""Rows below which a score is remarked on."""


def load_task(section: TaskSection, evaluate: EvaluateSection, *, base: Path, limit: int | None = None) -> Task:
    """Return the task that a recipe's `[task]` names.

    base: the folder that relative paths start from. Under the protocol "half-dev" the first half of the
    validation set chooses checkpoints and the second half is reported. limit: rows of every set that
    is reported, drawn at random; None reports them whole.
    Raises InputError when the data is missing, empty or does not fit.
    """
    notes: list[str] = []
    kind, named = registry.kind_of(section), registry.set_of(section)
    usual: tuple[str, ...] | None = None
    if named is not None:
        raw, source, usual = named.read(section.split_seed), named.source, named.metrics
        fields = kind.fields.model_validate({**section.fields, **named.fields})
        sources = {name: f"{source} {name}" for name in raw}
    else:
        if not section.is_own and section.type is None:
            raise _unknown(section.name)
        raw, source = kind.splits(section, registry.fields_of(kind, section), base, notes)
        if section.type is None:
            kind = registry.recognise(raw["train"], section, source, notes)
        fields = registry.fields_of(kind, section)
        sources = {name: getattr(section, name, None) or source for name in raw}
        if section.hub is not None and "test" in raw and not kind.has_answers(raw["test"], fields):
            # Many sets keep the answers of their test split to themselves: nothing can be scored on such a split.
            del raw["test"]
    # What was read is let go of, split by split.
    train, labels = kind.read(raw.pop("train"), fields, sources["train"], notes)
    held = {name: kind.read(raw.pop(name), fields, sources[name], notes, labels)[0] for name in list(raw)}
    test = held.pop("test", None)
    if not held:
        train, held["validation"] = kind.hold_out(train, section.validation_fraction, section.split_seed)
    return _task(
        section,
        evaluate,
        kind=kind,
        fields=fields,
        labels=labels,
        usual=usual,
        train=train,
        validation=held,
        test=test,
        source=source,
        limit=limit,
        notes=notes,
    )


def _unknown(name: str) -> InputError:
    names = list(named_sets())
    near = difflib.get_close_matches(name, names, n=1)
    return InputError(
        f"unknown task {name!r}; known are {', '.join(names)}",
        where="task.name",
        hint=f"did you mean {near[0]!r}?" if near else "own data: task.data, task.train or task.hub",
    )


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


def _metrics(
    wanted: Sequence[str] | None, kind: TaskKind, labels: Sequence[str], usual: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the metrics of a task. usual: those of its set. Raises InputError for one that does not fit."""
    every, usual_ones = kind.metrics_for(labels)
    if wanted is None:
        return usual or usual_ones
    fitting = [name for name in every if name not in kind.errors]
    wrong = [name for name in wanted if name not in every]
    if wrong or not wanted or wanted[0] in kind.errors:
        said = f"metrics names none of a {kind.name} task"
        if wanted:
            bad = wrong[0] if wrong else wanted[0]
            said = f"{bad!r} cannot be the {'first ' if not wrong else ''}metric of a {kind.name} task"
        raise InputError(f"{said}; known are {', '.join(fitting)}", where="task.metrics")
    return tuple(wanted)


def _task(
    section: TaskSection,
    evaluate: EvaluateSection,
    *,
    kind: TaskKind,
    fields: Any,
    labels: tuple[str, ...],
    train: pa.Table,
    validation: dict[str, pa.Table],
    source: str,
    test: pa.Table | None = None,
    usual: tuple[str, ...] | None = None,
    limit: int | None = None,
    notes: Sequence[str] = (),
    trains: bool = True,
) -> Task:
    metrics = _metrics(section.metrics, kind, labels, usual)
    train, calibration = subset(train, section.train_samples, section.split_seed), None
    # Of a handful of rows none are set aside.
    if trains and round(len(train) * (share := kind.calibration(train))):
        train, calibration = split(train, share, section.split_seed)
    validation = {
        name: subset(rows, section.validation_samples, section.split_seed) for name, rows in validation.items()
    }
    selection = next(iter(validation.values()))
    report, protocol = validation, str(evaluate.protocol)
    if kind.scored_by_loss:
        protocol = "held-out loss"
    elif protocol == "half-dev":
        if test is not None:
            raise InputError(
                "half of the validation set would be reported, and the test set never be looked at",
                where="evaluate.protocol",
                hint='leave out task.test, or use protocol = "dev", which reports the test set where there is one',
            )
        selection = halves(selection)[0]
        report = {name: halves(rows)[1] for name, rows in validation.items()}
    elif test is not None:
        report = {"test": subset(test, section.test_samples, section.split_seed)}
    if section.test_samples is not None and test is None:
        raise InputError(
            "there is no test set that it could be a part of",
            where="task.test_samples",
            hint="task.validation_samples cuts the validation set",
        )
    remarks = []
    if not kind.scored_by_loss:
        sets = {next(iter(validation)): selection, **report}
        few = {name: rows.num_rows for name, rows in sets.items() if rows.num_rows < FEW}
        remarks = [
            f"the {name} set has {counted(count, 'row')} only: a score on it says little" for name, count in few.items()
        ]
    if trains and labels and (counts := kind.count(train, labels)) is not None and not counts.all():
        absent = [label for label, count in zip(labels, counts, strict=True) if not count]
        remarks.append(f"no training rows of {counted(len(absent), 'class', 'classes')}: {listed(absent)}")
    report = {name: subset(rows, limit, section.split_seed) for name, rows in report.items()}
    splits = {"train": train, "selection": selection, **{f"report-{k}": v for k, v in report.items()}}
    if calibration is not None:
        splits["calibration"] = calibration
    return Task(
        name=section.name,
        kind=kind.with_fields(fields),
        fields=fields,
        label_names=labels,
        metrics=metrics,
        train=dataset_of(train),
        selection=dataset_of(selection),
        report={name: dataset_of(rows) for name, rows in report.items()},
        description={
            "source": source,
            "protocol": protocol,
            "labels": list(labels),
            "sizes": {name: len(rows) for name, rows in splits.items()},
            "max_length": section.max_length,
            "fingerprint": fingerprint_of({**splits, "labels": {"names": list(labels)}}),
        },
        notes=tuple(dict.fromkeys([*notes, *remarks])),
        calibration=dataset_of(calibration) if calibration is not None else None,
    )


def load_rows(
    section: TaskSection, kind: TaskKind, config: Any, *, names: Sequence[str] | None = None, limit: int | None = None
) -> Task:
    """Return a task of the held-out rows in the file `section.data`, whose labels are a model's own.

    kind, config: the model's. names: what the user calls its outputs. limit: rows that are drawn at random; None takes
    all.
    Raises InputError when the file, a column or a label does not fit.
    """
    notes: list[str] = []
    path = section.data
    assert path is not None
    fields = registry.fields_of(kind, section)
    try:
        fields.check(section)
    except ValueError as error:
        raise InputError(str(error), where="--data", hint="name the column of text: --text COLUMN") from error
    columns = read_file(Path(path), "--data", delimiter=section.delimiter, encoding=section.encoding, notes=notes)
    rows, labels = kind.read_for(config, columns, fields, path, notes, names)
    return _task(
        section,
        EvaluateSection(),
        kind=kind,
        fields=fields,
        labels=labels,
        train=rows,
        validation={"rows": rows},
        source=path,
        limit=limit,
        notes=notes,
        trains=False,
    )
