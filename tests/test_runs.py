import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kdcli.errors import InputError
from kdcli.runs import Run, latest_run, open_run, run_of_model, to_toml


def finish(run: Run) -> Run:
    run.student.mkdir(parents=True)
    run.update({"status": "done", "recipe": {}})
    run.mark_latest()
    return run


def test_a_run_is_not_opened_twice_without_force_or_resume(tmp_path: Path):
    finish(open_run(tmp_path, "one", force=False, resume=False))
    with pytest.raises(InputError, match="exists already"):
        open_run(tmp_path, "one", force=False, resume=False)
    assert open_run(tmp_path, "one", force=False, resume=True).record == {"status": "done", "recipe": {}}
    assert open_run(tmp_path, "one", force=True, resume=False).record == {}


def test_what_force_replaces_comes_back_unless_something_took_its_place(tmp_path: Path):
    old = finish(open_run(tmp_path, "one", force=False, resume=False))
    for killed in (False, True):
        new = open_run(tmp_path, "one", force=True, resume=False)
        assert new.record == {}
        if killed:
            # Its place is empty: the next attempt must not take that for the run to keep.
            new = open_run(tmp_path, "one", force=True, resume=False)
        new.discard()
        assert old.record["status"] == "done" and latest_run(tmp_path).path == old.path.resolve()
    open_run(tmp_path, "one", force=True, resume=False).settle()
    assert [path.name for path in tmp_path.iterdir() if path.name != "latest"] == ["one"]
    assert old.record == {}


def test_a_run_has_room_for_one(tmp_path: Path):
    run = open_run(tmp_path, "one", force=False, resume=False)
    (run.path / "mine").touch()
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        for options in ({"force": True, "resume": False}, {"force": False, "resume": True}):
            with pytest.raises(InputError, match="another kdcli is at work in"):
                open_run(tmp_path, "one", **options)
        # A process that dies lets go of it.
        other.kill()
    with open_run(tmp_path, "one", force=False, resume=True).held():
        assert (run.path / "mine").exists()
    assert not (run.path / ".lock").exists()


def test_a_folder_that_was_there_stays(tmp_path: Path):
    open_run(tmp_path, "one", force=False, resume=False).discard()
    assert tmp_path.is_dir()
    open_run(tmp_path / "a" / "b", "one", force=False, resume=False).discard()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["[]", "null", '"done"'])
def test_a_record_that_is_none_is_named(text: str, tmp_path: Path):
    run = open_run(tmp_path, "one", force=False, resume=False)
    (run.path / "run.json").write_text(text)
    with pytest.raises(InputError, match="is no record of a run"):
        run.record  # noqa: B018


def test_only_a_runs_own_models_belong_to_it(tmp_path: Path):
    run = finish(open_run(tmp_path, "one", force=False, resume=False))
    assert [run_of_model(run.path / name) for name in ("student", "onnx", "finetune/rte")] == [run] * 3
    assert run_of_model(run.path / "dense") is None
    run.update({"recipe": None})
    (run.path / "run.json").write_text('{"status": "done"}')
    assert run_of_model(run.student) is None


def test_there_must_be_something_to_resume(tmp_path: Path):
    with pytest.raises(InputError, match="to resume"):
        open_run(tmp_path, "one", force=False, resume=True)


@pytest.mark.parametrize("name", ["latest", "", "..", "a/b"])
def test_some_names_are_not_for_runs(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="name"):
        open_run(tmp_path, name, force=False, resume=False)


def test_latest_follows_the_newest_finished_run(tmp_path: Path):
    with pytest.raises(InputError, match="no run yet"):
        latest_run(tmp_path)
    finish(open_run(tmp_path, "one", force=False, resume=False))
    two = finish(open_run(tmp_path, "two", force=False, resume=False))
    assert latest_run(tmp_path).path == two.path.resolve()
    assert not Path(os.readlink(tmp_path / "latest")).is_absolute()
    assert run_of_model(tmp_path / "latest" / "student") == Run(two.path.resolve())


def test_latest_works_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "symlink", refuse)
    run = finish(open_run(tmp_path, "one", force=False, resume=False))
    assert (tmp_path / "latest").is_file()
    assert latest_run(tmp_path).path == run.path


def test_a_broken_record_is_named(tmp_path: Path):
    run = open_run(tmp_path, "one", force=False, resume=False)
    (run.path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json"):
        run.record  # noqa: B018


def test_a_discarded_run_leaves_nothing(tmp_path: Path):
    run = open_run(tmp_path / "runs", "one", force=False, resume=False)
    run.discard()
    assert not (tmp_path / "runs").exists()


def test_the_recipe_in_a_run_says_the_same_as_the_recipe():
    document = {
        "name": 'with "quotes" and \\ and ü',
        "seed": 3,
        "task": {"name": "x", "text": ["a", "b"], "validation_fraction": 0.1},
        "train": {"learning_rate": 1e-05, "group_by_length": True},
        "overparam": {"factors": {"768": [32, 1, 24]}},
    }
    assert tomllib.loads(to_toml(document)) == json.loads(json.dumps(document))
