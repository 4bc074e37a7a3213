"""Sets of instructions with responses: those of the data folder, and those that recipes name."""

import os
from functools import partial
from pathlib import Path

from kdcli.data.columns import Columns
from kdcli.data.sets import VALIDATION, NamedSet, read_set

SPLITS = ("train", "validation", "test")


def read_folder(name: str) -> dict[str, Columns] | None:
    """Return the splits in the folder instruct/NAME of the data folder (KDCLI_DATA_DIR); None where there is none."""
    from kdcli.data.files import read_file

    root = os.environ.get("KDCLI_DATA_DIR")
    folder = Path(root) / "instruct" / name if root is not None else None
    if folder is None or not (folder / "train.parquet").is_file():
        return None
    paths = {split: folder / f"{split}.parquet" for split in SPLITS}
    return {split: read_file(path, "KDCLI_DATA_DIR") for split, path in paths.items() if path.is_file()}


def _row(name: str, hub: str, source: str, **columns: str) -> NamedSet:
    read = partial(read_set, name, f"instruct/{name}", hub, None, VALIDATION)
    return NamedSet(name, "instruct", columns, ("rouge_l", "exact_match", "perplexity"), source, read)


INSTRUCTIONS = {
    row.name: row
    for row in (
        _row("dolly", "databricks/databricks-dolly-15k", "databricks-dolly-15k"),
        _row("alpaca", "tatsu-lab/alpaca", "Stanford Alpaca", context="input", response="output"),
    )
}
"""Sets whose hub has training rows alone: a part of them is held out."""
