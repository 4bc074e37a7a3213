"""Files that appear whole or not at all, and the hashes that name them."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kdcli import __version__
from kdcli.errors import InputError, cut
from kdcli.faults import unwritable, writing
from kdcli.interrupts import finishing, tidying
from kdcli.locks import if_unused, in_use

MARKER = "kdcli.json"
"""A file that every folder of kdcli's has from its first moment: only what has it is ever replaced."""

_TEMPORARY = re.compile(r"\..+\.kdcli-[a-z0-9_]{8}")
"""What a folder is called that is not finished, or is being removed."""


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.kdcli-{secrets.token_hex(4)}")


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` for what is to become `path`; what is left in it at the end is removed.

    It is this process's while the block runs; of a process that was killed, `remove_leftovers` removes it.
    """
    with tidying():
        for _ in range(100):
            folder = _temporary_name(path)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            with in_use(folder) as ours:
                if not ours:
                    continue
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return
    raise OSError(errno.EBUSY, "temporary folders vanish", str(path.parent))


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, so that `path` is there whole or not at all."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        # A full disk still lets one move it.
        trash = _temporary_name(path)
        os.replace(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(root: Path, *, below: bool = True) -> None:
    """Remove what killed processes left unfinished in `root` and below; what a living one works on stays."""
    for place, folders, _ in os.walk(root):
        for name in [name for name in folders if _TEMPORARY.fullmatch(name)]:
            folders.remove(name)
            path = Path(place) / name
            with if_unused(path) as unused:
                if unused:
                    shutil.rmtree(path, ignore_errors=True)
        if not below:
            return


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one, never a half."""
    with atomic_file(path) as new, new.open("wb") as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that becomes `path` when the block ends without an error."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as folder:
            new = folder / path.name
            yield new
            with new.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically."""
    write_text(path, to_json_text(value) + "\n")


def to_json_text(value: Any) -> str:
    """Return `value` as indented JSON that every parser reads: JSON has no NaN and no infinity, they become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False, ours: bool = False) -> Iterator[Path]:
    """Yield a new folder, with a marker in it, that becomes `path` when the block ends without an error.

    force: replace what kdcli wrote there. ours: the place is inside a run or the cache, and free to be replaced.
    Raises InputError when `path` exists (and is not an empty folder) and may not be replaced, or when the place
    cannot be written to.
    """
    if not ours:
        check_free(path, force=force, hints=("give another --out, or --force to replace it", "give another --out"))
        remove_leftovers(path.parent, below=False)
    missing = [folder for folder in path.parents if not folder.exists()]
    with writing(path), contextlib.ExitStack() as stack:
        # Folders that were made only for this one go, too, unless something else has moved in.
        stack.callback(remove_empty, missing)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(temporary_folder(path))
        except OSError as error:
            raise unwritable(path.parent, error) from error
        folder = temporary / path.name
        folder.mkdir()
        write_marker(folder)
        yield folder
        replace(folder, path)


def replace(folder: Path, path: Path) -> None:
    """Let a finished folder take the place of whatever is at `path`."""
    trash = _temporary_name(path)
    with finishing(), in_use(path):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, trash)
        try:
            os.replace(folder, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.replace(trash, path)
            raise
    if os.path.lexists(trash):
        remove(trash)


def check_free(
    path: Path, *, force: bool, hints: tuple[str, str], is_ours: Callable[[Path], bool] | None = None
) -> None:
    """Raise InputError, naming what is there, unless `path` is free, an empty folder, or one that `force` may replace.

    Only a folder that kdcli wrote is ever replaced, and never the working folder, a home, the root of a file system,
    or what contains one of them. hints: without `force`, and where `force` does not help. is_ours: has kdcli written
    it? By default what has a marker.
    """
    if not os.path.lexists(path):
        return
    whole, own_home = path.resolve(), home()
    places = [(Path.cwd(), "the folder that you are in")]
    if own_home is not None:
        places.append((own_home.resolve(), "your home folder"))
    for place, words in places:
        if whole == place or whole in place.parents:
            raise InputError(f"{whole} {'is' if whole == place else 'contains'} {words}", hint=hints[1])
    if os.path.ismount(whole):
        raise InputError(f"{whole} is the root of a file system", hint=hints[1])
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file where a folder should be", hint=hints[1])
    if path.is_dir() and not any(path.iterdir()):
        return
    if not force:
        raise InputError(f"{path} exists already", hint=hints[0])
    if not (is_ours or has_marker)(path):
        raise InputError(f"{path} was not written by kdcli, so --force does not replace it", hint=hints[1])


def write_marker(folder: Path) -> None:
    """Mark a folder as kdcli's."""
    (folder / MARKER).write_text(to_json_text({"kdcli": __version__}) + "\n", encoding="utf-8")


def has_marker(folder: Path) -> bool:
    """True when kdcli wrote the folder: a file of the marker's name alone says nothing, its content does."""
    file = folder / MARKER
    try:
        if not file.is_file():
            return False
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    # A cached teacher keeps its record there.
    return isinstance(content, dict) and (
        isinstance(content.get("kdcli"), str) or {"identity", "version", "training"} <= content.keys()
    )


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quick_hash_of_file(path: Path) -> str:
    """Return the XXH3 digest (128 bits) of a file, for large ones: it finds damage, not intent."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that name a JSON-able value: equal values, equal names."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def home() -> Path | None:
    """Return the user's home folder; None for a user without one, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: str | Path, where: str | None = None) -> Path:
    """Return a path with `~` and `~user` as the folders that they mean.

    Raises InputError, naming the field or option `where`, when there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        message = f"{cut(str(path))} begins with a home folder that is not known"
        raise InputError(message, where=where, hint="write the whole path") from None


def source_of(model: str, base: Path, where: str = "teacher.model") -> str:
    """Return a model's folder as an absolute path when `model` names one, seen from `base` or from here; else its name.

    Raises InputError as `expanded` does.
    """
    path = expanded(model, where)
    return next((str(place.resolve()) for place in (base / path, path) if place.exists()), model)


def cache_dir() -> Path:
    """Return the folder for things that can be made again: `KDCLI_CACHE`, or `~/.cache/kdcli`.

    Raises InputError when neither is known.
    """
    if own := os.environ.get("KDCLI_CACHE"):
        return expanded(own, "KDCLI_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kdcli"
    if (own_home := home()) is None:
        raise InputError(
            "there is no place for the cache: the home folder is not known", hint="set KDCLI_CACHE or HOME"
        )
    return own_home / ".cache" / "kdcli"
