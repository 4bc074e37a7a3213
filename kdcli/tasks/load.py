"""From `[task]` to a `Task`."""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdcli.data.columns import Columns, chunked
from kdcli.data.mixing import apportioned
from kdcli.data.own import files_of, test_set_of
from kdcli.data.rows import identities
from kdcli.data.sets import named_sets
from kdcli.data.tables import dataset_of, halves, subset
from kdcli.errors import InputError
from kdcli.recipe.parts import fields_of_parts, section_of_part
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks import parts, registry
from kdcli.tasks.base import Task
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.labels import listed
from kdcli.words import counted, one

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

FEW = 10
"""Rows below which a score is remarked on."""


@dataclass
class _Rows:
    """What `[task]`, or a part of it, holds. raw: its splits, as far as they are not read yet; sources: where each is
    from. part: its name; place: of its table in the recipe.
    """

    kind: TaskKind
    fields: Any
    usual: tuple[str, ...] | None
    raw: dict[str, Columns]
    source: str
    sources: dict[str, str]
    part: str | None = None
    place: str = "task"

    def read(
        self, split: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> tuple[pa.Table, tuple[str, ...]]:
        """Return the rows of a split and the labels, those given or its own. Errors name the part."""
        with self.placed():
            return self.kind.read(self.raw[split], self.fields, self.sources[split], notes, labels)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Let errors about fields of `[task]` that the part may have name those of the part."""
        try:
            yield
        except InputError as error:
            if self.part is None:
                raise
            own = re.compile(rf"\btask(?=$|\.(?:{'|'.join(fields_of_parts(self.kind.fields))})\b)")
            where, hint = own.sub(self.place, error.where or "task"), error.hint and own.sub(self.place, error.hint)
            raise InputError(error.message, where=where, hint=hint) from error


def load_task(section: TaskSection, evaluate: EvaluateSection, *, base: Path, limit: int | None = None) -> Task:
    """Return the task that a recipe's `[task]` names.

    base: the folder that relative paths start from. Under the protocol "half-dev" the first half of the
    validation set chooses checkpoints and the second half is reported. limit: rows of every set that
    is reported, drawn at random; None reports them whole.
    Raises InputError when the data is missing, empty or does not fit.
    """
    notes: list[str] = []
    opened = list(_open_parts(section, base, notes)) if section.part is not None else [_open(section, base, notes)]
    kind = opened[0].kind
    read, labels = _read_training(opened, notes)
    train, validation, test = [], [], []
    for part, rows in zip(opened, read, strict=True):
        # What was read is let go of, split by split.
        held = {}
        for name in list(part.raw):
            held[name] = part.read(name, notes, labels)[0]
            del part.raw[name]
        tests = {split: own for split in held if (own := test_set_of(split)) is not None}
        test.append({own: held.pop(split) for split, own in tests.items()})
        if not held:
            with part.placed():
                rows, held["validation"] = kind.hold_out(rows, section.validation_fraction, section.split_seed)
        train.append(rows)
        validation.append(held)
    return _task(
        section,
        evaluate,
        kind=kind,
        fields=opened[0].fields,
        labels=labels,
        usual=opened[0].usual if len({part.usual for part in opened}) == 1 else None,
        train=train,
        validation=validation,
        test=test,
        source=", ".join(dict.fromkeys(part.source for part in opened)),
        limit=limit,
        notes=notes,
    )


def _open(section: TaskSection, base: Path, notes: list[str]) -> _Rows:
    """Return what `[task]` without parts holds, nothing of it read as rows yet."""
    kind, named = registry.kind_of(section), registry.set_of(section)
    if named is not None:
        raw = named.read(section.split_seed)
        fields = kind.fields.model_validate({**section.fields, **named.fields})
        sources = {name: f"{named.source} {name}" for name in raw}
        return _Rows(kind.with_fields(fields), fields, named.metrics, raw, named.source, sources)
    if not section.is_own and section.type is None:
        raise _unknown(section.name)
    raw, source = kind.splits(section, registry.fields_of(kind, section), base, notes)
    if section.type is None:
        kind = registry.recognise(raw["train"], section, source, notes)
    fields = registry.fields_of(kind, section)
    files = files_of(section)
    sources = {name: files[name][0] if name in files else source for name in raw}
    if section.hub is not None and "test" in raw and not kind.has_answers(raw["test"], fields):
        # Many sets keep the answers of their test split to themselves: nothing can be scored on such a split.
        del raw["test"]
    return _Rows(kind.with_fields(fields), fields, None, raw, source, sources)


def _open_parts(section: TaskSection, base: Path, notes: list[str]) -> Iterator[_Rows]:
    """Yield what each part of a task holds. Raises InputError where two are of different kinds."""
    first: _Rows | None = None
    kind = registry.kind_of(section)
    for number, part in enumerate(section.part or ()):
        place = f"task.part[{number}]"
        found = _Rows(kind, None, None, {}, "", {}, part.name, place)
        with found.placed():
            opened = _open(section_of_part(section, part, kind.fields), base, notes)
        sources = {name: f"part {part.name}: {source}" for name, source in opened.sources.items()}
        rows = replace(opened, sources=sources, part=part.name, place=place)
        first = first or rows
        if rows.kind.name != first.kind.name:
            raise InputError(
                f"{part.name} is {one(rows.kind.name)} task, and {first.part} {one(first.kind.name)} task",
                where=place,
                hint="all parts of a task are of one kind: give task.type",
            )
        yield rows


def _read_training(opened: list[_Rows], notes: list[str]) -> tuple[list[pa.Table], tuple[str, ...]]:
    """Return the training rows of all parts, and the labels that they have together."""
    found: list[tuple[pa.Table, tuple[str, ...]] | None] = []
    problem: InputError | None = None
    for part in opened:
        try:
            found.append(part.read("train", notes))
        except InputError as error:
            # What is too little for a task of its own, such as one class, need not be so beside other parts.
            problem = problem or error
            found.append(None)
    own = [labels for each in found if each is not None for labels in [each[1]]]
    if problem is not None and not own:
        raise problem
    _check_shared([(part, each[1]) for part, each in zip(opened, found, strict=True) if each is not None])
    labels = opened[0].kind.join(own)
    tables = []
    for part, each in zip(opened, found, strict=True):
        rows, before = each if each is not None else (None, ())
        if rows is None or before != labels:
            rows, _ = part.read("train", notes, labels)
        del part.raw["train"]
        tables.append(rows)
    return tables, labels


def _check_shared(own: Sequence[tuple[_Rows, tuple[str, ...]]]) -> None:
    """Raise InputError where parts have other labels than the rest: most likely other words for the same classes.

    A part shares labels with another one directly, or through a third. own: parts with their labels, if they have any.
    """
    (first, labels), *left = own
    known = set(labels)
    while joined := [each for _, each in left if not known.isdisjoint(each)]:
        known.update(*joined)
        left = [(part, each) for part, each in left if known.isdisjoint(each)]
    if labels and left:
        part, others = left[0]
        raise InputError(
            f"part {part.part} has the labels {listed(others)}, and part {first.part} has {listed(labels)}: "
            "they share none",
            where=part.place,
            hint="write the same classes in the same words in all parts; or name all in task.labels if they differ",
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
    return identities(rows, column) if hasattr(rows, "column_names") else chunked(rows[column])


def _metrics(
    wanted: Sequence[str] | None, kind: TaskKind, labels: Sequence[str], usual: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the metrics of a task. usual: those of its set. Raises InputError for one that does not fit."""
    every, usual_ones = kind.metrics_for(labels)
    if wanted is None:
        return usual or usual_ones
    never_first = frozenset() if kind.chosen_by_loss else kind.errors
    fitting = [name for name in every if name not in never_first]
    wrong = [name for name in wanted if name not in every]
    if wrong or not wanted or wanted[0] in never_first:
        said = f"metrics names none of {one(kind.name)} task"
        if wanted:
            bad = wrong[0] if wrong else wanted[0]
            said = f"{bad!r} cannot be the {'first ' if not wrong else ''}metric of {one(kind.name)} task"
        raise InputError(f"{said}; known are {', '.join(fitting)}", where="task.metrics")
    return tuple(wanted)


def _task(
    section: TaskSection,
    evaluate: EvaluateSection,
    *,
    kind: TaskKind,
    fields: Any,
    labels: tuple[str, ...],
    train: list[pa.Table],
    validation: list[dict[str, pa.Table]],
    test: list[dict[str, pa.Table]],
    source: str,
    usual: tuple[str, ...] | None = None,
    limit: int | None = None,
    notes: Sequence[str] = (),
    trains: bool = True,
) -> Task:
    """Return a task. train, validation, test: of each of its parts; of a task without parts, of the one that it is."""
    names = [part.name for part in section.part or ()]
    metrics = _metrics(section.metrics, kind, labels, usual)
    seed = section.split_seed
    sizes = apportioned(section.train_samples, [len(rows) for rows in train])
    train = [subset(rows, size, seed) for rows, size in zip(train, sizes, strict=True)]
    calibration: list[pa.Table] = []
    for number, rows in enumerate(train if trains else ()):
        # Of a handful of rows none are set aside.
        if round(len(rows) * (share := kind.calibration(rows))):
            train[number], aside = kind.hold_out(rows, share, seed)
            calibration.append(aside)
    validation = [
        {name: subset(rows, section.validation_samples, seed) for name, rows in sets.items()} for sets in validation
    ]
    selection = [next(iter(sets.values())) for sets in validation]
    report = [{name: rows for name, rows in sets.items() if kind.is_scored(rows)} for sets in validation]
    protocol = str(evaluate.protocol)
    tested = [bool(sets) for sets in test]
    remarks = []
    if kind.scored_by_loss or not (any(tested) or any(report)):
        protocol = "held-out loss"
    elif protocol == "half-dev":
        if any(tested):
            raise InputError(
                "half of the validation set would be reported, and the test set never be looked at",
                where="evaluate.protocol",
                hint='leave out task.test, or use protocol = "dev", which reports the test set where there is one',
            )
        selection = [halves(rows)[0] for rows in selection]
        report = [{name: halves(rows)[1] for name, rows in sets.items()} for sets in validation]
    elif any(tested):
        report = [
            {name: kind.draw(rows, section.test_samples, seed) for name, rows in tests.items()} or sets
            for tests, sets in zip(test, validation, strict=True)
        ]
        if lacking := [name for name, has in zip(names, tested, strict=False) if not has]:
            remarks.append(
                f"no test set of {listed(lacking)}: reported are validation rows, which also choose the checkpoint"
            )
    if section.test_samples is not None and not any(tested):
        raise InputError(
            "there is no test set that it could be a part of",
            where="task.test_samples",
            hint="task.validation_samples cuts the validation set",
        )
    joined = parts.joined if section.part is not None else itemgetter(0)
    splits = {"train": joined(train), "selection": joined(selection)}
    for number, sets in enumerate(report):
        if {tuple(rows.column_names) for rows in sets.values()} != {tuple(r.column_names) for r in report[0].values()}:
            raise InputError(
                "is not scored as the first part is: on rows of the same columns, or not at all",
                where=f"task.part[{number}]",
            )
    reported = _named_sets(report, names)
    if not kind.scored_by_loss:
        chosen_on = [
            {next(iter(sets)): rows} if kind.is_scored(rows) else {}
            for sets, rows in zip(validation, selection, strict=True)
        ]
        sets = {**_named_sets(chosen_on, names), **reported}
        few = {name: count for name, rows in sets.items() if (count := kind.scored(rows)) < FEW}
        remarks += [
            f"the {name} set has {counted(count, 'row')} only: a score on it says little" for name, count in few.items()
        ]
    if trains and labels:
        remarks += _untrained([kind.count(rows, labels) for rows in train], labels, names)
    reported = {name: kind.draw(rows, limit, seed) for name, rows in reported.items()}
    splits |= {f"report-{name}": rows for name, rows in reported.items()}
    if calibration:
        splits["calibration"] = pa.concat_tables(calibration)
    return Task(
        name=section.name,
        kind=kind,
        fields=fields,
        label_names=labels,
        metrics=metrics,
        train=dataset_of(splits["train"]),
        selection=dataset_of(splits["selection"]),
        report={name: dataset_of(rows) for name, rows in reported.items()},
        description={
            "source": source,
            "protocol": protocol,
            "labels": list(labels),
            "sizes": {name: kind.scored(rows) for name, rows in splits.items()},
            "max_length": section.max_length,
            "fingerprint": fingerprint_of({**splits, "labels": {"names": list(labels)}}),
            **({"parts": names, "mixing_temperature": section.mixing_temperature or 1.0} if names else {}),
        },
        notes=tuple(dict.fromkeys([*notes, *remarks])),
        calibration=dataset_of(splits["calibration"]) if calibration else None,
        parts=tuple(names),
        mixing_temperature=section.mixing_temperature or 1.0,
        trains=trains,
    )


def _untrained(counts: "Sequence[np.ndarray | None]", labels: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    """Yield remarks about labels that no training rows have, and those that a part has none of.

    counts: of the labels, in the training rows of each part. names: of the parts.
    """
    known = [(count > 0).tolist() for count in counts if count is not None]
    if len(known) < len(counts):
        return

    def absent(present: Sequence[bool]) -> str:
        lacking = [label for label, has in zip(labels, present, strict=True) if not has]
        return f"no training rows of {counted(len(lacking), 'class', 'classes')}: {listed(lacking)}"

    anywhere = [any(each) for each in zip(*known, strict=True)]
    if not all(anywhere):
        yield absent(anywhere)
    for name, own in zip(names, known, strict=False):
        # What no part has is told once.
        here = [has or not other for has, other in zip(own, anywhere, strict=True)]
        if not all(here):
            yield f"part {name} has {absent(here)}"


def _named_sets(sets: Sequence[Mapping[str, pa.Table]], names: Sequence[str]) -> dict[str, pa.Table]:
    """Return all sets of all parts under one name each: of validation rows the part's, of others with the set's.

    Raises InputError where two have the same.
    """
    if not names:
        return dict(sets[0])
    found: dict[str, pa.Table] = {}
    for number, (part, each) in enumerate(zip(names, sets, strict=True)):
        for split, rows in each.items():
            name = part if split == "validation" else f"{part} {split}"
            if name in found:
                raise InputError(
                    f"the sets of two parts are both called {name!r}",
                    where=f"task.part[{number}].name",
                    hint="a set is called by its part and its split: give this part another name",
                )
            found[name] = rows
    return found


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
        fields.check(section.model_copy(update={"type": kind.name}))
    except ValueError as error:
        raise InputError(str(error), where="--data", hint="name the column of text: --text COLUMN") from error
    form: Mapping[str, Any] = {"delimiter": section.delimiter, "encoding": section.encoding}
    columns = kind.columns_of_file(section, fields, notes)
    kind = kind.with_fields(fields)
    rows, labels = kind.read_for(config, columns, fields, path, notes, names, form)
    return _task(
        section,
        EvaluateSection(),
        kind=kind,
        fields=fields,
        labels=labels,
        train=[rows],
        validation=[{"rows": rows}],
        test=[{}],
        source=path,
        limit=limit,
        notes=notes,
        trains=False,
    )
