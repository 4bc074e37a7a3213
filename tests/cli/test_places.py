"""Homes that are not known, places that cannot be, and caches with what no cache holds: words in place of "a bug"."""

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import World

from kdcli.cli.app import run

SCORE = ("--data", "rows.csv", "--text", "text")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know, as in many containers."""

    def unknown(_: object) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "KDCLI_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_cache_must_be_named(world: World):
    world.model()
    outcome = world.call("distill", world.recipe())
    assert outcome.code == 2 and "KDCLI_CACHE or HOME" in outcome.err and not Path("runs/recipe").exists()
    world.monkeypatch.setenv("KDCLI_CACHE", str(world.folder / "cache"))
    for options in ([], ["--force"]):
        outcome = world.call("distill", "recipe.toml", *options)
        assert outcome.code == 0, outcome.err


UNKNOWN = "~nosuchuser/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", UNKNOWN, *SCORE],
        ["eval", "teacher", "--data", UNKNOWN, "--text", "text"],
        ["distill", "recipe.toml", "--output", UNKNOWN],
        *(
            ["distill", "recipe.toml", "--dry-run", "--set", f"{field}={UNKNOWN}"]
            for field in ("output", "teacher.model", "task.data")
        ),
        ["compare", "recipe.toml", "--output", UNKNOWN, "--dry-run"],
        ["overparam", "teacher", "--out", UNKNOWN],
        ["contract", UNKNOWN, "--out", "plain"],
        ["convert", "teacher", "--out", UNKNOWN],
        ["export", "teacher", "--out", UNKNOWN, "--no-latency"],
        ["export", "teacher", "--out", "served", "--teacher", UNKNOWN],
    ],
    ids=" ".join,
)
def test_a_home_that_is_not_known_is_named(world: World, arguments: list[str]):
    world.model()
    world.recipe()
    before = world.listing()
    outcome = world.call(*arguments)
    assert outcome.code == 2 and UNKNOWN in outcome.err and "home folder" in outcome.err, outcome.err
    assert world.listing() == before


def test_an_option_knows_the_home_as_a_recipe_does(world: World):
    world.model()
    world.monkeypatch.setenv("HOME", str(world.folder / "home"))
    assert world.call("distill", world.recipe(), "--output", "~/mine").code == 0
    assert Path("home/mine/recipe/student").is_dir() and not Path("~").exists()
    outcome = world.call("eval", "~/mine/recipe", *SCORE)
    assert outcome.code == 0, outcome.err
    shutil.rmtree("home/mine/recipe/student")
    outcome = world.call("eval", "~/mine/recipe", *SCORE)
    assert outcome.code == 2 and "--force" in outcome.err and "--resume" not in outcome.err
    assert world.call("distill", "recipe.toml", "--output", "~/mine", "--force").code == 0


def test_a_cache_that_holds_other_things_is_made_again(world: World, own_cache: Path):
    world.model()
    recipe = world.recipe(teacher={"finetune": {"max_steps": 1}})
    assert world.call("distill", recipe).code == 0
    [manifest] = (own_cache / "teachers").glob("*/kdcli_manifest.json")
    [logits, *_] = sorted((own_cache / "logits").iterdir())
    manifest.write_text("[" * 100_000)
    for path in (own_cache / "logits").iterdir():
        path.unlink()
        path.mkdir()
    outcome = world.call("distill", recipe, "--force")
    assert outcome.code == 0, outcome.err
    assert "kdcli_manifest.json is damaged" in outcome.err and "it is a folder" in outcome.err
    assert logits.is_file()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_place_where_nothing_can_be_made_is_not_called_locked(world: World):
    world.model()
    outcome = world.call("distill", world.recipe(), "--output", "/proc")
    assert outcome.code == 2 and "cannot write to /proc" in outcome.err and "locked" not in outcome.err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_python_ends_changes_nothing(name: str):
    late = (
        "import os, signal, sys\n"
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}): kill(pid, number)\n"
        "late = Late()\n"
        "sys.argv = ['kdcli', '--version']\n"
        "from kdcli.__main__ import main\n"
        "main()\n"
    ).replace("{name}", name)
    ended = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, env=os.environ, check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.startswith("kdcli ")


def test_a_call_in_process_leaves_the_signals_alone():
    import signal

    before = signal.getsignal(signal.SIGINT)
    assert run(["--version"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
