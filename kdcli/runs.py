"""The run folder: the only place that knows where in it things are."""

import contextlib
import datetime
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.faults import unwritable
from kdcli.files import (
    cache_dir,
    check_free,
    expanded,
    has_marker,
    remove,
    remove_empty,
    remove_leftovers,
    replace,
    temporary_folder,
    to_json_text,
    write_json,
    write_marker,
    write_text,
)
from kdcli.interrupts import finishing, tidying
from kdcli.locks import BusyError, lock_file
from kdcli.manifest import difference, files_of
from kdcli.names import LATEST, checked, folder_of, problem_of
from kdcli.records import CHECKSUM, RunRecord, checksum, read_document, typed

if TYPE_CHECKING:
    from kdcli.recipe.schema import Recipe

CARD = "README.md"
RECORD = "run.json"


@dataclass(frozen=True)
class Run:
    """One `distill`: recipe.toml, run.json, checkpoints/, log/, student/, and onnx/ once it is exported."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def student(self) -> Path:
        return self.path / "student"

    def tuned(self, task: str) -> Path:
        """Return the folder of a general student that was fine-tuned on `task`."""
        return folder_of(self.path / "finetune", task, where="finetune.task.name")

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
    def begun(self) -> bool:
        """True when the folder is a run's, however far that came."""
        return has_marker(self.path) or (self.path / RECORD).is_file()

    @property
    def document(self) -> dict[str, Any]:
        """What run.json says, as JSON; empty when there is none yet.

        Raises InputError when it is broken, or was changed by something else than kdcli.
        """
        return read_document(self.path / RECORD)

    @property
    def record(self) -> RunRecord | None:
        """What run.json says; None when there is none yet. Raises InputError as `document` does."""
        document = self.document
        return typed(RunRecord, document, self.path / RECORD) if document else None

    @property
    def is_done(self) -> bool:
        """True when the run is finished."""
        return (record := self.record) is not None and record.status == "done"

    def update(self, changes: dict[str, Any]) -> None:
        """Merge `changes` into run.json, atomically."""
        record = json.loads(to_json_text({**self.document, **changes}))
        write_json(self.path / RECORD, {**record, CHECKSUM: checksum(record)})

    @property
    def _files(self) -> dict[str, dict[str, Any]]:
        return record.files if (record := self.record) is not None else {}

    def note_files(self, folder: Path) -> None:
        """Write into run.json what a finished folder of this run holds, for `changed`."""
        name = folder.relative_to(self.path).as_posix()
        files = {file: held for file, held in files_of(folder).items() if file != CARD}
        self.update({"files": {**self._files, name: files}})

    def forget_files(self, folder: Path) -> None:
        """Take out of run.json what a folder holds: it is about to be replaced."""
        files = dict(self._files)
        if files.pop(folder.relative_to(self.path).as_posix(), None) is not None:
            self.update({"files": files})

    def changed(self, folder: Path) -> str | None:
        """Return how a folder of this run differs from what the run wrote there; None when it does not.

        The model card does not count: it is there to be edited.
        """
        files = self._files
        root = self.path.resolve()
        for place in _places(folder):
            name = place.relative_to(root).as_posix() if place.is_relative_to(root) else None
            if name in files:
                return difference(place, files[name], ignore=(CARD,))
        return None

    def check_files(self) -> None:
        """Raise InputError when a folder of the run is not what the run wrote there."""
        for name in self._files:
            if (problem := self.changed(self.path / name)) is not None:
                raise InputError(
                    f"{self.path} is finished, but {self.path / name} is not what it wrote: {problem}",
                    hint="--force makes it again",
                )

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints: the student is safe."""
        remove(self.checkpoints)

    def tidy(self, portable: dict[str, Any] | None = None, *, keep_checkpoints: bool) -> None:
        """Remove what a killed process left in a finished run, as far as the place can be written to.

        portable: as for `begin`; recipe.toml is written again where it says something else.
        """
        with contextlib.suppress(InputError, OSError), self.held():
            if portable is not None:
                self._write_recipe(portable)
            if not keep_checkpoints:
                self.drop_checkpoints()

    def _write_recipe(self, portable: dict[str, Any]) -> None:
        file, text = self.path / "recipe.toml", to_toml(portable)
        if not file.is_file() or file.read_bytes() != text.encode("utf-8"):
            write_text(file, text)

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
        self._write_recipe(portable)
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

    def mark(self, status: str) -> None:
        """Say in run.json how the run ended early ("failed", "interrupted"), as far as the disk still lets us."""
        with contextlib.suppress(OSError, InputError):
            if self.path.is_dir():
                self.update({"status": status})

    @property
    def _replaced(self) -> Path:
        """Where the run that this one is to replace waits until there is something to replace it with."""
        return self.path.parent / f".{self.name}.replaced"

    @property
    def _waits(self) -> bool:
        """True when a run waits there; what else has that name is not ours to touch."""
        return _is_run(self._replaced)

    def settle(self) -> None:
        """Let go of the run that this one replaces: this one holds work of its own now."""
        if self._waits:
            remove(self._replaced)

    def discard(self) -> None:
        """Remove a run that never started, and put back the one that it was to replace."""
        with contextlib.suppress(OSError):
            remove(self.path)
            if self._waits:
                os.replace(self._replaced, self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the run while the block runs; what killed ones left in it is removed.

        Raises InputError when another kdcli process has locked it, or when its folder cannot be written to.
        """
        root = self.path.parent
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        try:
            with tidying(), contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(lock_file(root / f".{self.name}.lock"))
                except BusyError:
                    hint = "wait for it, or --set name=OTHER"
                    raise InputError(f"{self.path} is locked by another kdcli process", hint=hint) from None
                except OSError as error:
                    raise unwritable(root, error) from error
                remove_leftovers(root, below=False)
                remove_leftovers(self.path)
                yield
        finally:
            if not self.path.exists():
                remove_empty(missing)

    def mark_latest(self) -> str | None:
        """Let `latest` point to this run: a relative link, or a text file where links cannot be made.

        Return a note for the user when something of that name is there that kdcli did not make, and so stays.
        """
        link = self.path.parent / LATEST
        if os.path.lexists(link) and not _names_a_run(link):
            return f"{link} was not made by kdcli and stays as it is: name this run, {self.path}, where you need it"
        with temporary_folder(link) as folder:
            try:
                os.symlink(self.name, folder / LATEST)
            except OSError:
                (folder / LATEST).write_text(self.name + "\n", encoding="utf-8")
            os.replace(folder / LATEST, link)
        return None


@contextlib.contextmanager
def timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Write under `key` how many seconds the block took."""
    begun = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - begun, 3)


def check_place(root: Path, name: str, *, force: bool, resume: bool) -> Run:
    """Return the run `name` under `root` as it stands; writes nothing.

    Raises InputError when it exists and neither `force` nor `resume` is given, when there is nothing to resume, or when
    what is there is not a run that may be replaced.
    """
    run = Run(folder_of(root, name))
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "it is no folder" if not there.is_dir() else "no permission"
        raise InputError(f"cannot write to {root}: {there}: {reason}")
    if resume:
        if not run.begun and (run.path.exists() or not run._waits):
            raise InputError(f"there is no run at {run.path} to resume", hint="leave out --resume")
        return run
    other = "--set name=OTHER"
    hints = (f"--force to replace it, --resume to go on with it, or {other}", f"move it, or {other}")
    check_free(run.path, force=force, hints=hints, is_ours=_is_run)
    if run.path.exists() and os.path.lexists(run._replaced) and not run._waits:
        message = f"{run._replaced} was not written by kdcli: a run that is replaced is kept there meanwhile"
        raise InputError(message, hint=hints[1])
    return run


def _is_run(folder: Path) -> bool:
    """True for a folder that a run was begun in."""
    if has_marker(folder):
        return True
    with contextlib.suppress(InputError):
        return {"status", "recipe", "versions"} <= Run(folder).document.keys()
    return False


def _names_a_run(link: Path) -> bool:
    """True for a link, or a text file, that does no more than name a run beside it."""
    if link.is_symlink():
        name = os.readlink(link)
    elif link.is_file():
        with link.open("rb") as file:
            name = file.read(1000).decode("utf-8", "replace").strip()
    else:
        return False
    if problem_of(name) is not None:
        return False
    named = link.with_name(name)
    # A link to a run that was removed since leads nowhere.
    return _is_run(named) or (link.is_symlink() and not os.path.lexists(named))


def check_out(out: Path, *inputs: str | Path | None, force: bool) -> None:
    """Raise InputError when `force` would let a command's folder take the place of its own input, or of a run's part.

    inputs: what the command reads; a model may be a hub's name. Whatever else may be wrong with `out` is told by
    `atomic_folder`.
    """
    if not (force and os.path.lexists(out)):
        return
    whole, hint = out.resolve(), "give another --out"
    for name in inputs:
        if name is None or not os.path.lexists(path := expanded(name)):
            continue
        given = path.resolve()
        if whole == given or whole in given.parents:
            words = "is" if whole == given else "contains"
            raise InputError(f"{out} {words} what is read, {name}, so --force does not replace it", hint=hint)
    for folder in (whole, *whole.parents):
        run = Run(folder)
        if not (folder / RECORD).is_file() or not _is_run(folder):
            continue
        parts = (run.student, run.onnx, run.checkpoints, run.log, run.path / "teacher", run.path / "finetune")
        if whole == folder or any(whole == part or part in whole.parents for part in parts):
            words = "is a run" if whole == folder else f"is a part of the run {folder}"
            raise InputError(f"{out} {words}, so --force does not replace it", hint=hint)
    for place, _, files in os.walk(whole):
        if RECORD in files and _is_run(Path(place)):
            raise InputError(f"{out} contains the run {place}, so --force does not replace it", hint=hint)


def place_of_run(recipe: "Recipe", recipe_path: Path, output: Path | None) -> tuple[Path, str]:
    """Return the folder for runs and the name of a recipe's run. output: comes before the folder in the recipe."""
    base = recipe_path.resolve().parent
    if output is not None:
        root = expanded(output, "--output")
    else:
        root = base / expanded(recipe.output, "output") if recipe.output else Path("runs")
    return root, checked(recipe.name or recipe_path.stem)


def find_run(root: Path, name: str, recipe: dict[str, Any], *, force: bool, resume: bool) -> Run:
    """Return the run as it stands; writes nothing. recipe: as `run.json` holds it.

    Raises InputError where `check_place` does, and when it is to be resumed but was begun with another recipe.
    """
    run = check_place(root, name, force=force, resume=resume)
    if resume:
        check_same_recipe(run, recipe)
    return run


def check_same_recipe(run: Run, recipe: dict[str, Any]) -> None:
    """Raise InputError when the run was begun with another recipe. recipe: as `run.json` holds it."""
    record = run.record
    # A run of ours may have been stopped before it wrote its recipe down.
    written = recipe if record is None or (record.recipe is None and has_marker(run.path)) else record.recipe
    if written != recipe:
        raise InputError(
            f"{run.path} was started with another recipe",
            hint="go back to that recipe, or start again with --force",
        )


@contextlib.contextmanager
def open_run(root: Path, name: str, *, force: bool, resume: bool, create: bool = True) -> Iterator[Run]:
    """Yield the run `name` under `root`, its folder made and free to write to, with no other process in it meanwhile.

    A run that `force` replaces waits beside it, until `settle` removes it or `discard` puts it back.
    Raises InputError where `check_place` does, when another kdcli process has locked it, or when the place cannot be
    written to. create: False in processes that share a run which another one has opened.
    """
    if not create:
        yield Run(folder_of(root, name))
        return
    with Run(folder_of(root, name)).held():
        run = check_place(root, name, force=force, resume=resume)
        remove_leftovers(cache_dir())
        try:
            with finishing():
                _make(run, resume=resume)
        except OSError as error:
            raise unwritable(root, error) from error
        yield run


def remove_run(run: Run) -> None:
    """Remove a run, if there is one. Raises InputError for what is no run, and for one that another process is in."""
    if run.path.exists():
        with run.held():
            check_place(run.path.parent, run.name, force=True, resume=False)
            remove(run.path)


def _make(run: Run, *, resume: bool) -> None:
    if resume:
        if not run.path.is_dir():
            # What was to replace it was killed before it stood in its place.
            os.replace(run._replaced, run.path)
        return
    with temporary_folder(run.path) as folder:
        new = folder / run.name
        new.mkdir()
        write_marker(new)
        if run.path.is_dir() and any(run.path.iterdir()):
            if run._waits:
                # What is here was to replace that, and was killed before it could.
                remove(run.path)
            else:
                os.replace(run.path, run._replaced)
        replace(new, run.path)


def latest_run(root: Path | None = None) -> Run:
    """Return the newest finished run under `root` (default: runs/ here). Raises InputError when there is none."""
    root = root or Path("runs")
    link = root / LATEST
    path = None
    if link.is_dir():
        path = link.resolve()
    elif link.is_file():
        path = folder_of(root, link.read_text(encoding="utf-8", errors="replace").strip(), where=str(link))
    if path is None or not (path / "student").is_dir():
        raise InputError(
            f"no run yet: there is no {link}",
            hint="run `kdcli distill RECIPE` here first, or name a model folder",
        )
    return Run(path)


def run_of_model(folder: Path) -> Run | None:
    """Return the run that a model folder (its student/, onnx/ or finetune/TASK/) belongs to, if any."""
    for place in _places(folder):
        if place.parent.name == "finetune":
            run = Run(place.parent.parent)
        elif place.name in ("student", "onnx"):
            run = Run(place.parent)
        else:
            continue
        if (record := run.record) is not None and record.recipe is not None:
            return run
    return None


def _places(folder: Path) -> list[Path]:
    """Return where a model folder lies: a part of a run may be a link, and belongs to the run by its name there."""
    folder = folder.absolute()
    if ".." in folder.parts[-2:]:
        folder = folder.resolve()
    parent = folder.parent
    return [parent.resolve() / folder.name, parent.parent.resolve() / parent.name / folder.name, folder.resolve()]


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
