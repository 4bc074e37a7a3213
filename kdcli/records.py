"""What a run.json holds: read in one place, where a missing field or a wrong type is told with the file's name."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kdcli.errors import InputError
from kdcli.files import fingerprint

HINT = "start the run again with --force"

CHECKSUM = "checksum"
"""The field with a hash over all others."""


def checksum(values: dict[str, Any]) -> str:
    """Return the hash over a record, but for the field that holds it."""
    return fingerprint({key: value for key, value in values.items() if key != CHECKSUM})


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Side(_Part):
    score: float | None = None
    metrics: dict[str, dict[str, float | None]] = {}
    parameters: int = 0
    megabytes: float = 0.0


class _Task(_Part):
    name: str = ""
    kind: str = ""
    primary: str = ""
    sizes: dict[str, int] = {}


class _Loss(_Part):
    before: float | None = None
    after: float | None = None


class _Scores(_Part):
    task: str = ""
    metric: str = ""
    scores: dict[str, list[float]] = {}
    metrics: dict[str, list[dict[str, dict[str, float]]]] = {}


class _Run(_Part):
    """The types of the fields, where they are there: a run fills them in one after the other."""

    name: str = ""
    status: str = ""
    recipe: dict[str, Any] = {}
    recipe_folder: str = ""
    seed: int = 0
    versions: dict[str, str | None] = {}
    task: _Task = _Task()
    primary: str = ""
    teacher: _Side | None = None
    student: _Side = _Side()
    teacher_path: str | None = None
    loss: _Loss = _Loss()
    finetune: list[_Scores] = []
    training: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    hashes: dict[str, str | None] = {}
    overparam: dict[str, Any] | None = None
    export: dict[str, Any] | None = None


class Record(dict[str, Any]):
    """A part of a record. Raises InputError, naming the file and the field, for a field that is not there."""

    def __init__(self, values: dict[str, Any], file: Path, place: str = "") -> None:
        super().__init__({key: _part(value, file, f"{place}{key}") for key, value in values.items()})
        self.file = file
        self.place = place

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.file} has no field {self.place}{key}", hint=HINT)


def _part(value: Any, file: Path, place: str) -> Any:
    if isinstance(value, dict):
        return Record(value, file, f"{place}.")
    if isinstance(value, list):
        return [_part(inner, file, f"{place}[{number}]") for number, inner in enumerate(value)]
    return value


def read_record(file: Path) -> Record:
    """Return what a run.json says; empty when there is none. Raises InputError when it cannot be read or believed."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return Record({}, file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON: {error}", hint=HINT) from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is no record of a run", hint=HINT)
    try:
        _Run.model_validate(values)
    except ValidationError as error:
        from kdcli.recipe.problems import problems_of

        problem = problems_of(_Run, error)[0]
        raise InputError(f"{file}: {problem.name}: {problem.message}", hint=HINT) from error
    if values.get(CHECKSUM, checksum(values)) != checksum(values):
        raise InputError(f"{file} was changed after kdcli wrote it (its checksum differs)", hint=HINT)
    return Record(values, file)
