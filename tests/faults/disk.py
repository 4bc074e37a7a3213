"""Disks that fill up: a run on small file systems is told what is the matter, and goes on to the same weights.

Run by hand, as a user who may mount: python tests/faults/disk.py [--sizes 20] [--inodes 10] [--command distill]

What a command writes, and its cache, lie on a tmpfs of a limited size, or of a limited number of files. Where it fails
there, it must name a path there and a remedy, never a bug; after the limit is gone, the same command (with --resume
where there is a run) must end with the files of one that never met a limit, and nothing temporary may be left.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RECIPE = """
name = "full"
task = { name = "own", data = "rows.csv", text = "text", max_length = 16 }
method = "kd"
teacher = { model = "teacher", finetune = { max_steps = 4, batch_size = 8 } }
student = { form = "depth", layers = 1 }
train = { max_steps = 6, eval_every = 2, batch_size = 8, precision = "fp32", select = "last", log_every = 1 }
overparam = { length = 1 }
"""


COMMANDS = {
    "distill": (["distill", "recipe.toml", "--output", "runs"], "runs/full", "student/model.safetensors"),
    "overparam": (["overparam", "teacher", "--length", "1", "--out", "wide"], "wide", "model.safetensors"),
    "export": (["export", "teacher", "--no-latency", "--out", "served"], "served", "model.onnx"),
}
"""name -> (arguments, whose last one is a place on the small disk; folder that they write; file that counts)"""


@dataclass(frozen=True)
class Outcome:
    """What a call of the program gave; a negative code is the signal that killed it."""

    code: int
    err: str


@dataclass(frozen=True)
class Case:
    """A limit and what came of it: the first run, the one after the limit was lifted, and what is wrong with them."""

    limit: str
    first: Outcome
    second: Outcome | None
    problems: list[str]


def prepare(folder: Path) -> None:
    """Import all that a run needs, without a backward step (which would forbid to fork), and write its inputs."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from families import tiny, tokenizer

    import kdcli.distill.run
    import kdcli.training.trainer  # noqa: F401
    from kdcli.cli.app import run
    from kdcli.models.save import save_model

    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    (folder / "teacher").mkdir()
    save_model(tiny("bert", **names), folder / "teacher", tokenizer())
    rows = [("a fine and moving film", "yes"), ("a dull and empty film", "no")] * 20
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"{text} {i},{y}\n" for i, (text, y) in enumerate(rows)))
    (folder / "recipe.toml").write_text(RECIPE)
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        assert run(["distill", "recipe.toml", "--dry-run"]) == 0


def call(place: Path, command: str, *more: str, watch: Callable[[], None] = lambda: None) -> Outcome:
    """Run a command in a fork of this process, with what it writes and its cache in `place`."""
    *arguments, out = COMMANDS[command][0]
    with tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.environ["KDCLI_CACHE"] = str(place / "cache")
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(err.fileno(), 2)
                from kdcli.cli.app import run

                code = run([*arguments, str(place / out), *more])
            finally:
                os._exit(code)
        # Checkpoints go when the student is there: what counts is how much there was at once.
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            watch()
            time.sleep(0.002)
        _, status = ended
        err.seek(0)
        return Outcome(os.waitstatus_to_exitcode(status), err.read().decode(errors="replace"))


def weights(place: Path, command: str) -> str:
    """Return a hash of the file that counts."""
    _, folder, file = COMMANDS[command]
    return hashlib.sha256((place / folder / file).read_bytes()).hexdigest()


@contextlib.contextmanager
def tmpfs(options: str) -> Iterator[Path]:
    """Mount a small file system. Raises CalledProcessError where that is not permitted."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def measure(command: str) -> tuple[str, int, int]:
    """Return the hash of what counts without limits, and how many bytes and files there were at most."""
    most = [0, 0]

    def watch() -> None:
        room = os.statvfs(place)
        used = (room.f_blocks - room.f_bfree) * room.f_frsize, room.f_files - room.f_ffree
        most[:] = map(max, most, used)

    with tmpfs("size=512m") as place:
        outcome = call(place, command, watch=watch)
        assert outcome.code == 0, outcome.err
        return weights(place, command), most[0], most[1]


def check(command: str, limit: str, expected: str) -> Case:
    """Run on a file system with `limit` (mount options), lift it, go on."""
    resumable = COMMANDS[command][1] if command == "distill" else None
    with tmpfs(limit) as place:
        first = call(place, command)
        problems = []
        if first.code not in (0, 2, 3):
            problems.append(f"ended with {_code(first.code)}")
        if first.code in (2, 3):
            if str(place) not in first.err:
                problems.append("names no path on the full disk")
            if "hint:" not in first.err:
                problems.append("names no remedy")
        if any(word in first.err for word in ("bug", "Traceback", "SafetensorError", "unexpected pos")):
            problems.append("talks of a bug")
        second = None
        if first.code != 0:
            subprocess.run(["mount", "-o", "remount,size=512m,nr_inodes=0", place], check=True, capture_output=True)
            second = call(place, command, *(["--resume"] if resumable and (place / resumable).exists() else []))
            if second.code != 0:
                problems.append(f"did not go on: {_code(second.code)}")
        if not problems and weights(place, command) != expected:
            problems.append("gave other weights")
        if not problems and (left := [path for path in place.rglob(".*") if path.name not in (".", "..")]):
            problems.append(f"left {left[0]}")
        return Case(limit, first, second, problems)


def _code(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def limits(used: int, files: int, sizes: int, inodes: int) -> list[str]:
    """Return mount options from far too little to nearly enough."""
    block = 4096
    steps = [max(block, int(used * (i + 0.5) / sizes) // block * block) for i in range(sizes)]
    counts = [max(2, round(files * (i + 0.5) / inodes)) for i in range(inodes)]
    return [f"size={size}" for size in steps] + [f"size=512m,nr_inodes={count}" for count in counts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--inodes", type=int, default=10)
    parser.add_argument("--command", choices=COMMANDS, default="distill")
    parser.add_argument("--limit", help="one set of mount options, such as size=100k")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        expected, used, files = measure(given.command)
        print(f"without limits there are up to {used:,} bytes in {files} files and folders")
        cases = [given.limit] if given.limit else limits(used, files, given.sizes, given.inodes)
        failed = 0
        for limit in cases:
            case = check(given.command, limit, expected)
            failed += bool(case.problems)
            lines = [line for line in case.first.err.splitlines() if line.startswith(("error:", "  hint:"))]
            print(f"{limit}: exit {case.first.code}", *lines, sep="\n    ")
            for problem in case.problems:
                print(f"    PROBLEM: {problem}")
            if case.problems:
                for outcome in filter(None, (case.first, case.second)):
                    print("      | " + "\n      | ".join(outcome.err.splitlines()[-12:]))
        print(f"{len(cases)} limits, {failed} with problems")
        os.chdir("/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
