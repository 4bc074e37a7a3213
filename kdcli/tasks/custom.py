"""A user's own data: files or a hub set, one or two text columns, a label column."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kdcli.errors import InputError
from kdcli.recipe.schema import TaskSection

Columns = dict[str, list[Any]]
READABLE = {".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON lines", ".json": "JSON", ".parquet": "Parquet"}


def read_file(path: Path, where: str) -> Columns:
    """Return the columns of a CSV, TSV, JSON(L) or Parquet file. Raises InputError when it cannot be read."""
    if not path.is_file():
        raise InputError(f"no file at {path}", where=where, hint="relative paths start at the recipe's folder")
    kind = READABLE.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"{path.name} is none of {', '.join(sorted(READABLE))}", where=where, hint="rename or convert it"
        )
    try:
        columns = _read(path, kind)
    except InputError:
        raise
    except (pa.ArrowException, ValueError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as {kind}: {str(error).splitlines()[0]}", where=where) from error
    if not columns or not len(next(iter(columns.values()))):
        raise InputError(f"{path} has no rows", where=where)
    return columns


def _read(path: Path, kind: str) -> Columns:
    if kind == "Parquet":
        return pyarrow.parquet.read_table(path).to_pydict()
    if kind in ("CSV", "TSV"):
        if path.stat().st_size == 0:
            return {}
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t" if kind == "TSV" else ",", newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=False),
        )
        return table.to_pydict()
    text = path.read_text(encoding="utf-8")
    if kind == "JSON":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise InputError(f"{path} must hold a JSON array of objects, or be named .jsonl with one a line")
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{path}:{number} is not valid JSON: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"every row of {path} must be a JSON object")
    names = list(dict.fromkeys(key for row in rows for key in row))
    return {name: [row.get(name) for row in rows] for name in names}


def read_hub(name: str, config: str | None, where: str) -> dict[str, Columns]:
    """Return every split of a hub set. Raises InputError when it cannot be fetched."""
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, config)
    except Exception as error:
        raise InputError(
            f"cannot load the data set {name!r} ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
            where=where,
            hint="check the name and the network; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN work as everywhere",
        ) from error
    return {split: loaded[split].to_dict() for split in loaded}


def need_column(columns: Columns, name: str, what: str, source: str) -> list[Any]:
    """Return a column. Raises InputError that lists what is there when it is missing."""
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        raise InputError(
            f"{source} has no {what} column {name!r}; it has {', '.join(map(repr, columns))}",
            where=f"task.{what}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    return columns[name]


def infer_kind(labels: list[Any], section: TaskSection) -> str:
    """Return "regression" for labels with fractions, else "classification"; `task.type` decides when given."""
    if section.type is not None:
        return section.type
    fractional = [v for v in labels if isinstance(v, float) and not float(v).is_integer()]
    return "regression" if fractional else "classification"


def clean_rows(columns: Columns, section: TaskSection, kind: str, source: str) -> Columns:
    """Return text, [text_pair] and raw label of every row. Raises InputError for holes and wrong types."""
    names = [section.text] if isinstance(section.text, str) else list(section.text or [])
    rows: Columns = {}
    for target, name in zip(("text", "text_pair"), names, strict=False):
        values = need_column(columns, name, "text", source)
        empty = [i for i, value in enumerate(values) if value is None]
        if empty:
            raise InputError(f"{source}: row {empty[0] + 1} has no {name!r}", where="task.text")
        rows[target] = [str(value) for value in values]
    label = section.label or "label"
    values = need_column(columns, label, "label", source)
    holes = [i for i, v in enumerate(values) if v is None or v == "" or (isinstance(v, float) and math.isnan(v))]
    if holes:
        raise InputError(
            f"{source}: {len(holes)} rows have no label, the first is row {holes[0] + 1}",
            where="task.label",
            hint="remove or label them",
        )
    if kind == "regression":
        try:
            rows["label"] = [float(value) for value in values]
        except (TypeError, ValueError):
            wrong = next(v for v in values if not isinstance(v, int | float))
            raise InputError(
                f'{source}: label {wrong!r} is no number, but task.type is "regression"', where="task.label"
            ) from None
    else:
        rows["label"] = [_class_name(value) for value in values]
    return rows


def _class_name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def class_names(rows: Columns, section: TaskSection, source: str) -> tuple[str, ...]:
    """Return the classes in order: as given in `task.labels`, else sorted (numbers as numbers).

    Raises InputError when there is only one, or when a label is not among those given.
    """
    present = set(rows["label"])
    if section.labels is not None:
        strange = sorted(present - set(section.labels))
        if strange:
            raise InputError(
                f"{source} has the label {strange[0]!r}, which is not in task.labels ({', '.join(section.labels)})",
                where="task.labels",
            )
        names = list(section.labels)
    else:
        numeric = all(name.lstrip("-").isdigit() for name in present)
        names = sorted(present, key=int) if numeric else sorted(present)
    if len(present) < 2:
        raise InputError(
            f"{source} has one class only ({next(iter(present))!r}): there is nothing to learn",
            where="task.label",
        )
    return tuple(names)


def to_ids(rows: Columns, names: tuple[str, ...], source: str) -> None:
    """Replace class names by numbers, in place. Raises InputError for a class that training does not have."""
    place = {name: i for i, name in enumerate(names)}
    strange = sorted(set(rows["label"]) - set(place))
    if strange:
        raise InputError(
            f"{source} has the label {strange[0]!r}, which the training data does not have ({', '.join(names)})",
            where="task.label",
        )
    rows["label"] = [place[name] for name in rows["label"]]
