import json
import os
import tomllib
from pathlib import Path

import pytest

from kdcli.errors import InputError
from kdcli.runs import Run, latest_run, open_run, run_of_model, to_toml


def finish(run: Run) -> Run:
    run.student.mkdir(parents=True)
    run.update({"status": "done"})
    run.mark_latest()
    return run


def test_a_run_is_not_opened_twice_without_force_or_resume(tmp_path: Path):
    finish(open_run(tmp_path, "one", force=False, resume=False))
    with pytest.raises(InputError, match="exists already"):
        open_run(tmp_path, "one", force=False, resume=False)
    assert open_run(tmp_path, "one", force=False, resume=True).record == {"status": "done"}
    assert open_run(tmp_path, "one", force=True, resume=False).record == {}


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
