"""Ways of asking a teacher of which nothing is known but its decisions: a text or an image in, one label out."""

import ast
import base64
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from datasets import Dataset

from kdcli.errors import InputError, cut
from kdcli.files import sha256_of_file
from kdcli.models.hashing import hash_of_model
from kdcli.models.processors import hash_of_processor
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.labels import class_of, listed
from kdcli.tasks.predict import predict
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHERE = "method.black_box"
TAIL = 5
"""Lines of a failed command's messages that are told."""


Questions = Mapping[str, list[Any]]
"""What a black box is shown, by the columns of rows: texts (one column, or two of pairs), or PNG files of images."""


class BlackBox(Protocol):
    """A black-box teacher: it returns labels only."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return what tells this black box from others, as far as that can be known: plain values."""
        ...

    def decide(self, questions: Questions) -> list[int]:
        """Return a class number for every question. Raises InputError when the answers are no classes."""
        ...


def read_answers(answers: Any, names: Sequence[str], expected: int, where: str, note: str = "") -> list[int]:
    """Return answers as class numbers. Raises InputError for a wrong number of them, or an unknown label."""
    if isinstance(answers, str | bytes) or not hasattr(answers, "__iter__"):
        raise InputError(f"answered with {type(answers).__name__}, not with a list of labels{note}", where=where)
    answers = list(answers)
    if len(answers) != expected:
        raise InputError(
            f"gave {counted(len(answers), 'answer')} to {counted(expected, 'question')}{note}", where=where
        )
    known: dict[str, int | None] = {}
    classes = []
    for answer in answers:
        key = f"{type(answer).__name__} {answer}"
        if key not in known:
            known[key] = class_of(answer, names)
        number = known[key]
        if number is None:
            raise InputError(
                f"answered {str(answer)!r}, which is no label of the task ({listed(names, answer)}){note}",
                where=where,
                hint=f"answer with these names, or with numbers from 0 to {len(names) - 1}",
            )
        classes.append(number)
    return classes


class LocalModel:
    """A model here, treated as if it were far away: its logits do not leave this class."""

    def __init__(
        self,
        kind: TaskKind,
        model: "PreTrainedModel",
        processor: Any,
        *,
        max_length: int,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        self.kind = kind
        self.model = model
        self.processor = processor
        self.max_length = max_length
        self.batch_size = batch_size
        self.device = device

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "model": hash_of_model(self.model),
            "tokenizer": hash_of_processor(self.processor),
            "max_length": self.max_length,
        }

    def decide(self, questions: Questions) -> list[int]:
        count = number_of(questions)
        rows = Dataset.from_dict({"index": list(range(count)), **questions, "label": [0] * count})
        answers = self.kind.answers(
            self.model,
            rows,
            self.processor,
            max_length=self.max_length,
            ask=predict,
            batch_size=self.batch_size,
            owner="the teacher",
            device=self.device,
        )
        # Of classes that are ranked the first.
        return [int(answer) for answer in np.asarray(answers).reshape(count, -1)[:, 0]]


def number_of(questions: Questions) -> int:
    """Return how many questions there are."""
    return len(next(iter(questions.values())))


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def find_callable(name: str, folder: Path) -> None:
    """Find the function `module:name` without running any of the user's code; modules are looked for in `folder` first.

    Raises InputError when the name has another form, or when there is no such module or nothing of that name in it.
    A module that is no Python source, or that makes its names as it goes, may have any.
    """
    where = f"{WHERE}.callable"
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise InputError(f'{cut(name)!r} names no function; write "module:function"', where=where)
    place = f"modules are looked for in {folder} and in the Python environment"
    source = None
    if module not in sys.modules:
        first, *others = module.split(".")
        with _importing_from(folder):
            importlib.invalidate_caches()
            found = sys.modules[first].__spec__ if first in sys.modules else importlib.util.find_spec(first)
        path = first
        for part in others:
            path = f"{path}.{part}"
            inside = found.submodule_search_locations if found is not None else None
            found = PathFinder.find_spec(path, inside) if inside is not None else None
        if found is None:
            raise InputError(f"cannot import {module!r}: there is no such module", where=where, hint=place)
        source = Path(found.origin) if found.origin is not None and found.origin.endswith(".py") else None
    if source is None:
        return
    try:
        names = names_in(ast.parse(source.read_bytes(), str(source)))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot import {module!r} ({type(error).__name__}: {error})", where=where, hint=place
        ) from error
    if names is not None and attribute.split(".")[0] not in names:
        raise InputError(f"{module} has no {attribute}", where=where)


def names_in(tree: ast.Module) -> set[str] | None:
    """Return the names that a module's source binds, in any block of it; None when only running it could tell."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    dynamic = {"*", "__getattr__", "globals", "setattr", "exec", "vars"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return None if dynamic & (names | used) else names


class PythonCallable:
    """A function `module:name` that gets a list of texts, of (text, text) pairs, or of Pillow's images (RGB, or L where
    models read one channel), and returns a list of labels.

    The module is looked for in `folder` first.
    """

    where = f"{WHERE}.callable"

    def __init__(self, name: str, names: Sequence[str], folder: Path) -> None:
        self.name = name
        self.names = names
        self.folder = folder
        find_callable(name, folder)
        module, _, attribute = name.partition(":")
        with _importing_from(folder):
            importlib.invalidate_caches()
            try:
                found: Any = importlib.import_module(module)
            except Exception as error:
                raise InputError(
                    f"cannot import {module!r} ({type(error).__name__}: {error})",
                    where=self.where,
                    hint=f"modules are looked for in {folder} and in the Python environment",
                ) from error
        self.source = inspect.getsourcefile(found) if hasattr(found, "__file__") else None
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise InputError(f"{module} has no {attribute}", where=self.where)
            found = getattr(found, part)
        if not callable(found):
            raise InputError(f"{name} is no function", where=self.where)
        self.function = found

    @property
    def identity(self) -> dict[str, Any]:
        source = Path(self.source) if self.source is not None else None
        content = sha256_of_file(source) if source is not None and source.is_file() else None
        return {"callable": self.name, "source": content}

    def decide(self, questions: Questions) -> list[int]:
        first, *others = ([_opened(value) for value in values] for values in questions.values())
        shown: list[Any] = list(zip(first, *others, strict=True)) if others else first
        with _importing_from(self.folder):
            try:
                answers = self.function(shown)
            except Exception as error:
                raise InputError(
                    f"{self.name} failed with {type(error).__name__}: {error}", where=self.where
                ) from error
        return read_answers(answers, self.names, len(first), self.where)


class Command:
    """A program that reads JSON lines and writes one label a line: {"text": ..., "text_pair": ...}, or of images
    {"image": ...} with a PNG file in base64.

    It runs in `folder`, once for every portion of questions, for at most `timeout` seconds. Raises InputError when
    there is no such program.
    """

    where = f"{WHERE}.command"

    def __init__(self, words: Sequence[str], names: Sequence[str], folder: Path, timeout: float = 600.0) -> None:
        self.words = list(words)
        self.names = names
        self.folder = folder
        self.timeout = timeout
        program = self.words[0]
        if shutil.which(program) is None and shutil.which(str(folder / program)) is None:
            raise InputError(
                f"cannot run {program!r}: there is no such program",
                where=self.where,
                hint=f"programs are looked for on the PATH and, by their path, from {folder}",
            )

    @property
    def identity(self) -> dict[str, Any]:
        files = {word: self.folder / word for word in self.words}
        contents = {word: sha256_of_file(path) for word, path in files.items() if path.is_file()}
        return {"command": self.words, "files": contents}

    def decide(self, questions: Questions) -> list[int]:
        columns = [[_written(value) for value in values] for values in questions.values()]
        rows = [dict(zip(questions, row, strict=True)) for row in zip(*columns, strict=True)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            result = subprocess.run(
                self.words,
                input=lines.encode("ascii"),
                capture_output=True,
                cwd=self.folder,
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"{self.words[0]} did not answer {counted(len(rows), 'question')} within {self.timeout:g} seconds"
                + _tail(error.stderr),
                where=self.where,
                hint="raise method.black_box.timeout, or lower method.black_box.queries_per_call",
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot run {self.words[0]!r}: {reason}", where=self.where) from error
        if result.returncode != 0:
            raise InputError(
                f"{self.words[0]} ended with exit code {result.returncode}{_tail(result.stderr)}", where=self.where
            )
        answers = result.stdout.decode(errors="replace").strip().split("\n") if result.stdout.strip() else []
        return read_answers(answers, self.names, len(rows), self.where, _tail(result.stderr))


def _opened(value: Any) -> Any:
    """Return a question as a function gets it: a text, or of an image in memory Pillow's."""
    if not isinstance(value, Mapping):
        return value
    from PIL import Image

    return Image.open(io.BytesIO(value["bytes"]))


def _written(value: Any) -> str:
    """Return a question as it stands in JSON."""
    return base64.b64encode(value["bytes"]).decode("ascii") if isinstance(value, Mapping) else value


def _tail(stderr: bytes | None) -> str:
    lines = (stderr or b"").decode(errors="replace").strip().splitlines()[-TAIL:]
    return "; it said:\n  " + "\n  ".join(lines) if lines else ""
