"""Where the replies of `kdcli predict` go: lines on stdout, or a file; written as they come, in their order."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kdcli.errors import InputError, RunError, cut
from kdcli.faults import unwritable
from kdcli.files import atomic_file
from kdcli.terminal import forget, json_for, visible
from kdcli.words import counted, one

if TYPE_CHECKING:
    from kdcli.tasks.kind import TaskKind


@dataclass(frozen=True)
class Row:
    """An example and what is said to it. beside: a second model's reply, if there is one."""

    kind: "TaskKind"
    inputs: dict[str, Any]
    reply: dict[str, Any]
    beside: dict[str, Any] | None = None

    @property
    def comparison(self) -> dict[str, Any]:
        """How both replies compare; nothing where there is one."""
        return self.kind.beside(self.reply, self.beside) if self.beside is not None else {}

    def document(self, *, echo: bool) -> dict[str, Any]:
        """Return the row for a file or a program. echo: with its inputs."""
        second = {"beside": self.beside, **self.comparison} if self.beside is not None else {}
        return {**(self.inputs if echo else {}), **self.reply, **second}

    def lines(self) -> Iterator[str]:
        """Yield the row for people: a line, and one for each of the best answers, if they are asked for.

        Texts that a model wrote have lines of their own, below what they answer.
        """
        if self.kind.generates:
            yield f"> {self._shown_inputs}{' (cut: it is too long for the model)' if self.reply['cut'] else ''}"
            yield from self.kind.show(self.reply).splitlines() or ["(nothing)"]
            if self.beside is not None:
                yield f"beside ({self._told}):"
                yield from self.kind.show(self.beside).splitlines() or ["(nothing)"]
            yield ""
            return
        words = self.kind.show(self.reply)
        if self.beside is not None:
            words += f" (beside: {self.kind.show(self.beside)}; {self._told})"
        yield f"{words}  {self._shown_inputs}"
        for entry in self.reply.get("top", ()):
            yield f"    {self.kind.show_entry(entry)}"

    @property
    def _told(self) -> str:
        return ", ".join(f"{name}: {_words(value)}" for name, value in self.comparison.items())

    @property
    def _shown_inputs(self) -> str:
        inputs = " | ".join(
            " ".join(map(_shown, value)) if isinstance(value, list) else str(value)
            for value in self.inputs.values()
            if value is not None
        )
        return cut(" ".join(inputs.split()))


def _shown(value: Any) -> str:
    return f"{value['role']}: {value['content']}" if isinstance(value, dict) else str(value)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@dataclass
class Agreement:
    """How the replies of two models compare, over all rows."""

    values: dict[str, list[float]] = field(default_factory=dict)
    yes_or_no: set[str] = field(default_factory=set)

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in row.comparison.items():
                if value is None:
                    continue
                self.values.setdefault(name, []).append(float(value))
                if isinstance(value, bool):
                    self.yes_or_no.add(name)

    def told(self) -> Iterator[str]:
        """Yield a line for each thing that is compared."""
        for name, values in self.values.items():
            if name in self.yes_or_no:
                yield f"{name}: {sum(values):,.0f} of {counted(len(values), 'row')} ({sum(values) / len(values):.1%})"
            else:
                mean = sum(values) / len(values)
                yield f"{name}: mean {mean:.3f}, from {min(values):.3f} to {max(values):.3f}"


Write = Callable[[list[Row]], None]

FORMS = (".jsonl", ".csv", ".npy")


def check_output(path: Path, source: Path | None, *, force: bool) -> None:
    """Raise InputError where replies cannot be written to a file, or may not. source: the file that is read."""
    if path.suffix not in FORMS:
        raise InputError(f"{path.name} is none of {', '.join(FORMS)}", where="--output")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise InputError(f"{path} is what is read", where="--output", hint="give another FILE")
    if path.is_dir() or (path.exists() and not force):
        raise InputError(
            f"{path} exists already", where="--output", hint="give another FILE, or --force to replace a file"
        )


@contextlib.contextmanager
def output_file(path: Path, kind: "TaskKind", *, echo: bool, beside: bool) -> Iterator[Write]:
    """Yield the function that adds rows to a file, which appears whole at the end.

    echo: with their inputs. beside: whether there is a second model. Raises InputError where the file cannot hold them.
    """
    if path.suffix == ".npy" and (kind.vector is None or echo or beside):
        said = f"vectors, and {one(kind.name)} model gives none" if kind.vector is None else "vectors alone"
        raise InputError(f"{path.name} takes {said}", where="--output", hint="write a .jsonl file")
    try:
        with atomic_file(path) as new:
            if path.suffix == ".npy":
                with new.open("wb") as file:
                    yield _vectors(file, kind.vector or "")
            else:
                with new.open("w", encoding="utf-8", newline="") as text:
                    add = _table(text) if path.suffix == ".csv" else _lines(text)
                    yield lambda rows: add([row.document(echo=echo) for row in rows])
    except PermissionError as error:
        raise unwritable(path.parent, error) from error


def _lines(file: IO[str]) -> Callable[[list[dict[str, Any]]], None]:
    return lambda documents: file.writelines(f"{_json(document)}\n" for document in documents)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    return value.tolist()


def _table(file: IO[str]) -> Callable[[list[dict[str, Any]]], None]:
    writer = csv.writer(file, lineterminator="\n")
    names: list[str] = []

    def write(documents: list[dict[str, Any]]) -> None:
        for document in documents:
            row = dict(_flat(document))
            if not names:
                names.extend(row)
                writer.writerow(names)
            writer.writerow(row.values())

    return write


def _flat(document: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        elif isinstance(value, str | int | float | None):
            yield f"{before}{name}", value
        else:
            raise InputError(
                f"the cells of a .csv file take no lists, and {before}{name} is one",
                where="--output",
                hint="write a .jsonl file",
            )


def _vectors(file: IO[bytes], name: str) -> Write:
    """Return the function that adds vectors, fp32, behind a header that has room for any number of them."""
    import numpy as np

    count = 0

    def write(rows: list[Row]) -> None:
        nonlocal count
        table: np.ndarray = np.stack([row.reply[name] for row in rows]).astype("<f4")
        count += len(table)
        if count == len(table):
            _write_header(file, 0, table.shape[1])
        file.write(table.tobytes())
        place = file.tell()
        file.seek(0)
        _write_header(file, count, table.shape[1])
        file.seek(place)

    return write


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    from numpy.lib import format as npy

    # As long for every number of rows: it leaves room for the growth of the first axis.
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


class _Stdout(Exception):
    """Writing to stdout failed, not what else is done meanwhile."""


@contextlib.contextmanager
def stdout_lines(*, as_json: bool, echo: bool) -> Iterator[Write]:
    """Yield the function that prints rows, as JSON lines or for people, and lets them go to the reader at once.

    echo: JSON has the inputs, too. Where the reader has gone (`| head`), the block ends. Raises RunError when stdout
    is closed or full.
    """

    def write(rows: list[Row]) -> None:
        try:
            if sys.stdout is None:
                raise OSError("it is closed")
            encoding = sys.stdout.encoding or "utf-8"
            for row in rows:
                if as_json:
                    print(json_for(_json(row.document(echo=echo)), encoding))
                else:
                    print(*(visible(line, encoding) for line in row.lines()), sep="\n")
            sys.stdout.flush()
        except OSError as error:
            raise _Stdout from error

    try:
        yield write
    except _Stdout as failed:
        error = failed.__cause__
        assert isinstance(error, OSError)
        forget(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise RunError(
                f"the result cannot be written to stdout: {error.strerror or error}",
                hint="run the command again with --output FILE",
            ) from error
