"""A run.json that lost a field, or whose fields are of another type: told with file and field, never as a bug."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import World

LINES = ("hint: this is a bug", "Traceback")
READERS: dict[str, list[str]] = {
    "eval": ["eval", "runs/recipe", "--json"],
    "export": ["export", "runs/recipe", "--no-latency"],
    "resume": ["distill", "recipe.toml", "--resume"],
    "compare": ["compare", "recipe.toml", "--seeds", "1", "--output", "."],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of the runs that all tests of this file look at."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def done(world: World, finished: Path) -> Iterator[World]:
    """A finished run, and the same as the only run of a comparison; what a test does to them is undone after it."""
    place, whole = finished / "here", finished / "whole"
    if not whole.exists():
        shutil.copytree(world.folder, place)
    world.folder = place
    world.monkeypatch.chdir(place)
    if not whole.exists():
        world.model()
        assert world.call("distill", world.recipe()).code == 0
        assert world.call("compare", "recipe.toml", "--seeds", "1", "--output", ".").code == 0
        shutil.copytree(place, whole, symlinks=True)
    yield world
    shutil.rmtree(place)
    shutil.copytree(whole, place, symlinks=True)


def fields(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the paths of all fields, two deep."""
    found: list[tuple[str, ...]] = []
    for key, value in record.items():
        found.append((key,))
        if isinstance(value, dict) and key != "recipe":
            found += [(key, inner) for inner in value]
    return found


def changed(record: dict[str, Any], path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> str:
    copy = json.loads(json.dumps(record))
    # With it, the checksum alone would be what is told.
    copy.pop("checksum", None)
    table = copy
    for part in path[:-1]:
        table = table[part]
    change(table, path[-1])
    return json.dumps(copy)


def lose(table: dict[str, Any], key: str) -> None:
    del table[key]


def spoil(table: dict[str, Any], key: str) -> None:
    table[key] = 7 if not isinstance(table[key], int | float) else "seven"


@pytest.mark.parametrize("change", [lose, spoil])
def test_a_field_that_is_lost_or_of_another_type_is_no_bug(change: Callable[[dict[str, Any], str], None], done: World):
    file = done.folder / "runs" / "recipe" / "run.json"
    record = json.loads(file.read_text())
    # What is read of a finished run; one that is not known to be finished would be trained again.
    read = ("primary", "teacher", "student", "seconds", "task", "hashes", "training")
    told = 0
    for path in [path for path in fields(record) if path[0] in read]:
        file.write_text(changed(record, path, change))
        outcome = done.call(*READERS["resume"])
        assert outcome.code in (0, 2), (path, outcome.err)
        assert not [line for line in LINES if line in outcome.err], (path, outcome.err)
        if outcome.code:
            assert "run.json" in outcome.err and path[-1] in outcome.err, (path, outcome.err)
        told += outcome.code != 0
    assert told >= 6
    file.write_text(json.dumps(record))
    assert done.call(*READERS["resume"]).code == 0


def test_compare_names_the_run_whose_record_is_broken(done: World):
    file = done.folder / "runs" / "own-recipe-seed42" / "run.json"
    record = json.loads(file.read_text())
    for path, change in [(("student", "parameters"), lose), (("training",), spoil), (("seconds", "train"), spoil)]:
        file.write_text(changed(record, path, change))
        outcome = done.call(*READERS["compare"])
        assert outcome.code == 2 and "own-recipe-seed42" in outcome.err, (path, outcome.err)
        assert not [line for line in LINES if line in outcome.err], (path, outcome.err)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("recipe",), "run.json has no field recipe"),
        (("recipe_folder",), "run.json has no field recipe_folder"),
    ],
)
def test_eval_and_export_name_a_field_that_is_lost(path: tuple[str, ...], words: str, done: World):
    file = done.folder / "runs" / "recipe" / "run.json"
    file.write_text(changed(json.loads(file.read_text()), path, lose))
    for reader in ("eval", "export"):
        outcome = done.call(*READERS[reader])
        assert outcome.code == 2 and words in outcome.err, outcome.err


def test_a_record_that_cannot_be_read_is_named(done: World):
    file = done.folder / "runs" / "recipe" / "run.json"
    whole = file.read_bytes()
    for content in (b"", b"\xff\xfe\x00", b"{", b"[" * 100_000, whole[: len(whole) // 2], b"null"):
        file.write_bytes(content)
        for reader in ("eval", "resume"):
            outcome = done.call(*READERS[reader])
            assert outcome.code == 2 and "run.json" in outcome.err, outcome.err
            assert not [line for line in LINES if line in outcome.err]
    # It is still known as a run of ours.
    shutil.copytree(done.folder / "runs" / "recipe", done.folder / "copy")
    assert done.call("distill", "recipe.toml", "--force").code == 0
    assert Path("copy/kdcli.json").is_file()
