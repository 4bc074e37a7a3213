"""Kills kdcli at a random processor time, or before its n-th file event, resumes it, and compares all files.

Run by hand: python tests/faults/kill.py --kills 200; python tests/faults/kill.py --sweep rotations. Every line of the
output is a trial; the last one counts. The exit code is 1 when a trial did not end in the same files.

Importing the libraries costs more than a tiny run, so one process imports them and every run is a fork of it. A fork
is ended by a signal that it cannot handle: by SIGPROF at a time that it has computed, or by SIGKILL at a file event.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from worlds import KINDS, arguments_of, make_world

EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
VOLATILE = ("/log/",)
"""Parts of the names of files that no two runs share."""


def on_file_events(root: Path, action: Callable[[int], None]) -> None:
    """Call `action` with 1, 2, 3... before this process changes a file below `root`."""
    count = 0
    place = str(root)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in EVENTS:
            return
        if any(isinstance(one, str | os.PathLike) and os.path.abspath(one).startswith(place) for one in arguments):
            count += 1
            action(count)

    sys.addaudithook(hook)


class Trial:
    """A copy of the world in which one run is started, killed and resumed."""

    def __init__(self, world: Path, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        shutil.copytree(world, folder, symlinks=True)

    def run(self, *more: str, seconds: float | None = None, event: int | None = None) -> tuple[int, int]:
        """Run the recipe in a fork, and return (exit code, or minus the signal that ended it; file events).

        seconds: of processor time after which it is killed. event: the file event before which it is killed.
        """
        return self.call([*arguments_of(self.kind), *more], seconds=seconds, event=event)

    def call(self, words: list[str], *, seconds: float | None = None, event: int | None = None) -> tuple[int, int]:
        """Call kdcli with some words in a fork; as `run`."""
        counter = self.folder.parent / f"{self.folder.name}.events"
        child = os.fork()
        if child == 0:
            try:
                self._child(counter, words, seconds, event)
            finally:
                os._exit(70)
        _, status = os.waitpid(child, 0)
        events = int(counter.read_text()) if counter.exists() else 0
        counter.unlink(missing_ok=True)
        return os.waitstatus_to_exitcode(status), events

    def _child(self, counter: Path, words: list[str], seconds: float | None, event: int | None) -> None:
        from kdcli.cli.app import run

        os.chdir(self.folder)
        os.environ["KDCLI_CACHE"] = str(self.folder / "cache")
        log = os.open(self.folder.parent / f"{self.folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        seen = 0

        def before(number: int) -> None:
            nonlocal seen
            seen = number
            if number == event:
                os.kill(os.getpid(), signal.SIGKILL)

        on_file_events(self.folder, before)
        if seconds is not None:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
        code = run(words)
        signal.setitimer(signal.ITIMER_PROF, 0)
        counter.write_text(str(seen))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def resume(self) -> int:
        """Go on as a user does, and return the exit code."""
        if KINDS[self.kind].command == "compare":
            return self.run()[0]
        # Killed before it had begun, there is nothing to resume.
        return self.run("--resume")[0] if (self.folder / "runs" / self.kind).is_dir() else self.run()[0]

    def files(self) -> dict[str, str]:
        """Return a hash of every file that a run made, without what is a time or a duration."""
        found = {}
        for top in ("runs", "cache"):
            for path in sorted((self.folder / top).rglob("*")):
                name = str(path.relative_to(self.folder))
                if path.is_symlink():
                    found[name] = f"link to {path.readlink()}"
                elif path.is_dir():
                    found[name] = "folder"
                elif any(part in name for part in VOLATILE):
                    continue
                elif path.name in ("comparison.md", "comparison.csv"):
                    # Their columns of seconds; all other numbers are in comparison.json, too.
                    found[name] = "a table with seconds"
                else:
                    found[name] = hashlib.sha256(self._content(path)).hexdigest()
        return found

    def _content(self, path: Path) -> bytes:
        content = path.read_bytes().replace(str(self.folder).encode(), b"HERE")
        if path.suffix == ".json" and b'"seconds"' in content:
            return json.dumps(timeless(json.loads(content)), sort_keys=True).encode()
        return content

    def output(self) -> str:
        """Return what all runs printed."""
        log = self.folder.parent / f"{self.folder.name}.log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def forget_output(self) -> None:
        """Let `output` begin with the next run."""
        (self.folder.parent / f"{self.folder.name}.log").unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder)
        (self.folder.parent / f"{self.folder.name}.log").unlink(missing_ok=True)


TIMES = {"checksum", "seconds", "started", "finished", "interrupted", "latency", "sha256", "train_runtime"}


def timeless(value: Any) -> Any:
    """Return a JSON value without fields that hold times, or hashes over these."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}
    if isinstance(value, list):
        # A comparison says whose seconds it left out.
        return [timeless(inner) for inner in value if not str(inner).startswith("stopped once and resumed")]
    return value


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return in words what is missing, left over, or another file."""
    return [
        *(f"missing: {name}" for name in expected if name not in found),
        *(f"left over: {name}" for name in found if name not in expected),
        *(f"differs: {name}" for name in expected if name in found and found[name] != expected[name]),
    ]


class Reference:
    """What a kind of run gives when nobody kills it: its files, its processor time and its file events."""

    def __init__(self, world: Path, root: Path, kind: str) -> None:
        trial = Trial(world, root / f"{kind}-whole", kind)
        begun = sum(os.times()[2:4])
        code, self.events = trial.run()
        self.seconds = sum(os.times()[2:4]) - begun
        if code != 0:
            raise SystemExit(f"{kind} ends with {code} when nobody kills it:\n{trial.output()[-3000:]}")
        self.files = trial.files()
        # What differs between two whole runs says nothing.
        again = Trial(world, root / f"{kind}-again", kind)
        again.run()
        other = again.files()
        self.unsteady = [name for name in self.files if other.get(name) != self.files[name]]
        for name in self.unsteady:
            self.files[name] = "unsteady"
        trial.remove()
        again.remove()

    def problems(self, trial: Trial) -> list[str]:
        """Return in words how the files of a trial differ from those of the whole run."""
        found = trial.files()
        found.update({name: "unsteady" for name in self.unsteady if name in found})
        return differences(self.files, found)


def attempt(reference: Reference, trial: Trial, **kill: Any) -> list[str]:
    """Kill a run once, resume it, and return in words what is not as it should be."""
    code, _ = trial.run(**kill)
    killed = code in (-signal.SIGPROF, -signal.SIGKILL)
    if not killed and code != 0:
        return [f"ended with {code} before it was killed"]
    code = trial.resume()
    if code != 0:
        return [f"resumed with exit code {code}"]
    return reference.problems(trial)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="random kills, spread over the kinds of runs")
    parser.add_argument("--sweep", action="append", default=[], help="kill a run of this kind before each file event")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of runs, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the folders of failed trials")
    options = parser.parse_args()
    import_all()
    draw = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="kdcli-kill-"))
    world = root / "world"
    world.mkdir()
    make_world_in_a_fork(world)
    kinds = options.kinds.split(",")
    references: dict[str, Reference] = {}
    trials: list[tuple[str, dict[str, Any]]] = []
    for kind in dict.fromkeys([*options.sweep, *(kinds if options.kills else [])]):
        references[kind] = Reference(world, root, kind)
        one = references[kind]
        told = f"{one.seconds:.1f} s, {one.events} file events, {len(one.files)} files"
        print(f"{kind}: {told}{', unsteady: ' + ', '.join(one.unsteady) if one.unsteady else ''}", flush=True)
    for number in range(options.kills):
        kind = kinds[number % len(kinds)]
        if draw.random() < 0.5:
            trials.append((kind, {"seconds": draw.uniform(0.01, references[kind].seconds)}))
        else:
            trials.append((kind, {"event": draw.randint(1, references[kind].events)}))
    for kind in options.sweep:
        trials += [(kind, {"event": number}) for number in range(1, references[kind].events + 1)]
    failed = 0
    begun = time.monotonic()
    for number, (kind, kill) in enumerate(trials, 1):
        trial = Trial(world, root / f"trial-{number}", kind)
        problems = attempt(references[kind], trial, **kill)
        failed += bool(problems)
        told = " ".join(f"{key} {value if isinstance(value, int) else round(value, 3)}" for key, value in kill.items())
        print(f"{number}/{len(trials)} {kind} {told}: {'; '.join(problems[:6]) if problems else 'same'}", flush=True)
        if problems and re.search(r"exit code|ended with", problems[0]):
            print(trial.output()[-1500:], flush=True)
        if not (problems and options.keep):
            trial.remove()
    left = [str(path) for path in root.rglob("*")] if failed and options.keep else []
    if not left:
        shutil.rmtree(root)
    print(f"{len(trials)} kills, {failed} not resumed to the same files, {time.monotonic() - begun:.0f} s", flush=True)
    return int(failed > 0)


def make_world_in_a_fork(world: Path) -> None:
    """Write the inputs without running a model in the process that all runs are forks of."""
    child = os.fork()
    if child == 0:
        try:
            make_world(world)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("the inputs cannot be made")


def import_all() -> None:
    """Import what runs import, so that a fork needs not."""
    import importlib
    import pkgutil

    import torch

    import kdcli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(kdcli.__path__, "kdcli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("torch.utils.tensorboard")
    importlib.import_module("onnxruntime")


if __name__ == "__main__":
    sys.exit(main())
