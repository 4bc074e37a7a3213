"""From `[task]` to a `Task`."""

import difflib
import hashlib
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks import custom, synthetic, text
from kdcli.tasks.base import Masking, Task
from kdcli.tasks.glue import GLUE, HUB, GlueTask
from kdcli.tasks.metrics import ERRORS, known

if TYPE_CHECKING:
    from datasets import Dataset

BUILT_IN = "reviews"


def load_task(section: TaskSection, evaluate: EvaluateSection, *, base: Path) -> Task:
    """Return the task that a recipe's `[task]` names.

    base: the folder that relative paths start from. Under the protocol "half-dev" the first half of the
    validation set chooses checkpoints and the second half is reported (methods 17.1).
    Raises InputError when the data is missing, empty or does not fit.
    """
    if section.type == "text":
        return _text(section, base)
    if section.is_custom:
        return _custom(section, evaluate, base)
    if section.name in GLUE:
        return _glue(section, evaluate, GLUE[section.name])
    if section.name == BUILT_IN:
        return _built_in(section, evaluate)
    names = [*GLUE, BUILT_IN]
    near = difflib.get_close_matches(section.name, names, n=1)
    raise InputError(
        f"unknown task {section.name!r}; known are {', '.join(names)}",
        where="task.name",
        hint=f"did you mean {near[0]!r}?" if near else "own data: task.data, task.train or task.hub",
    )


def _dataset(rows: custom.Columns) -> "Dataset":
    count = len(rows["text"])
    from datasets import Dataset

    return Dataset.from_dict({"index": list(range(count)), **rows})


def _subset(rows: custom.Columns, size: int | None, seed: int) -> custom.Columns:
    """Return a fixed random subset in the data's own order; the same for every run with this split_seed."""
    count = len(rows["text"])
    if size is None or size >= count:
        return rows
    kept = sorted(random.Random(f"subset-{seed}").sample(range(count), size))
    return {name: [values[i] for i in kept] for name, values in rows.items()}


def _halves(rows: custom.Columns) -> tuple[custom.Columns, custom.Columns]:
    middle = len(rows["text"]) // 2
    if middle == 0:
        raise InputError("the validation set is too small to be halved", where="evaluate.protocol")
    return (
        {name: values[:middle] for name, values in rows.items()},
        {name: values[middle:] for name, values in rows.items()},
    )


def fingerprint_of(splits: dict[str, custom.Columns]) -> str:
    """Return 16 hex digits over every split's rows: the same data, the same digits, on any machine."""
    digest = hashlib.sha256()
    for name, rows in sorted(splits.items()):
        digest.update(name.encode())
        for column in sorted(rows):
            digest.update(column.encode())
            for value in rows[column]:
                digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _task(
    section: TaskSection,
    evaluate: EvaluateSection,
    *,
    kind: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    train: custom.Columns,
    validation: dict[str, custom.Columns],
    source: str,
    test: custom.Columns | None = None,
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
        report = {"test": _subset(test, section.validation_samples, section.split_seed)}
    splits = {"train": train, "selection": selection, **{f"report-{k}": v for k, v in report.items()}}
    return Task(
        name=section.name,
        kind=kind,
        label_names=labels,
        metrics=metrics,
        primary=metrics[0],
        is_pair="text_pair" in train,
        train=_dataset(train),
        selection=_dataset(selection),
        report={name: _dataset(rows) for name, rows in report.items()},
        description={
            "source": source,
            "protocol": evaluate.protocol,
            "labels": list(labels),
            "sizes": {name: len(rows["text"]) for name, rows in splits.items()},
            "max_length": section.max_length,
            "fingerprint": fingerprint_of({**splits, "labels": {"names": list(labels)}}),
        },
    )


def _text(section: TaskSection, base: Path) -> Task:
    documents, source = text.read_documents(section, base, os.environ.get("KDCLI_DATA_DIR"))
    if not documents["train"]:
        raise InputError(f"{source} has no text", where="task")
    if not documents.get("validation"):
        documents = text.hold_out(documents["train"], section.validation_fraction, section.split_seed)
    sizes = {"train": section.train_samples, "validation": section.validation_samples}
    splits = {name: _subset({"text": documents[name]}, size, section.split_seed) for name, size in sizes.items()}
    held = _dataset(splits["validation"])
    return Task(
        name=section.name,
        kind="text",
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
            "sizes": {name: len(rows["text"]) for name, rows in splits.items()},
            "max_length": section.max_length,
            "fingerprint": fingerprint_of({name: dict(rows) for name, rows in splits.items()}),
        },
    )


def _built_in(section: TaskSection, evaluate: EvaluateSection) -> Task:
    splits = synthetic.reviews(section.split_seed)
    rows: dict[str, custom.Columns] = {
        name: {"text": split["text"], "label": split["label"]} for name, split in splits.items()
    }
    return _task(
        section,
        evaluate,
        kind="classification",
        labels=synthetic.LABELS,
        metrics=("accuracy",),
        train=rows["train"],
        validation={"validation": rows["validation"]},
        source=f"built-in generator, label noise {synthetic.NOISE}",
    )


def _glue(section: TaskSection, evaluate: EvaluateSection, glue: GlueTask) -> Task:
    wanted = ["train", *(split for _, split in glue.report)]
    local: dict[str, custom.Columns] = {}
    root = os.environ.get("KDCLI_DATA_DIR")
    if root is not None:
        for split in wanted:
            path = Path(root) / "glue" / glue.name / f"{split}.parquet"
            if path.is_file():
                local[split] = custom.read_file(path, "KDCLI_DATA_DIR")
    reports = [(name, split) for name, split in glue.report if split in local]
    if "train" not in local or not reports:
        try:
            local = {**custom.read_hub(HUB, glue.name, "task.name"), **local}
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
    )


def _glue_rows(columns: custom.Columns, glue: GlueTask, source: str) -> custom.Columns:
    rows = custom.text_columns(columns, glue.columns, source)
    allowed = ", ".join(f"{i} ({name})" for i, name in enumerate(glue.labels))
    rows["label"] = []
    for row, value in enumerate(custom.need_column(columns, "label", "label", source), 1):
        if custom.is_missing(value):
            raise InputError(f"{source}: row {row} has no label", where="task.name")
        number = isinstance(value, int | float)
        if not number or (glue.labels and value not in range(len(glue.labels))):
            right = f"one of {allowed}" if glue.labels else "a number"
            raise InputError(f"{source}: row {row} has the label {value!r}, not {right}", where="task.name")
        rows["label"].append(int(value) if glue.labels else float(value))
    return rows


def _custom(section: TaskSection, evaluate: EvaluateSection, base: Path) -> Task:
    raw, source = _raw_splits(section, base)
    kind = custom.infer_kind(custom.need_column(raw["train"], section.label or "label", "label", source), section)
    files = {name: getattr(section, name, None) or source for name in raw}
    splits = {name: custom.clean_rows(rows, section, kind, files[name]) for name, rows in raw.items()}
    names: tuple[str, ...] = ()
    if kind == "classification":
        names = custom.class_names(splits["train"], section, source)
        for name, rows in splits.items():
            custom.to_ids(rows, names, files[name])
    elif len(set(splits["train"]["label"])) < 2:
        raise InputError(f"{source}: all labels are equal: there is nothing to learn", where="task.label")
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split(splits["train"], section, kind)
    test = splits.get("test")
    return _task(
        section,
        evaluate,
        kind=kind,
        labels=names,
        metrics=("pearson", "spearman") if kind == "regression" else ("accuracy", "f1"),
        train=splits["train"],
        validation={"validation": splits["validation"]},
        test=test,
        source=source,
    )


def _raw_splits(section: TaskSection, base: Path) -> tuple[dict[str, custom.Columns], str]:
    def path(text: str) -> Path:
        given = Path(text).expanduser()
        return given if given.is_absolute() else base / given

    if section.hub is not None:
        label = section.label or "label"
        splits = custom.read_hub(section.hub, section.hub_config, "task.hub", label=label)
        if "train" not in splits:
            raise InputError(f"{section.hub} has no split named train; it has {', '.join(splits)}", where="task.hub")
        # Many sets keep the answers of their test split to themselves: nothing can be scored on such a split.
        if all(custom.is_missing(value) for value in splits.get("test", {}).get(label, [])):
            splits.pop("test", None)
        return {k: v for k, v in splits.items() if k in ("train", "validation", "test")}, section.hub
    if section.data is not None:
        return {"train": custom.read_file(path(section.data), "task.data")}, section.data
    assert section.train is not None
    splits = {"train": custom.read_file(path(section.train), "task.train")}
    for name in ("validation", "test"):
        given = getattr(section, name)
        if given is not None:
            splits[name] = custom.read_file(path(given), f"task.{name}")
    return splits, section.train


def _split(rows: custom.Columns, section: TaskSection, kind: str) -> tuple[custom.Columns, custom.Columns]:
    """Return a seeded split.

    The classes' shares are kept where every class has two examples, and both parts have room for all classes.
    """
    count = len(rows["text"])
    size = round(count * section.validation_fraction)
    if not 0 < size < count:
        raise InputError(
            f"{count} rows cannot be split with validation_fraction = {section.validation_fraction}",
            where="task.validation_fraction",
        )
    labels: Any = rows["label"]
    counts = Counter(labels) if kind == "classification" else Counter()
    enough = min(size, count - size) >= len(counts)
    stratify = labels if counts and enough and min(counts.values()) > 1 else None
    from sklearn.model_selection import train_test_split

    kept, held = train_test_split(
        list(range(count)), test_size=size, random_state=section.split_seed, stratify=stratify
    )

    def take(indices: list[int]) -> custom.Columns:
        return {name: [values[i] for i in indices] for name, values in rows.items()}

    # The held-out rows stay as they were drawn: halves of a set that is sorted by label would be no samples of it.
    return take(sorted(kept)), take(held)


def load_rows(path: Path, text: list[str], label: str, config: Any, *, metrics: list[str] | None = None) -> Task:
    """Return a task of held-out rows in a file, whose labels are a model's own classes.

    metrics: instead of the usual ones.
    Raises InputError when the file, a column or a label does not fit.
    """
    regression = config.num_labels == 1
    section = TaskSection(
        name="rows",
        data=str(path),
        text=text,
        label=label,
        type="regression" if regression else "classification",
        metrics=metrics,
    )
    kind = "regression" if regression else "classification"
    rows = custom.clean_rows(custom.read_file(path, "--data"), section, kind, str(path))
    names: tuple[str, ...] = ()
    if not regression:
        names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        numbers = {str(i) for i in range(config.num_labels)}
        if set(rows["label"]) <= numbers and not set(rows["label"]) <= set(names):
            rows["label"] = [names[int(value)] for value in rows["label"]]
        custom.to_ids(rows, names, str(path), owner="the model")
    task = _task(
        section,
        EvaluateSection(),
        kind=kind,
        labels=names,
        metrics=("pearson", "spearman") if regression else ("accuracy", "f1"),
        train=rows,
        validation={"rows": rows},
        source=str(path),
    )
    # What a file is called need not be fit for a folder.
    return replace(task, name=path.stem)
