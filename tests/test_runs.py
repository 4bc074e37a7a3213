import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kdcli.errors import InputError
from kdcli.files import atomic_folder
from kdcli.runs import Run, latest_run, open_run, remove_run, run_of_model, to_toml


def finish(run: Run) -> Run:
    run.student.mkdir(parents=True)
    run.update({"status": "done", "recipe": {}})
    run.mark_latest()
    return run


def finished(root: Path, name: str) -> Run:
    with open_run(root, name, force=False, resume=False) as run:
        return finish(run)


def begun(root: Path, name: str = "one") -> Run:
    with open_run(root, name, force=False, resume=False) as run:
        return run


def test_a_run_is_not_opened_twice_without_force_or_resume(tmp_path: Path):
    finished(tmp_path, "one")
    with pytest.raises(InputError, match="exists already"), open_run(tmp_path, "one", force=False, resume=False):
        pass
    with open_run(tmp_path, "one", force=False, resume=True) as run:
        assert run.record is not None and (run.record.status, run.record.recipe) == ("done", {})
    with open_run(tmp_path, "one", force=True, resume=False) as run:
        assert run.record is None


def test_what_force_replaces_comes_back_unless_something_took_its_place(tmp_path: Path):
    old = finished(tmp_path, "one")
    for killed in (False, True):
        with open_run(tmp_path, "one", force=True, resume=False) as new:
            assert new.record is None
            if not killed:
                new.discard()
        if killed:
            # Its place is empty: the next attempt must not take that for the run to keep.
            with open_run(tmp_path, "one", force=True, resume=False) as new:
                new.discard()
        assert old.document["status"] == "done" and latest_run(tmp_path).path == old.path.resolve()
    with open_run(tmp_path, "one", force=True, resume=False) as new:
        new.settle()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"]
    assert old.record is None


def test_a_run_that_was_to_be_replaced_goes_on_where_nothing_took_its_place(tmp_path: Path):
    run = finished(tmp_path, "one")
    with open_run(tmp_path, "one", force=True, resume=False) as new:
        # What a kill between the two moves leaves.
        shutil.rmtree(new.path)
    with open_run(tmp_path, "one", force=False, resume=True) as again:
        assert again.document["status"] == "done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one"] and run.student.is_dir()


def test_a_run_has_room_for_one(tmp_path: Path):
    run = begun(tmp_path)
    (run.path / "mine").touch()
    hold = (
        "import sys, pathlib; from kdcli.runs import Run\n"
        "with Run(pathlib.Path(sys.argv[1])).held(): print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        for options in ({"force": True, "resume": False}, {"force": False, "resume": True}):
            with (
                pytest.raises(InputError, match="is locked by another kdcli process"),
                open_run(tmp_path, "one", **options),
            ):
                pass
        # A process that dies lets go of it.
        other.kill()
    with open_run(tmp_path, "one", force=False, resume=True):
        assert (run.path / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


HAMMER = """
import sys, time, random
from pathlib import Path
from kdcli.errors import InputError
from kdcli.files import atomic_folder
from kdcli.runs import open_run

root, inside = Path(sys.argv[1]), Path(sys.argv[2])
random.seed(sys.argv[3])
entries = overlaps = 0
print("ready", flush=True)
input()
until = time.time() + 3
while time.time() < until:
    options = random.choice([{"force": True, "resume": False}, {"force": False, "resume": True}])
    try:
        with open_run(root, "one", **options) as run:
            try:
                inside.touch(exist_ok=False)
            except FileExistsError:
                overlaps += 1
                continue
            entries += 1
            (run.path / "work").write_text(sys.argv[3])
            time.sleep(random.random() * 0.002)
            overlaps += (run.path / "work").read_text() != sys.argv[3]
            inside.unlink()
            if random.random() < 0.3:
                run.discard()
            elif random.random() < 0.5:
                run.settle()
    except InputError as error:
        assert "is locked by another kdcli process" in str(error) or "no run at" in str(error), error
print(entries, overlaps)
"""


def test_no_two_are_in_a_run_however_many_want_in(tmp_path: Path):
    begun(tmp_path / "runs")
    command = [sys.executable, "-c", HAMMER, tmp_path / "runs", tmp_path / "inside"]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([*command, str(seed)], stdin=pipe, stdout=pipe, stderr=pipe, text=True) for seed in range(8)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert [err for _, err in outputs if err] == []
    counts = [tuple(map(int, out.split())) for out, _ in outputs]
    entries, overlaps = map(sum, zip(*counts, strict=True))
    assert entries > 20 and overlaps == 0, counts
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"one", ".one.replaced"}


def test_the_next_writer_to_a_place_removes_what_a_killed_one_left_there(tmp_path: Path):
    write = (
        "import os, sys, pathlib; from kdcli.files import atomic_folder\n"
        "with atomic_folder(pathlib.Path(sys.argv[1])) as folder: (folder / 'half').touch(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", write, str(tmp_path / "wide")], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(tmp_path / "wide") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]
    assert {path.name for path in (tmp_path / "wide").iterdir()} == {"whole", "kdcli.json"}


def test_a_folder_that_was_there_stays(tmp_path: Path):
    with open_run(tmp_path, "one", force=False, resume=False) as run:
        run.discard()
    assert list(tmp_path.iterdir()) == []
    with open_run(tmp_path / "a" / "b", "one", force=False, resume=False) as run:
        run.discard()
    assert not (tmp_path / "a").exists()


def test_only_a_run_is_replaced(tmp_path: Path):
    precious = tmp_path / "one" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("precious")
    for resume in (False, True):
        with (
            pytest.raises(InputError, match=r"one"),
            open_run(tmp_path, "one", force=not resume, resume=resume),
        ):
            pass
    # Another program's run.json makes no run of it, either.
    (tmp_path / "one" / "run.json").write_text('{"status": "done"}')
    with (
        pytest.raises(InputError, match="one was not written by kdcli"),
        open_run(tmp_path, "one", force=True, resume=False),
    ):
        pass
    with pytest.raises(InputError, match="one was not written by kdcli"):
        remove_run(Run(tmp_path / "one"))
    assert precious.read_text() == "precious" and [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_run_of_an_older_version_is_replaced(tmp_path: Path):
    run = begun(tmp_path)
    (run.path / "kdcli.json").unlink()
    run.update({"status": "done", "recipe": {}, "versions": {}})
    with open_run(tmp_path, "one", force=True, resume=False) as run:
        assert run.record is None


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path, own_cache: Path):
    run = begun(tmp_path)
    places = [run.path / "student", run.path / "checkpoints" / "x", tmp_path / "latest", own_cache / "teachers" / "abc"]
    write = (
        "import sys, contextlib, pathlib; from kdcli.files import temporary_folder\n"
        "with contextlib.ExitStack() as stack:\n"
        "    for name in sys.argv[1:]:\n"
        "        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)\n"
        "        (stack.enter_context(temporary_folder(pathlib.Path(name))) / 'half').write_text('half')\n"
        "    print(1, flush=True); input()"
    )

    def halves() -> int:
        return sum(1 for folder in (tmp_path, own_cache) for _ in folder.rglob("half"))

    with subprocess.Popen(
        [sys.executable, "-c", write, *map(str, places)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with open_run(tmp_path, "one", force=False, resume=True):
            assert halves() == len(places)
        other.kill()
    assert halves() == len(places)
    with open_run(tmp_path, "one", force=False, resume=True):
        assert halves() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert list((own_cache / "teachers").iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "null", '"done"'])
def test_a_record_that_is_none_is_named(text: str, tmp_path: Path):
    run = begun(tmp_path)
    (run.path / "run.json").write_text(text)
    with pytest.raises(InputError, match="is no record of a run"):
        run.record  # noqa: B018


def test_only_a_runs_own_models_belong_to_it(tmp_path: Path):
    run = finished(tmp_path, "one")
    assert [run_of_model(run.path / name) for name in ("student", "onnx", "finetune/rte")] == [run] * 3
    assert run_of_model(run.path / "dense") is None
    run.update({"recipe": None})
    (run.path / "run.json").write_text('{"status": "done"}')
    assert run_of_model(run.student) is None


def test_there_must_be_something_to_resume(tmp_path: Path):
    with pytest.raises(InputError, match="to resume"), open_run(tmp_path, "one", force=False, resume=True):
        pass


@pytest.mark.parametrize("name", ["latest", "", "..", "a/b"])
def test_some_names_are_not_for_runs(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="name"), open_run(tmp_path, name, force=False, resume=False):
        pass


def test_latest_follows_the_newest_finished_run(tmp_path: Path):
    with pytest.raises(InputError, match="no run yet"):
        latest_run(tmp_path)
    finished(tmp_path, "one")
    two = finished(tmp_path, "two")
    assert latest_run(tmp_path).path == two.path.resolve()
    assert not Path(os.readlink(tmp_path / "latest")).is_absolute()
    assert run_of_model(tmp_path / "latest" / "student") == Run(two.path.resolve())


def test_latest_works_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "symlink", refuse)
    run = finished(tmp_path, "one")
    assert (tmp_path / "latest").is_file()
    assert latest_run(tmp_path).path == run.path


def test_a_broken_record_is_named(tmp_path: Path):
    run = begun(tmp_path)
    (run.path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json"):
        run.record  # noqa: B018


def test_a_discarded_run_leaves_nothing(tmp_path: Path):
    with open_run(tmp_path / "runs", "one", force=False, resume=False) as run:
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
