"""What a run.json holds: read in one place, where a missing field or a wrong type is told with the file's name."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kdcli.errors import InputError
from kdcli.files import fingerprint

HINT = "start the run again with --force"

CHECKSUM = "checksum"
"""The field with a hash over all others."""

Typed = TypeVar("Typed")


@dataclass(frozen=True)
class Hashes:
    """Of the data, and of the teacher's weights; None for a black box."""

    data: str
    teacher: str | None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The fields of every run.json, however far its run came.

    recipe, recipe_folder: None where the run ended before they were written. interrupted: its training was stopped
    once, so its seconds are not those of a whole training. files: what each finished folder of the run holds.
    """

    status: str = "unknown"
    recipe: dict[str, Any] | None = None
    recipe_folder: str | None = None
    interrupted: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: Hashes | None = None


def checksum(values: dict[str, Any]) -> str:
    """Return the hash over a record, but for the field that holds it."""
    return fingerprint({key: value for key, value in values.items() if key != CHECKSUM})


def read_document(file: Path) -> dict[str, Any]:
    """Return what a run.json says; empty when there is none. Raises InputError when it cannot be read or believed."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}", hint=HINT) from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is no record of a run", hint=HINT)
    if values.get(CHECKSUM, checksum(values)) != checksum(values):
        raise InputError(f"{file} was changed after kdcli wrote it (its checksum differs)", hint=HINT)
    return values


def typed(kind: type[Typed], document: dict[str, Any], file: Path, *, flat: str | None = None) -> Typed:
    """Return a document as the dataclass `kind`; fields that it does not name are left out.

    flat: a field of `kind` whose own fields stand among the others in the document.
    Raises InputError, naming the file and the field, for a field that is not there or of another type.
    """
    try:
        whole = {**document, flat: document} if flat is not None else document
        # As JSON, where a dictionary may stand for a dataclass; strictly, where a word is no number.
        return TypeAdapter(kind).validate_json(json.dumps(whole), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
        place = place.removeprefix(f"{flat}.")
        if problem["type"] == "missing":
            raise InputError(f"{file} has no field {place}", hint=HINT) from error
        raise InputError(f"{file}: {place}: {problem['msg']}", hint=HINT) from error
