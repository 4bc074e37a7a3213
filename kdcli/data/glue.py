"""The nine GLUE tasks: columns, labels, metrics and sets, as the hub's `nyu-mll/glue` has them."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from kdcli.data.columns import Columns
from kdcli.data.sets import NamedSet
from kdcli.errors import InputError

HUB = "nyu-mll/glue"

VALIDATION = {"validation": "validation"}
"""The name of a set in reports, and its name in the data."""


def _read(name: str, report: Mapping[str, str], seed: int) -> dict[str, Columns]:
    """Return a task's splits from the folder glue/NAME of the data folder, or else from the hub."""
    from kdcli.data.files import read_file, read_hub

    wanted = {"train": "train", **report}
    found: dict[str, Columns] = {}
    root = os.environ.get("KDCLI_DATA_DIR")
    if root is not None:
        for split in wanted.values():
            path = Path(root) / "glue" / name / f"{split}.parquet"
            if path.is_file():
                found[split] = read_file(path, "KDCLI_DATA_DIR")
    if "train" not in found or not any(split in found for split in report.values()):
        try:
            found = {**read_hub(HUB, name, "task.name"), **found}
        except InputError as error:
            missing = [f"{split}.parquet" for split in wanted.values() if split not in found]
            place = f"{root}/glue/{name}" if root else "KDCLI_DATA_DIR (not set)"
            raise InputError(
                f"task {name}: {', '.join(missing)} not found in {place}, and the hub's {HUB} cannot be reached",
                where="task.name",
                hint=error.message,
            ) from error
    return {target: found[split] for target, split in wanted.items() if split in found}


def _row(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    report: Mapping[str, str] = VALIDATION,
) -> NamedSet:
    kind = "classification" if labels else "regression"
    fields = {"text": list(columns), **({"labels": list(labels)} if labels else {})}
    return NamedSet(name, kind, fields, metrics, f"GLUE {name}", partial(_read, name, report))


_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_MNLI = {"matched": "validation_matched", "mismatched": "validation_mismatched"}

GLUE = {
    row.name: row
    for row in (
        _row("cola", ("sentence",), ("unacceptable", "acceptable"), ("mcc",)),
        _row("sst2", ("sentence",), ("negative", "positive")),
        _row("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        _row("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        _row("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        _row("mnli", ("premise", "hypothesis"), _NLI, report=_MNLI),
        _row("qnli", ("question", "sentence"), _ENTAILMENT),
        _row("rte", ("sentence1", "sentence2"), _ENTAILMENT),
        _row("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
    )
}
