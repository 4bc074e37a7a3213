"""The sets of rows that a recipe names, whose columns and labels are known."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.data.columns import Columns
from kdcli.errors import InputError

VALIDATION = {"validation": "validation"}
"""The name of a set in reports, and its name in the data."""


@dataclass(frozen=True)
class NamedSet:
    """A set that a recipe names. read(seed) returns its splits: "train", and each that is reported by its name there.

    kind: the name of its kind of task. fields: that kind's fields, as a recipe would give them for such data.
    """

    name: str
    kind: str
    fields: Mapping[str, Any]
    metrics: tuple[str, ...]
    source: str
    read: Callable[[int], dict[str, Columns]]


def named_sets() -> dict[str, NamedSet]:
    """Return all sets by their names."""
    from kdcli.data.glue import GLUE
    from kdcli.data.instructions import INSTRUCTIONS
    from kdcli.data.reviews import REVIEWS
    from kdcli.data.shapes import SHAPES
    from kdcli.data.squad import SQUAD

    return {**GLUE, **SQUAD, **INSTRUCTIONS, REVIEWS.name: REVIEWS, SHAPES.name: SHAPES}


def read_set(
    name: str, folder: str, hub: str, config: str | None, report: Mapping[str, str], seed: int
) -> dict[str, Columns]:
    """Return a set's splits from a folder of the data folder (KDCLI_DATA_DIR), or else from the hub.

    report: the sets that are reported, by their names in reports, and their names in the data.
    Raises InputError where neither has them.
    """
    from kdcli.data.files import read_file, read_hub

    wanted = {"train": "train", **report}
    found: dict[str, Columns] = {}
    root = os.environ.get("KDCLI_DATA_DIR")
    if root is not None:
        for split in wanted.values():
            path = Path(root) / folder / f"{split}.parquet"
            if path.is_file():
                found[split] = read_file(path, "KDCLI_DATA_DIR")
    if "train" not in found or not any(split in found for split in report.values()):
        try:
            found = {**read_hub(hub, config, "task.name"), **found}
        except InputError as error:
            missing = [f"{split}.parquet" for split in wanted.values() if split not in found]
            place = f"{root}/{folder}" if root else "KDCLI_DATA_DIR (not set)"
            raise InputError(
                f"task {name}: {', '.join(missing)} not found in {place}, and the hub's {hub} cannot be reached",
                where="task.name",
                hint=error.message,
            ) from error
    return {target: found[split] for target, split in wanted.items() if split in found}
