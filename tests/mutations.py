"""Plausible one-line faults, planted one at a time: each must make some test fail. Run by hand:

    python tests/mutations.py                      all of them, after one run of their tests without any fault
    python tests/mutations.py methods/makd.py 17   those of a file, and number 17
    python tests/mutations.py --list

They are listed in mutations.txt.
The package and its tests are copied to a temporary folder; the working tree stays as it is. The exit code is 1 when
a fault was missed, when the text that it changes is not there exactly once, or when its tests could not be run.
"""

import argparse
import contextlib
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kdcli", "tests", "recipes", "pyproject.toml", "README.md")
TIMEOUT = 600.0
"""Seconds that the tests of one fault may take: more than that is a fault that was noticed."""


@dataclass(frozen=True)
class Mutation:
    """A fault: in `file` of the package, `old`, which stands there exactly once, becomes `new`.

    tests: arguments of pytest, those first that are expected to fail.
    """

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutations(path: Path) -> list[Mutation]:
    """Return the faults of a file, whose first lines say how it is written."""
    found: list[Mutation] = []
    file, head = "", ""
    sides: dict[str, list[str]] = {"-": [], "+": []}

    def close() -> None:
        if head:
            what, _, tests = head.rpartition(": ")
            names = tuple(_argument(name) for name in tests.split())
            found.append(Mutation(file, what, "\n".join(sides["-"]), "\n".join(sides["+"]), names))
        sides["-"], sides["+"] = [], []

    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("=== "):
            close()
            file, head = line.removeprefix("=== "), ""
        elif line.startswith("# "):
            close()
            head = line.removeprefix("# ")
        elif line[:1] in sides:
            sides[line[0]].append(line[1:])
    close()
    return found


def _argument(name: str) -> str:
    path, colons, test = name.partition("::")
    file = Path("tests", f"{path}.py")
    return f"{file if (ROOT / file).exists() else file.with_suffix('')}{colons}{test}"


MUTATIONS = read_mutations(ROOT / "tests" / "mutations.txt")


def copy_to(folder: Path) -> None:
    """Copy what the tests need to `folder`."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mutations.py"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str], log: Path) -> None:
    """Run the tests on the copy of the package in `folder`, in a process of its own, which ends with pytest's code."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [
        str(folder),
        *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")),
    ]
    import pytest

    code = int(pytest.main(["-x", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]))
    if not str(sys.modules["kdcli"].__file__).startswith(str(folder)):
        code = 99
    sys.stdout.flush()
    os._exit(code)


def outcome(tests: Sequence[str], plant: Mutation | None = None) -> tuple[str, str]:
    """Return what became of a copy with `plant`, or of one without any fault, and the test that failed."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name).resolve()
        copy_to(folder)
        if plant is not None:
            file = folder / "kdcli" / plant.file
            text = file.read_text(encoding="utf-8")
            if text.count(plant.old) != 1:
                return f"old text found {text.count(plant.old)} times", ""
            file.write_text(text.replace(plant.old, plant.new), encoding="utf-8")
        log = folder / "log"
        process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests, log))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, 9)
            process.join()
            return "caught", "(took too long)"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "")
        if process.exitcode == 0:
            return "MISSED", ""
        if process.exitcode == 1:
            return "caught", failed.partition(" - ")[0].removeprefix("FAILED ")
        return f"tests ended with code {process.exitcode}", failed or "; ".join(lines[-3:])


def chosen(names: Sequence[str]) -> list[tuple[int, Mutation]]:
    """Return the mutations of the given numbers (from 1) and files; all of them without any."""
    numbered = list(enumerate(MUTATIONS, 1))
    found = [(n, m) for n, m in numbered if not names or str(n) in names or m.file.removeprefix("kdcli/") in names]
    if unknown := [x for x in names if x not in {str(n) for n, _ in numbered} | {m.file for _, m in numbered}]:
        sys.exit(f"no mutation is called {unknown[0]}: give a number or a file such as {MUTATIONS[0].file}")
    return found


def main() -> int:
    """Plant what is asked for, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="numbers, or files of the package; all without any")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="show them, and run nothing")
    parser.add_argument("--no-baseline", action="store_true", help="take it for granted that the tests pass without")
    options = parser.parse_args()
    mutations = chosen(options.names)
    if options.list:
        for number, one in mutations:
            print(f"{number:3}  {one.file}: {one.what}")
        return 0
    sys.dont_write_bytecode = True
    for name, value in (("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    # torchvision may need it; of the package nothing else happens here.
    runpy.run_path(str(ROOT / "kdcli" / "vision_operators.py"))["declare_on_import"]()
    # Imported once: every process below starts with them. Nothing of the package itself may be among them.
    import datasets  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    assert "kdcli" not in sys.modules
    if not options.no_baseline:
        found, where = outcome(list(dict.fromkeys(test for _, one in mutations for test in one.tests)))
        if found != "MISSED":
            print(f"the tests do not pass without a fault: {where or found}")
            return 1
    bad = 0
    print("| # | file | fault | outcome | test | seconds |\n| ---: | --- | --- | --- | --- | ---: |")

    def run(numbered: tuple[int, Mutation]) -> tuple[int, Mutation, str, str, float]:
        start = time.monotonic()
        found, where = outcome(numbered[1].tests, numbered[1])
        return (*numbered, found, where, time.monotonic() - start)

    with ThreadPoolExecutor(options.jobs) as pool:
        for number, one, found, where, took in pool.map(run, mutations):
            bad += found != "caught"
            print(f"| {number} | {one.file} | {one.what} | {found} | {where} | {took:.0f} |", flush=True)
    print(f"\n{len(mutations) - bad} of {len(mutations)} caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
