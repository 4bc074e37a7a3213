"""Plain text: the documents of files, folders and hub sets."""

import os
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.data import files
from kdcli.data.columns import Columns, need_column
from kdcli.data.own import placed_at
from kdcli.errors import InputError

if TYPE_CHECKING:
    from kdcli.recipe.schema import TaskSection


PLAIN = ".txt"


SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev", "test")}
"""Split names, the first that is there counts."""


def read_documents(
    section: "TaskSection", column: str, base: Path, notes: list[str]
) -> tuple[dict[str, list[str]], str]:
    """Return the documents of "train" and, if there are any, of "validation", and where they come from.

    Reads, in this order: a hub set, `task.train` and `task.validation`, `task.data` (a file or a folder of .txt or
    table files), or the folder lm/NAME of the data folder. In a folder, files whose names begin with a split's name
    are that split; else all of them are "train". column: of tables. notes: takes what a user should know.
    Raises InputError when there is no text.
    """
    if section.hub is not None:
        splits = files.read_hub(section.hub, section.hub_config, "task.hub")
        named = {
            target: next((splits[name] for name in names if name in splits), None) for target, names in SPLITS.items()
        }
        if named["train"] is None:
            raise InputError(f"{section.hub} has no split named train; it has {', '.join(splits)}", where="task.hub")
        found = {name: _texts(columns, column, section.hub) for name, columns in named.items() if columns is not None}
        return found, section.hub
    if section.train is not None:
        found = {
            "train": read_texts(placed_at(section.train, base, "task.train"), section, column, "task.train", notes)
        }
        if section.validation is not None:
            found["validation"] = read_texts(
                placed_at(section.validation, base, "task.validation"), section, column, "task.validation", notes
            )
        return found, section.train
    if section.data is not None:
        path, where, source = placed_at(section.data, base, "task.data"), "task.data", section.data
    elif (folder := corpus_folder(section.name)) is not None:
        path, where, source = folder, "task.name", f"lm/{section.name}"
    else:
        raise InputError(
            f"{section.type or 'text'} task {section.name!r}: there is no text",
            where="task",
            hint="give task.data (a file or a folder of .txt files), task.train or task.hub",
        )
    if path.is_dir():
        return _read_folder(path, section, column, where, notes), source
    return {"train": read_texts(path, section, column, where, notes)}, source


def corpus_folder(name: str) -> Path | None:
    """Return the folder lm/NAME of the data folder, where it is there."""
    root = os.environ.get("KDCLI_DATA_DIR")
    folder = Path(root) / "lm" / name if root is not None else None
    return folder if folder is not None and folder.is_dir() else None


def _read_folder(
    folder: Path, section: "TaskSection", column: str, where: str, notes: list[str]
) -> dict[str, list[str]]:
    readable = (PLAIN, *files.READABLE)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in readable)
    if not paths:
        raise InputError(f"{folder} holds none of {', '.join(readable)}", where=where)
    found: dict[str, list[str]] = {}
    for target, names in SPLITS.items():
        for name in names:
            own = [p for p in paths if p.stem == name or p.stem.startswith((f"{name}-", f"{name}.", f"{name}_"))]
            if own and target not in found:
                found[target] = [text for path in own for text in read_texts(path, section, column, where, notes)]
    if "train" not in found:
        found = {"train": [text for path in paths for text in read_texts(path, section, column, where, notes)]}
    return found


def read_texts(path: Path, section: "TaskSection", column: str, where: str, notes: list[str]) -> list[str]:
    """Return the documents of a file: a .txt file is one, of a table each row is. where: the field that names it."""
    if path.suffix.lower() != PLAIN:
        columns = files.read_file(
            path, where, beside=(PLAIN,), delimiter=section.delimiter, encoding=section.encoding, notes=notes
        )
        return _texts(columns, column, str(path))
    files.check_exists(path, where)
    try:
        with files.open_text(path, section.encoding) as file:
            text = file.read()
    except UnicodeError as error:
        raise files.undecodable(path, "text", section.encoding, where) from error
    except OSError as error:
        raise InputError(f"{path} is not readable: {error.strerror}", where=where) from error
    return [text] if text.strip() else []


def _texts(columns: Columns, column: str, source: str) -> list[str]:
    values = need_column(columns, column, "text", source)
    return [str(value) for value in values if value is not None and str(value).strip()]


def hold_out(documents: list[str], fraction: float, seed: int) -> dict[str, list[str]]:
    """Return a seeded split of documents; fewer than 20 are cut into their paragraphs first.

    Raises InputError when there is too little to split.
    """
    if len(documents) < 20:
        documents = [part for text in documents for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(documents) < 2:
        raise InputError(
            "the text is one single paragraph: nothing of it can be held out",
            where="task",
            hint="give a validation file, or paragraphs with empty lines between them",
        )
    size = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    held = set(random.Random(f"text-{seed}").sample(range(len(documents)), size))
    return {
        "train": [text for i, text in enumerate(documents) if i not in held],
        "validation": [text for i, text in enumerate(documents) if i in held],
    }
