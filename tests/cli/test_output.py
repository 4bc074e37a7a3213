"""What reaches stdout and stderr: in every encoding, on full disks, with other people's words, and for programs."""

import contextlib
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import ROWS, World

from kdcli.cli.app import run
from kdcli.terminal import json_for, visible

FILM = "映画.csv"
EVAL = ["eval", "teacher", "--data", FILM, "--text", "text"]
FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


@pytest.fixture
def film(world: World) -> World:
    """A working folder with data whose file's name has letters that few encodings have."""
    world.model()
    world.csv(FILM, ROWS)
    return world


def printed(encoding: str, arguments: list[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a call whose streams have an encoding; strict, as Python opens stdout."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = run(arguments)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
    return code, out, err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_result_is_printed_in_every_encoding(encoding: str, film: World):
    code, out, _ = printed(encoding, [*EVAL, "--json"])
    assert code == 0
    assert json.loads(out)["task"] == Path(FILM).stem
    code, table, _ = printed(encoding, EVAL)
    assert code == 0 and "accuracy" in table
    assert ("映画" in table) == (encoding == "utf-8")
    # A letter of two columns leaves two behind, so that the table stays one.
    widths = {sum(2 if unicodedata.east_asian_width(c) == "W" else 1 for c in line) for line in table.splitlines()[2:]}
    assert len(widths) == 1, table


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_errors_and_help_are_printed_in_every_encoding(encoding: str, film: World):
    code, out, err = printed(encoding, ["eval", "teacher", "--data", FILM, "--text", "映", "--json"])
    assert code == 2 and "error: " in err
    assert "映" in json.loads(out)["error"]["message"]
    assert printed(encoding, ["eval", "--help"])[0] == 0


def test_a_process_whose_stdout_is_no_utf8(tmp_path: Path):
    words = [sys.executable, "-m", "kdcli", "methods", "映画", "--json"]
    result = subprocess.run(words, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, timeout=120)
    assert result.returncode == 2 and "映画" in json.loads(result.stdout)["error"]["message"]


@needs_full_device
@pytest.mark.parametrize("form", [["--json"], []])
def test_a_full_disk_behind_stdout_is_said(form: list[str], film: World):
    with FULL.open("w") as full, contextlib.redirect_stdout(full):
        code = run([*EVAL, *form])
    err = film.capsys.readouterr().err
    assert code == 3 and "cannot be written to stdout: No space left on device" in err and "bug" not in err


def test_a_closed_stdout_is_said(film: World):
    film.monkeypatch.setattr(sys, "stdout", None)
    assert run(EVAL) == 3
    assert "cannot be written to stdout: it is closed" in film.capsys.readouterr().err


@needs_full_device
def test_a_log_on_a_full_disk_ends_no_run(world: World):
    world.model()
    recipe = world.recipe()
    with FULL.open("w") as full, contextlib.redirect_stderr(full):
        assert run(["distill", recipe, "--json"]) == 0
    assert json.loads(world.capsys.readouterr().out)["status"] == "done"
    # Nor does it when the interpreter, at its end, writes what is left; nor does a log that nobody reads.
    for log in ("2>/dev/full", "2> >(true)", "2>&-"):
        command = f"sleep 0.2; {sys.executable} -m kdcli methods kd --json {log}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
        assert (result.returncode, json.loads(result.stdout)["name"]) == (0, "kd"), log


# Other people's words

EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b31m\u202eb"


def test_no_escape_of_a_name_or_a_label_reaches_the_terminal(world: World):
    world.model()
    world.csv(f"{EVIL}.csv", ROWS)
    world.csv("labels.csv", [(text, EVIL + label) for text, label in ROWS])
    calls = [
        world.call("eval", "teacher", "--data", f"{EVIL}.csv", "--text", "text"),
        world.call("eval", "teacher", "--data", f"{EVIL}.csv", "--text", "text", "--json"),
        world.call("eval", "teacher", "--data", "labels.csv", "--text", "text"),
        world.call("eval", "teacher", "--data", "rows.csv", "--text", EVIL),
        world.call("eval", EVIL, "--task", EVIL),
        world.call("eval", f"--{EVIL}"),
        world.call("distill", f"{EVIL}.toml"),
        world.call(EVIL),
        world.call("compare", f"[/x]{EVIL}.toml"),
        world.call("distill", world.recipe(task={"name": EVIL}, teacher={"model": EVIL}), "--dry-run"),
    ]
    for outcome in calls:
        seen = outcome.out + outcome.err
        assert not [c for c in seen if c != "\n" and (unicodedata.category(c) in ("Cc", "Cf"))], repr(seen)
        assert "owned" in seen and "Traceback" not in seen
    assert calls[0].code == 0 and "\\x1b" in calls[0].out and "\\u202e" in calls[0].out
    assert calls[1].json["task"] == EVIL


def test_no_escape_reaches_the_terminal_from_a_traceback():
    words = [sys.executable, "-m", "kdcli", "distill", f"{EVIL}.toml", "--debug"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" in result.stderr and "\\x1b]0;owned" in result.stderr
    assert not [c for c in result.stderr if c != "\n" and (unicodedata.category(c) in ("Cc", "Cf"))]


def test_what_is_made_visible_is_nothing_else():
    harmless = "tab\tline\nفارسی\u200cها 👩\u200d👩\u200d👧 naïve [bold]x[/] :smile:"
    assert visible(harmless) == harmless
    assert visible("\udcff\u200f") == "\\udcff\\u200f"
    assert visible("né映", "ascii") == "n???"


def test_json_means_the_same_in_every_encoding():
    value = "né映😀\x9b\u202e\udcff"
    for encoding in ("utf-8", "cp1252", "ascii"):
        text = json_for(json.dumps(value, ensure_ascii=False), encoding)
        assert json.loads(text.encode(encoding).decode(encoding)) == value
        assert "\u202e" not in text and "\x9b" not in text


@pytest.mark.parametrize(("columns", "width"), [(None, 100), ("70", 70), ("131", 131), ("0", 100), ("wide", 100)])
def test_tables_in_a_pipe_are_as_wide_as_columns_says(columns: str | None, width: int, world: World):
    world.monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        world.monkeypatch.setenv("COLUMNS", columns)
    lines = world.call("recipes", "explain").out.splitlines()
    assert width - 20 < max(map(len, lines)) <= width


# Errors for programs


@pytest.mark.parametrize(
    ("arguments", "kind", "message", "hint"),
    [
        (["distill", "xyz.toml", "--json"], "input", "no recipe at xyz.toml", None),
        (["distill", "recpie.toml", "--json"], "input", "no recipe at recpie.toml", "did you mean recipe.toml?"),
        (["eval", "--tsak", "x", "--json"], "input", "No such option: --tsak", "did you mean --task?"),
        (["distil", "recipe.toml", "--json"], "input", "No such command 'distil'", "did you mean kdcli distill?"),
    ],
)
def test_an_error_is_a_document_too(arguments: list[str], kind: str, message: str, hint: str | None, world: World):
    world.recipe()
    outcome = world.call(*arguments)
    assert outcome.code == 2
    assert outcome.json["error"] == {"kind": kind, "message": message, "where": None, "hint": hint}
    assert message in outcome.err and (hint or "") in outcome.err
    assert world.call(*arguments[:-1]).out == ""


def test_the_help_tells_the_exit_codes(world: World):
    words = " ".join(world.call("--help").out.split())
    for code in ("0 done", "1 a gate was not met", "2 the input is wrong", "3 the run failed", "130", "143"):
        assert code in words


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["--json"], "behind a command"), (["distill", "recipe.toml", "--json=1"], "kdcli --help")],
)
def test_an_option_in_the_wrong_way_is_told_as_json_too(world: World, arguments: list[str], hint: str):
    outcome = world.call(*arguments)
    assert outcome.code == 2 and hint in outcome.err and "--version" not in outcome.err
    assert outcome.json["error"]["kind"] == "input" and hint in outcome.json["error"]["hint"]
