"""Ctrl-C and SIGTERM at any moment: one line, 130 or 143, no traceback, and a run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import World
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

AT_IMPORT = """
import os, runpy, sys
number, at, seen = int(sys.argv[1]), int(sys.argv[2]), -1

def hook(event, arguments):
    global seen
    if event == "import":
        # The first import after those that the handling of signals itself needs.
        seen += seen >= 0 or arguments[0] == "kdcli.cli.app"
        if seen == at:
            seen += 1
            os.kill(os.getpid(), number)

sys.addaudithook(hook)
sys.argv[:3] = ["kdcli"]
runpy.run_module("kdcli", run_name="__main__", alter_sys=True)
"""


def interrupted_at_import(number: int, at: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program, which gets signal `number` when it imports its n-th module."""
    command = [sys.executable, "-c", AT_IMPORT, str(int(number)), str(at), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def check(done: subprocess.CompletedProcess[str], number: int) -> None:
    assert done.returncode == CODES[signal.Signals(number)], (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr and len(lines) == 1
    assert lines[0].startswith(f"error: {WORDS[signal.Signals(number)]}"), done.stderr


@pytest.mark.parametrize(
    ("number", "at"),
    [(signal.SIGINT, at) for at in (0, 3, 40, 200, 900)] + [(signal.SIGTERM, 0), (signal.SIGTERM, 300)],
)
def test_a_signal_during_the_imports_ends_the_program_in_one_line(number: int, at: int, world: World):
    world.model()
    recipe = world.recipe()
    before = world.listing()
    done = interrupted_at_import(number, at, "distill", recipe, cwd=world.folder)
    check(done, number)
    assert done.stdout == "" and world.listing() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 2, 5, 10, 20, 80, 150, 400, 600, 1200, 1700, 2200, 2600])
def test_a_signal_during_any_import(number: int, at: int, world: World):
    world.model()
    done = interrupted_at_import(number, at, "distill", world.recipe(), "--json", cwd=world.folder)
    if done.returncode == 0:
        pytest.skip("no such many modules")
    check(done, number)
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "interrupted" and error["message"].startswith(WORDS[signal.Signals(number)])


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """True as soon as the process has a handler of its own for SIGTERM: the program has begun."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0])
def test_a_signal_after_any_time(number: int, after: float, world: World):
    world.model()
    recipe = world.recipe(train={"max_steps": 3000})
    command = [sys.executable, "-m", "kdcli", "distill", recipe]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=world.folder)
    while not handles_signals(process):
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    check(subprocess.CompletedProcess(command, process.returncode, out, err), number)
    assert not list(world.folder.rglob("*.kdcli-*")) and not list(world.folder.rglob("*.lock"))
    if (record := world.folder / "runs" / "recipe" / "run.json").is_file():
        assert json.loads(record.read_text())["status"] == "interrupted"


IN_BLOCK = """
import os, signal, sys, time
from pathlib import Path
from kdcli import interrupts
interrupts.PAUSE = 0.05
interrupts.install()
kill = lambda: os.kill(os.getpid(), signal.SIGTERM)
try:
    with interrupts.caught():
        with interrupts.finishing():
            kill()
            Path("first").touch()
            kill()
            Path("at once again").touch()
            if sys.argv[1:]:
                time.sleep(0.1)
                kill()
            Path("finished").touch()
        Path("went on").touch()
except KeyboardInterrupt as error:
    Path(type(error).__name__).touch()
    if sys.argv[2:]:
        kill()
    Path("tidied").touch()
"""


@pytest.mark.parametrize(
    ("signals", "code", "left"),
    [
        (1, 0, {"first", "at once again", "finished", "Terminated", "tidied"}),
        (2, 0, {"first", "at once again", "Terminated", "tidied"}),
        (3, 143, {"first", "at once again", "Terminated"}),
    ],
)
def test_a_first_signal_lets_a_block_be_finished_and_a_second_one_does_not(
    signals: int, code: int, left: set[str], tmp_path: Path
):
    done = subprocess.run([sys.executable, "-c", IN_BLOCK, *"again"[: signals - 1]], cwd=tmp_path, check=False)
    assert done.returncode == code
    assert {path.name for path in tmp_path.iterdir()} == left


IN_FINALISER = """
import os, signal, time
from kdcli import interrupts
interrupts.install()

class Loud:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):
            pass

try:
    with interrupts.caught():
        Loud()
        time.sleep(30)
except KeyboardInterrupt:
    print("caught")
"""


def test_a_finaliser_swallows_no_signal(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", IN_FINALISER], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caught\n", "")


def test_a_terminated_run_says_so_and_goes_on_to_the_same_weights(world: World):
    world.model()
    recipe = world.recipe(train={"max_steps": 40, "eval_every": 5, "select": "last"})
    assert world.call("distill", recipe, "--set", "name=whole").code == 0
    command = [sys.executable, "-m", "kdcli", "distill", recipe, "--set", "name=stopped"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=world.folder)
    run = world.folder / "runs" / "stopped"
    while process.poll() is None and not list(run.glob("checkpoints/*/checkpoint-*/model.safetensors")):
        time.sleep(0.002)
    # In the middle of writing a checkpoint, which is finished.
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    check(subprocess.CompletedProcess(command, process.returncode, out, err), signal.SIGTERM)
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    steps = {path.parent for path in run.glob("checkpoints/*/checkpoint-*/*")}
    assert steps and all((path / "kdcli_manifest.json").is_file() for path in steps)
    assert world.call("distill", recipe, "--set", "name=stopped", "--resume").code == 0
    whole, stopped = (
        load_file(world.folder / "runs" / name / "student" / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(bool((whole[key] == stopped[key]).all()) for key in whole)
