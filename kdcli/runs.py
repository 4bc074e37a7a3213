"""The run folder: the only place that knows where in it things are."""

import contextlib
import datetime
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kdcli.errors import InputError
from kdcli.files import write_json, write_text

if TYPE_CHECKING:
    from kdcli.recipe.schema import Recipe

LATEST = "latest"


@dataclass(frozen=True)
class Run:
    """One `distill`: recipe.toml, run.json, checkpoints/, log/, student/, and onnx/ once it is exported.

    made: the folders that were made for it, the innermost first.
    """

    path: Path
    made: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def student(self) -> Path:
        return self.path / "student"

    def tuned(self, task: str) -> Path:
        """Return the folder of a general student that was fine-tuned on `task`."""
        return self.path / "finetune" / task

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def onnx(self) -> Path:
        return self.path / "onnx"

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says; empty when there is none yet. Raises InputError when it is broken."""
        file = self.path / "run.json"
        if not file.is_file():
            return {}
        hint = "start the run again with --force"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is not valid JSON: {error}", hint=hint) from error
        if not isinstance(record, dict):
            raise InputError(f"{file} is no record of a run", hint=hint)
        return record

    def update(self, changes: dict[str, Any]) -> None:
        """Merge `changes` into run.json, atomically."""
        write_json(self.path / "run.json", {**self.record, **changes})

    def begin(
        self,
        *,
        recipe: dict[str, Any],
        portable: dict[str, Any],
        source: Path,
        overrides: list[str],
        seed: int,
        versions: dict[str, str],
    ) -> None:
        """Write recipe.toml and the first run.json. portable: the recipe as it can be run from the run's folder."""
        write_text(self.path / "recipe.toml", to_toml(portable))
        self.update(
            {
                "name": self.name,
                "status": "running",
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "recipe": recipe,
                "recipe_file": str(source),
                "recipe_folder": str(source.resolve().parent),
                "overrides": overrides,
                "seed": seed,
                "versions": versions,
            }
        )

    def mark_failed(self) -> None:
        """Say in run.json that the run ended early, as far as the disk still lets us."""
        with contextlib.suppress(OSError, InputError):
            if self.path.is_dir():
                self.update({"status": "failed"})

    @property
    def _replaced(self) -> Path:
        """Where the run that this one is to replace waits until there is something to replace it with."""
        return self.path.parent / f".{self.name}.replaced"

    def settle(self) -> None:
        """Let go of the run that this one replaces: this one holds work of its own now."""
        shutil.rmtree(self._replaced, ignore_errors=True)

    def discard(self) -> None:
        """Remove a run that never started, and put back the one that it was to replace."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            if self._replaced.is_dir():
                os.replace(self._replaced, self.path)
            for folder in self.made:
                folder.rmdir()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the run while the block runs. Raises InputError when one is at work in it."""
        lock = _lock(self.path)
        try:
            yield
        finally:
            _unlock(lock)

    def mark_latest(self) -> None:
        """Let `latest` point to this run: a relative link, or a text file where links cannot be made."""
        link = self.path.parent / LATEST
        temporary = self.path.parent / f".{LATEST}.{os.getpid()}"
        try:
            os.symlink(self.name, temporary)
            os.replace(temporary, link)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if link.is_dir() and not link.is_symlink():
                return
            write_text(link, self.name + "\n")


@contextlib.contextmanager
def timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Write under `key` how many seconds the block took."""
    begun = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - begun, 3)


def _lock(path: Path) -> FileLock:
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"another kdcli is at work in {path}", hint="wait for it, or --set name=OTHER") from None
    return lock


def _unlock(lock: FileLock) -> None:
    lock.release()
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()


def check_place(root: Path, name: str, *, force: bool, resume: bool) -> Run:
    """Return the run `name` under `root` as it stands; writes nothing.

    Raises InputError when it exists and neither `force` nor `resume` is given, when there is nothing to resume, or when
    the place cannot be written to.
    """
    if not name or name in (LATEST, ".", "..") or "/" in name or os.sep in name:
        raise InputError(f"{name!r} cannot be a run's name", where="name", hint="use a plain word")
    run = Run(root / name)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "it is no folder" if not there.is_dir() else "no permission"
        raise InputError(f"cannot write to {root}: {there}: {reason}")
    if resume and not run.path.is_dir():
        raise InputError(f"there is no run at {run.path} to resume", hint="leave out --resume")
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file where the run's folder should be", hint="move it, or --set name=OTHER")
    if run.path.exists() and any(run.path.iterdir()) and not (force or resume):
        raise InputError(
            f"{run.path} exists already",
            hint="--force to replace it, --resume to go on with it, or --set name=OTHER",
        )
    return run


def place_of_run(recipe: "Recipe", recipe_path: Path, output: Path | None) -> tuple[Path, str]:
    """Return the folder for runs and the name of a recipe's run. output: comes before the folder in the recipe."""
    base = recipe_path.resolve().parent
    root = output or (base / Path(recipe.output).expanduser() if recipe.output else Path("runs"))
    return root, recipe.name or recipe_path.stem


def find_run(root: Path, name: str, recipe: dict[str, Any], *, force: bool, resume: bool) -> Run:
    """Return the run as it stands; writes nothing. recipe: as `run.json` holds it.

    Raises InputError where `check_place` does, and when it is to be resumed but was begun with another recipe.
    """
    run = check_place(root, name, force=force, resume=resume)
    if resume and run.record and run.record.get("recipe") != recipe:
        raise InputError(
            f"{run.path} was started with another recipe",
            hint="go back to that recipe, or start again with --force",
        )
    return run


def open_run(root: Path, name: str, *, force: bool, resume: bool, create: bool = True) -> Run:
    """Return the run `name` under `root`, its folder made and free to write to.

    A run that `force` replaces waits beside it, until `settle` removes it or `discard` puts it back.
    Raises InputError when it exists and neither `force` nor `resume` is given, when there is nothing to resume, when
    another process is at work in it, or when the place cannot be written to.
    """
    if not create:
        return Run(root / name)
    run = check_place(root, name, force=force, resume=resume)
    made = tuple(folder for folder in (root, *root.parents) if not folder.exists())
    run = Run(run.path, made)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
        if run.path.exists():
            _unlock(_lock(run.path))
        if force and run.path.exists():
            if run._replaced.exists():
                # What is here was to replace that, and was killed before it could.
                shutil.rmtree(run.path)
            else:
                os.replace(run.path, run._replaced)
        run.path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {root}: {error.strerror}") from error
    return run


def latest_run(root: Path | None = None) -> Run:
    """Return the newest finished run under `root` (default: runs/ here). Raises InputError when there is none."""
    root = root or Path("runs")
    link = root / LATEST
    path = None
    if link.is_dir():
        path = link.resolve()
    elif link.is_file():
        path = root / link.read_text(encoding="utf-8").strip()
    if path is None or not (path / "student").is_dir():
        raise InputError(
            f"no run yet: there is no {link}",
            hint="run `kdcli distill RECIPE` here first, or name a model folder",
        )
    return Run(path)


def run_of_model(folder: Path) -> Run | None:
    """Return the run that a model folder (its student/, onnx/ or finetune/TASK/) belongs to, if any."""
    folder = folder.resolve()
    parent = folder.parent
    if parent.name == "finetune":
        parent = parent.parent
    elif folder.name not in ("student", "onnx"):
        return None
    run = Run(parent)
    return run if "recipe" in run.record else None


def to_toml(document: dict[str, Any]) -> str:
    """Return `document` as TOML: first the plain values, then a table a nested dictionary."""
    lines: list[str] = []

    def write(table: dict[str, Any], path: tuple[str, ...]) -> None:
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        nested = {k: v for k, v in table.items() if isinstance(v, dict)}
        if path and (plain or not nested):
            lines.append(f"\n[{'.'.join(map(_key, path))}]")
        lines.extend(f"{_key(k)} = {_value(v)}" for k, v in plain.items() if v is not None)
        for key, value in nested.items():
            write(value, (*path, key))

    write(document, ())
    return "\n".join(lines).lstrip("\n") + "\n"


def _key(name: str) -> str:
    bare = name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if bare else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
