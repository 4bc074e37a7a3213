"""Code that a recipe names: a dry run finds it without running any, a run imports it before its first work."""

from pathlib import Path

import pytest
from conftest import World

LOUD = "from pathlib import Path\nPath('was_run').touch()\n"


def asking(world: World, name: str) -> str:
    """Write a recipe whose black box is the function of that name, and return its path."""
    world.model()
    return world.recipe(
        method={"name": "dbkd", "copies": 2, "black_box": {"callable": name}},
        teacher={"model": "teacher"},
    )


@pytest.mark.parametrize(
    "name", ["box:decide", "box:Box.decide", "box:late", "pack.inner:decide", "pack.deeper.inner:decide", "open:any"]
)
def test_a_dry_run_finds_a_function_and_runs_no_code(world: World, name: str) -> None:
    body = LOUD + "def decide(texts): return ['no'] * len(texts)\nclass Box: decide = decide\nif True: late = decide\n"
    world.write("box.py", body)
    for package in ("pack", "pack/deeper"):
        world.write(f"{package}/__init__.py", LOUD)
        world.write(f"{package}/inner.py", body)
    world.write("open.py", LOUD + "def __getattr__(name): return lambda texts: []\n")
    outcome = world.call("distill", asking(world, name), "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert not Path("was_run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("box", "names no function"),
        ("box:", "names no function"),
        ("box:a b", "names no function"),
        ("x" * 3000 + ":f", "there is no such module"),
        ("none_of_that_name:decide", "there is no such module"),
        ("box.inner:decide", "there is no such module"),
        ("box:decode", "box has no decode"),
        ("torn:decide", "SyntaxError"),
    ],
)
def test_a_dry_run_refuses_what_is_no_function(world: World, name: str, words: str) -> None:
    world.write("box.py", LOUD + "def decide(texts): return ['no'] * len(texts)\n")
    world.write("torn.py", LOUD + "def decide(:\n")
    outcome = world.call("distill", asking(world, name), "--dry-run")
    assert outcome.code == 2 and words in outcome.err
    assert "method.black_box.callable" in outcome.err
    assert not Path("was_run").exists()


def test_a_run_imports_the_code_before_anything_is_written(world: World) -> None:
    world.write("fails_early.py", LOUD + "def decide(texts): return []\nraise RuntimeError('no licence')\n")
    outcome = world.call("distill", asking(world, "fails_early:decide"))
    assert outcome.code == 2 and "cannot import 'fails_early' (RuntimeError: no licence)" in outcome.err
    assert Path("was_run").exists() and not Path("runs/recipe").exists()
