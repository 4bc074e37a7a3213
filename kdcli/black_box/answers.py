"""Decisions of a black box on noised copies of the training examples: asked for once and kept, or recorded before."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.progress import track

from kdcli.black_box.ask import BlackBox
from kdcli.data.columns import Columns
from kdcli.data.files import read_file
from kdcli.data.rows import values_of
from kdcli.errors import InputError
from kdcli.files import cache_dir, fingerprint
from kdcli.tasks.base import Task
from kdcli.tasks.labels import class_of, listed
from kdcli.tasks.load import fingerprint_of
from kdcli.terminal import tell
from kdcli.words import counted

MOST = 1e9
"""Decisions that a record may count: far more than anybody asks for, and sums of them are exact."""


class Memory:
    """Decisions on disk, a JSON line an example: {"index": i, "first": n, "decisions": [...], "sha256": ...}.

    Decisions are in the order of the copies. Lines are only ever added, and a later one continues an earlier one. The
    hash covers the line and `of`, what was asked. A line that a killed run left half-written, or that was changed
    since, is not there: `damaged` counts them.
    """

    def __init__(self, path: Path | None, of: str = "") -> None:
        self.path = path
        self.of = of
        self.known: dict[int, list[int]] = {}
        self.damaged = 0
        if path is None or not path.is_file():
            return
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            self.damaged = 1
            return
        for line in filter(None, lines):
            try:
                row = json.loads(line)
                index, first, found = row["index"], row["first"], row["decisions"]
                if row["sha256"] != self._hash(index, first, found):
                    raise ValueError("changed")
            except (ValueError, KeyError, TypeError, RecursionError):
                self.damaged += 1
                continue
            decisions = self.known.setdefault(index, [])
            if first == len(decisions):
                decisions.extend(found)

    def _hash(self, index: int, first: int, decisions: list[int]) -> str:
        return fingerprint([self.of, index, first, decisions])

    def add(self, rows: dict[int, list[int]]) -> None:
        """Take note of further decisions by the index of their example."""
        lines = []
        for index, decisions in rows.items():
            known = self.known.setdefault(index, [])
            row = {"index": index, "first": len(known), "decisions": decisions}
            lines.append(json.dumps({**row, "sha256": self._hash(index, len(known), decisions)}))
            known.extend(decisions)
        if self.path is not None:
            # The memory only saves questions: a full or read-only disk must not end the run.
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    # The empty line closes what an interrupted run may have left half-written.
                    file.write("\n" + "\n".join(lines) + "\n")


class Copies(Protocol):
    """What changes an example a little, in ways that depend on what it is made of alone."""

    @property
    def ratio(self) -> float: ...

    @property
    def seed(self) -> int: ...

    def copies(self, value: Any, example: int, numbers: Sequence[int], field: str) -> list[Any]:
        """Return numbered copies of the value of a column, of which number 0 is the value itself."""
        ...


def columns_asked(task: Task) -> list[str]:
    """Return the columns of a task's rows that a black box is shown."""
    return ["image"] if "images" in task.kind.provides else task.kind.columns_of_text(task.train)


def ask(
    box: BlackBox,
    train: Dataset,
    noise: Copies,
    *,
    columns: Sequence[str],
    copies: int,
    names: tuple[str, ...],
    queries_per_call: int = 1024,
    use_cache: bool = True,
    console: Console | None = None,
    noise_identity: Any = None,
) -> np.ndarray:
    """Return how often each class was decided, (largest index + 1, classes); row i for the example with index i.

    train: the task's rows with the columns index and `columns`, those that a black box is shown. Each example is asked
    `copies` times: once as it is, and then noised differently. Decisions are kept in the cache under the identity of
    the black box, the data and the noise, as soon as they are known: what was interrupted goes on, more copies ask for
    the additional ones only.
    Raises InputError when an answer is no label.
    """
    shown = train.select_columns([*columns, "index"])
    name = fingerprint(
        {
            "box": box.identity,
            "data": fingerprint_of({"train": shown}),
            "names": names,
            "noise": [noise.ratio, noise.seed, noise_identity],
            "format": 3,
        }
    )
    memory = Memory(cache_dir() / "decisions" / f"{name}.jsonl" if use_cache else None, name)
    if memory.damaged and console is not None:
        tell(
            console, f"cache: {counted(memory.damaged, 'line')} of {memory.path} damaged or incomplete: asked for again"
        )
    index = list(train["index"])
    portions = list(_portions(index, memory, copies, queries_per_call))
    if console is not None and portions:
        questions = sum(copies - first for portion in portions for _, first in portion)
        tell(console, f"asking the black box {counted(questions, 'question')}")
    quiet = console is None or not console.is_terminal
    for portion in track(portions, "decisions", console=console, disable=quiet, transient=True):
        memory.add(_decide(box, shown, columns, portion, noise, copies))
    counts = np.zeros((max(index) + 1, len(names)))
    for number in index:
        counts[number] = np.bincount(memory.known[number][:copies], minlength=len(names))
    return counts


def _portions(index: list[int], memory: Memory, copies: int, size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield portions of (row, first copy that is missing) with at most `size` questions, or one row, each."""
    portion: list[tuple[int, int]] = []
    questions = 0
    for row, number in enumerate(index):
        missing = copies - (first := len(memory.known.get(number, [])))
        if missing <= 0:
            continue
        if portion and questions + missing > size:
            yield portion
            portion, questions = [], 0
        portion.append((row, first))
        questions += missing
    if portion:
        yield portion


def _decide(
    box: BlackBox,
    rows: Dataset,
    columns: Sequence[str],
    portion: list[tuple[int, int]],
    noise: Copies,
    copies: int,
) -> dict[int, list[int]]:
    asked = rows[[row for row, _ in portion]]
    numbers = [range(first, copies) for _, first in portion]
    questions = {
        field: [
            copy
            for value, example, missing in zip(asked[field], asked["index"], numbers, strict=True)
            for copy in noise.copies(value, example, missing, field)
        ]
        for field in columns
    }
    decisions = iter(box.decide(questions))
    return {
        example: [next(decisions) for _ in missing] for example, missing in zip(asked["index"], numbers, strict=True)
    }


def recorded(path: Path, task: Task, where: str) -> np.ndarray:
    """Return the counts in a file of recorded decisions, (largest index + 1, classes).

    A row names its training example by `index` (its number in the training data, from 0), or by its texts
    (`text` and, of a pair, `text_pair`), or by the file of its image (`image`; relative to the folder that `path` is
    in). It holds either one decision as `label`, and there are several rows an
    example, or all as `counts`: a list in the order of the task's labels, or a table from label to number; or a column
    a label.
    Raises InputError when the file has no such columns, an unknown label, or no decision on some example.
    """
    columns = read_file(path, where)
    names = task.label_names
    rows = _rows_of_counts(columns, names, path, where)
    keys = _keys(columns, task, path, where)
    table: dict[Any, np.ndarray] = {}
    for key, row in zip(keys, rows, strict=True):
        table[key] = table[key] + row if key in table else row
    index = list(task.train["index"])
    wanted: list[Any] = index if "index" in columns else _shown_of(task)
    counts = np.zeros((max(index) + 1, len(names)))
    for number, key in zip(index, wanted, strict=True):
        if key not in table or table[key].sum() <= 0:
            missing = sum(1 for key in wanted if key not in table or table[key].sum() <= 0)
            raise InputError(
                f"{path} has no decision on {missing} of {len(index)} training examples; the first is {key!r}",
                where=where,
                hint="index counts the rows of the training data from 0, after [task] has chosen them",
            )
        counts[number] = table[key]
    return counts


def _shown_of(task: Task) -> list[Any]:
    """Return what tells each training example: its texts, or the file of its image."""
    fields = [values_of(task.train, field) for field in columns_asked(task)]
    return [
        tuple(value["path"] if isinstance(value, Mapping) else value for value in values)
        for values in zip(*fields, strict=True)
    ]


def _keys(columns: Columns, task: Task, path: Path, where: str) -> list[Any]:
    if "index" in columns:
        try:
            numbers = [float(value) for value in columns["index"]]
        except (TypeError, ValueError, OverflowError):
            numbers = [0.5]
        if not all(number.is_integer() for number in numbers):
            raise InputError(f"{path}: index must hold whole numbers", where=where)
        return [int(number) for number in numbers]
    fields = columns_asked(task)
    if any(field not in columns for field in fields):
        raise InputError(
            f"{path} does not say which example a row is about; it has {', '.join(columns)}",
            where=where,
            hint=f"add the column index, or {' and '.join(fields)}",
        )
    found: list[Any] = list(zip(*([str(value) for value in columns[field]] for field in fields), strict=True))
    if "images" in task.kind.provides:
        known = set(_shown_of(task))
        found = [name if name in known else (os.path.abspath(path.parent / name[0]),) for name in found]
    return found


def _rows_of_counts(columns: Columns, names: tuple[str, ...], path: Path, where: str) -> list[np.ndarray]:
    classes = len(names)
    if "counts" in columns:
        return [_counts(value, names, path, row, where) for row, value in enumerate(columns["counts"], 1)]
    if "label" in columns:
        return [
            np.eye(classes)[_class(value, names, path, row, where)] for row, value in enumerate(columns["label"], 1)
        ]
    found = {class_of(column, names): column for column in columns if column != "index"}
    if set(range(classes)) <= set(found):
        values = zip(*(columns[found[number]] for number in range(classes)), strict=True)
        return [_counts(list(row), names, path, number, where) for number, row in enumerate(values, 1)]
    raise InputError(
        f"{path} holds no decisions; it has the columns {', '.join(columns)}",
        where=where,
        hint=f"add label (a decision a row), counts, or the columns {listed(names)}",
    )


def _counts(value: Any, names: tuple[str, ...], path: Path, row: int, where: str) -> np.ndarray:
    counts = np.zeros(len(names))
    if isinstance(value, str):
        # A cell of a CSV file.
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        for label, number in value.items():
            # Parquet writes every field of a table into every row.
            counts[_class(label, names, path, row, where)] += _number(number or 0, path, row, where)
        return counts
    if not isinstance(value, list) or len(value) != len(names):
        raise InputError(
            f"{path}: row {row} must count the decisions for {len(names)} labels ({listed(names)}), not {value!r}",
            where=where,
        )
    return np.array([_number(number, path, row, where) for number in value])


def _number(value: Any, path: Path, row: int, where: str) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= MOST:
        raise InputError(f"{path}: row {row} counts {value!r}, which is no number of decisions", where=where)
    return number


def _class(value: Any, names: tuple[str, ...], path: Path, row: int, where: str) -> int:
    number = class_of(value, names)
    if number is None:
        raise InputError(
            f"{path}: row {row} has the label {str(value)!r}, which is no label of the task ({listed(names, value)})",
            where=where,
        )
    return number
