"""What the user put where kdcli writes stays there, and nothing that a command reads, or a run holds, is replaced."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import World

from kdcli.errors import InputError
from kdcli.files import atomic_folder, has_marker
from kdcli.runs import Run, open_run


def finished(root: Path, name: str) -> Run:
    with open_run(root, name, force=True, resume=False) as run:
        run.settle()
        run.student.mkdir()
        run.update({"status": "done", "recipe": {}, "versions": {}})
        return run


@pytest.mark.parametrize("kind", ["text", "text that names a folder", "link elsewhere", "link beside", "folder"])
def test_a_users_own_latest_stays_with_a_note(tmp_path: Path, kind: str):
    latest, mine = tmp_path / "runs" / "latest", tmp_path / "runs" / "mine"
    (tmp_path / "elsewhere").mkdir()
    mine.mkdir(parents=True)
    (mine / "thesis.tex").touch()
    if kind.startswith("text"):
        latest.write_text("mine\n" if kind.endswith("folder") else "my notes\n")
    elif kind.startswith("link"):
        latest.symlink_to("../elsewhere" if kind.endswith("elsewhere") else "mine")
    else:
        latest.mkdir()

    def state() -> object:
        return os.readlink(latest) if latest.is_symlink() else latest.is_dir() or latest.read_text()

    before = state()
    note = finished(tmp_path / "runs", "one").mark_latest()
    assert note is not None and "latest" in note and state() == before


@pytest.mark.parametrize("before", ["link", "link to a run that is gone", "text"])
def test_kdclis_own_latest_is_brought_up_to_date(tmp_path: Path, before: str):
    one, latest = finished(tmp_path, "one"), tmp_path / "latest"
    if before == "text":
        latest.write_text("one\n")
    else:
        assert one.mark_latest() is None
    if before.endswith("gone"):
        shutil.rmtree(one.path)
    assert finished(tmp_path, "two").mark_latest() is None
    assert os.readlink(latest) == "two"


def test_what_is_no_run_is_neither_removed_nor_put_in_a_runs_place(tmp_path: Path):
    precious = tmp_path / ".one.replaced" / "thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(InputError, match="to resume"), open_run(tmp_path, "one", force=False, resume=True):
        pass
    with open_run(tmp_path, "one", force=False, resume=False) as run:
        run.discard()
    assert precious.exists() and not run.path.exists()
    run = finished(tmp_path, "one")
    assert precious.exists()
    with (
        pytest.raises(InputError, match=r"\.one\.replaced was not written by kdcli"),
        open_run(tmp_path, "one", force=True, resume=False),
    ):
        pass
    assert precious.exists() and run.document["status"] == "done"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kdcli": 1}', '{"mine": "1.0"}', "[" * 100_000, "\xff"])
def test_a_file_of_the_markers_name_alone_makes_no_folder_kdclis(tmp_path: Path, text: str):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "kdcli.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="not written by kdcli"), atomic_folder(folder, force=True):
        pass
    assert not has_marker(folder) and (folder / "kdcli.json").exists()


@pytest.mark.parametrize("suffix", ["csv", "md", "png", "svg", "json"])
@pytest.mark.parametrize("dry", [True, False])
def test_a_comparison_does_not_write_over_files_of_others(world: World, suffix: str, dry: bool):
    world.model()
    world.write(f"comparison/comparison.{suffix}", '{"mine": "precious"}')
    before = world.listing()
    outcome = world.call("compare", world.recipe(), "--seeds", "1", *["--dry-run"] * dry)
    assert outcome.code == 2 and f"comparison.{suffix}" in outcome.err and "--output" in outcome.err
    after = world.listing()
    assert {name: after[name] for name in before} == before and not Path("comparison/runs").exists()


def marked(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "kdcli.json").write_text('{"kdcli": "1"}')
    return path


COMMANDS = {
    "export": ["export", "--no-latency"],
    "overparam": ["overparam"],
    "contract": ["contract"],
    "convert": ["convert"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_force_never_replaces_what_is_read_or_what_contains_it(world: World, command: str):
    marked(world.folder / "wide")
    model = marked(world.model(name="wide/model"))
    before = world.listing()
    for out in ("wide/model", "wide", "wide/../wide/model"):
        outcome = world.call(*COMMANDS[command], model, "--out", out, "--force")
        assert outcome.code == 2 and "what is read" in outcome.err and "--out" in outcome.err, outcome.err
    if command == "export":
        other = world.model(name="other")
        outcome = world.call(*COMMANDS[command], other, "--teacher", "wide/model", "--out", "wide", "--force")
        assert outcome.code == 2 and "what is read" in outcome.err, outcome.err
        shutil.rmtree(other)
    assert world.listing() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_force_never_replaces_a_run_or_a_part_of_one(world: World, command: str):
    model = world.model()
    for name in ("one", "two"):
        marked(finished(world.folder / "runs", name).student)
    marked(world.folder / "runs")
    marked(world.folder / "runs/one/finetune/rte")
    before = world.listing()
    for out in ("runs", "runs/one", "runs/one/student", "runs/one/finetune/rte"):
        outcome = world.call(*COMMANDS[command], model, "--out", out, "--force")
        assert outcome.code == 2 and "run" in outcome.err and "--out" in outcome.err, outcome.err
    assert world.listing() == before


def test_what_is_beside_a_runs_own_parts_is_replaced(world: World):
    world.model("chains")
    finished(world.folder / "runs", "one")
    for _ in range(2):
        outcome = world.call("contract", "teacher", "--out", "runs/one/plain", "--force")
        assert outcome.code == 0, outcome.err
    assert json.loads(Path("runs/one/plain/kdcli.json").read_text())["kdcli"]
