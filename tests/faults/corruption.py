"""Damages each file that kdcli reads back, and looks whether it is noticed, or made again to the same student.

Run by hand: python tests/faults/corruption.py [--kinds tinybert,makd] [--positions 3]. Every line of the output is a
case with its outcome; the last one counts. The exit code is 1 when damage was silent or was called a bug.

- resumed: a run is killed half-way, a file of it or of the cache is damaged, the run is resumed.
- again: a run is finished, a file of the cache is damaged, the same recipe runs again under another name.
- used: a run is finished, a file of its student, graph or record is damaged; then `eval`, `export` and `--resume`.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kill import Reference, Trial, import_all, make_world_in_a_fork
from worlds import KINDS

HOW = ("flipped", "truncated", "emptied", "removed", "replaced")
IGNORED = ("/log/", ".lock", "README.md", "runs/latest")
"""Parts of the names of files that are for people alone."""


@dataclass(frozen=True)
class Case:
    """A file, and what is done to it. position: of the bit that is flipped, as a share of the file's size."""

    kind: str
    when: str
    file: str
    how: str
    position: float = 0.5

    def __str__(self) -> str:
        at = f" at {self.position:.0%}" if self.how == "flipped" else ""
        return f"{self.kind} {self.when} {self.file} {self.how}{at}"


def damage(root: Path, case: Case) -> bool:
    """Do to the file of a case what the case says; False where that changes nothing."""
    path = root / case.file
    content = path.read_bytes()
    if case.how == "flipped":
        if not content:
            return False
        place = min(int(len(content) * case.position), len(content) - 1)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif case.how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif case.how == "emptied":
        path.write_bytes(b"")
    elif case.how == "removed":
        path.unlink()
        return True
    else:
        # Another file of the same name or kind: of another checkpoint, stage, part of the cache, or run.
        others = [
            one
            for one in sorted(root.rglob(f"*{path.suffix}"))
            if one.is_file() and one.name == path.name and one.read_bytes() != content
        ] or [
            one for one in sorted(path.parent.glob(f"*{path.suffix}")) if one.is_file() and one.read_bytes() != content
        ]
        if not others:
            return False
        shutil.copy(others[-1], path)
    return path.read_bytes() != content


def cases_of(root: Path, kind: str, when: str, tops: list[str], positions: int) -> Iterator[Case]:
    """Yield every damage to every file below some folders of a trial's folder."""
    for top in tops:
        for path in sorted((root / top).rglob("*")):
            name = str(path.relative_to(root))
            if path == root / "runs" / kind / "kdcli.json" and when == "used":
                # Its being there is all that it says.
                continue
            if path.is_symlink() or not path.is_file() or any(part in name for part in IGNORED):
                continue
            for how in HOW:
                if how == "flipped":
                    for number in range(positions):
                        yield Case(kind, when, name, how, (number + 0.5) / positions)
                else:
                    yield Case(kind, when, name, how)


STUDENT = "/student/"


def outcome(reference: Reference, trial: Trial, case: Case) -> str:
    """Damage, go on, and return "same", "noticed", or in words what is wrong."""
    if not damage(trial.folder, case):
        return "nothing to damage"
    trial.forget_output()
    if case.when == "resumed":
        return _same_or_noticed(reference, trial, trial.resume(), case, case.kind)
    if case.when == "again":
        return _same_or_noticed(reference, trial, trial.run("--set", "name=again")[0], case, "again")
    place = f"runs/{case.kind}"
    seen = []
    if case.file.startswith(f"{place}/onnx/"):
        commands = [["eval", f"{place}/onnx"]]
    elif case.file.startswith(f"{place}/student/"):
        commands = [["eval", place], ["distill", f"{case.kind}.toml", "--resume"]]
        if case.file.endswith(".safetensors") and case.how == "flipped":
            commands.append(["export", place, "--no-latency"])
    elif case.file == f"{place}/recipe.toml":
        # Nothing of the program reads it; resumed, the run writes it again.
        code, _ = trial.call(["distill", f"{case.kind}.toml", "--resume"])
        same = trial.files()[case.file] == reference.files[case.file]
        return "same" if code == 0 and same else f"silent (exit code {code})"
    else:
        commands = [["eval", place], ["distill", f"{case.kind}.toml", "--resume"]]
    for words in commands:
        trial.forget_output()
        code, _ = trial.call(words)
        seen.append(_noticed(trial, code, case))
    return "noticed" if all(one == "noticed" for one in seen) else f"{commands}: {seen}"


def _noticed(trial: Trial, code: int, case: Case) -> str:
    told = trial.output()
    if "bug" in told or "Traceback" in told:
        return f"called a bug: {told[-400:]}"
    name = Path(case.file).name
    words = (name, str(Path(case.file).parent))
    if code in (2, 3) and any(word in told for word in words):
        return "noticed"
    if code == 0 and "WARNING" in told and any(word in told for word in words):
        return "noticed"
    return f"silent (exit code {code}): {told[-400:]}"


def _same_or_noticed(reference: Reference, trial: Trial, code: int, case: Case, name: str) -> str:
    if code != 0:
        return _noticed(trial, code, case)
    told = trial.output()
    if "bug" in told or "Traceback" in told:
        return f"called a bug: {told[-400:]}"
    expected = {file: one for file, one in reference.files.items() if STUDENT in file and "README" not in file}
    found = {file.replace(f"runs/{name}/", f"runs/{case.kind}/"): one for file, one in trial.files().items()}
    wrong = [file for file, one in expected.items() if found.get(file) != one]
    return f"silent: another student ({', '.join(wrong)})" if wrong else "same"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="tinybert,makd,dbkd,augment,opdf,export")
    parser.add_argument("--when", default="resumed,again,used")
    parser.add_argument("--how", default=",".join(HOW))
    parser.add_argument("--positions", type=int, default=1, help="bits flipped in each file")
    parser.add_argument("--only", default="", help="part of the files' names")
    options = parser.parse_args()
    import_all()
    root = Path(tempfile.mkdtemp(prefix="kdcli-corruption-"))
    world = root / "world"
    world.mkdir()
    make_world_in_a_fork(world)
    counts: dict[str, int] = {}
    for kind in options.kinds.split(","):
        reference = Reference(world, root, kind)
        for when in options.when.split(","):
            if KINDS[kind].command != "distill" or (when == "used" and kind not in ("export", "opdf")):
                continue
            begun = Trial(world, root / f"{kind}-{when}", kind)
            code, _ = begun.run(event=reference.events * 7 // 10) if when == "resumed" else begun.run()
            if (code == 0) is (when == "resumed"):
                raise SystemExit(f"{kind} ended with {code}: {begun.output()[-1000:]}")
            tops = {"resumed": ["runs", "cache"], "again": ["cache"], "used": ["runs"]}[when]
            for number, case in enumerate(cases_of(begun.folder, kind, when, tops, options.positions)):
                if case.how not in options.how.split(",") or options.only not in case.file:
                    continue
                trial = Trial(begun.folder, root / f"{kind}-{when}-{number}", kind)
                found = outcome(reference, trial, case)
                trial.remove()
                counts[found if len(found) < 20 else "wrong"] = counts.get(found if len(found) < 20 else "wrong", 0) + 1
                print(f"{case}: {found}", flush=True)
            begun.remove()
    shutil.rmtree(root)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())), flush=True)
    return int(bool(counts.get("wrong")))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
