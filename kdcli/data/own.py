"""The splits of a user's own data: one table, files of train, validation and test rows, or a set of the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.data.columns import Columns
from kdcli.data.files import read_file, read_hub
from kdcli.data.sets import named_sets
from kdcli.errors import InputError
from kdcli.files import expanded
from kdcli.words import one

if TYPE_CHECKING:
    from kdcli.recipe.schema import TaskSection

TEST = "test"


def placed_at(path: str, base: Path, where: str) -> Path:
    """Return a recipe's path as seen from anywhere. base: the folder that relative ones start from."""
    given = expanded(path, where)
    return given if given.is_absolute() else base / given


def read_splits(section: "TaskSection", base: Path, notes: list[str]) -> tuple[dict[str, Columns], str]:
    """Return the splits "train" and, as far as they are given, "validation" and "test", and where they come from.

    Of several test sets each is called by `name_of_test`.
    notes: takes what a user should know. Raises InputError for what cannot be read.
    """

    def read(path: str, where: str) -> Columns:
        place = placed_at(path, base, where)
        return read_file(place, where, delimiter=section.delimiter, encoding=section.encoding, notes=notes)

    if section.hub is not None:
        splits = read_hub(section.hub, section.hub_config, "task.hub")
        if "train" not in splits:
            raise InputError(f"{section.hub} has no split named train; it has {', '.join(splits)}", where="task.hub")
        return {name: splits[name] for name in ("train", "validation", "test") if name in splits}, section.hub
    if section.data is not None:
        return {"train": read(section.data, "task.data")}, section.data
    if section.train is None:
        if (known := named_sets().get(section.name)) is not None:
            raise InputError(
                f"{section.name} is {one(known.kind)} task, not {one(str(section.type))} task", where="task.type"
            )
        raise InputError(
            f"{section.name} is no set that kdcli knows, and there are no rows of your own",
            where="task.name",
            hint="own data: task.data, task.train or task.hub",
        )
    return {name: read(path, where) for name, (path, where) in files_of(section).items()}, section.train


def files_of(section: "TaskSection") -> dict[str, tuple[str, str]]:
    """Return the file of each split, and the field that names it."""
    given = {"train": section.train, "validation": section.validation}
    found = {name: (path, f"task.{name}") for name, path in given.items() if path is not None}
    tests = {"test": section.test} if isinstance(section.test, str) else {}
    found |= {name: (path, "task.test") for name, path in tests.items()}
    several = section.test if isinstance(section.test, dict) else {}
    return found | {name_of_test(name): (path, f"task.test.{name}") for name, path in several.items()}


def name_of_test(name: str) -> str:
    """Return what the split of one of several test sets is called."""
    return f"{TEST}/{name}"


def test_set_of(split: str) -> str | None:
    """Return what a test set is called in reports; None for a split that is none."""
    first, _, name = split.partition("/")
    return (name or TEST) if first == TEST else None
