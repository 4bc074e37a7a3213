"""What a folder holds, by name, size and SHA-256: what was damaged, lost or exchanged since is found on reading."""

import json
from pathlib import Path
from typing import Any

from kdcli.errors import RunError
from kdcli.files import fingerprint, sha256_of_file, write_json

MANIFEST = "kdcli_manifest.json"
"""The file that a folder gets last: without it the folder is what a killed run left."""

Files = dict[str, dict[str, Any]]
"""{path relative to the folder: {"bytes": size, "sha256": hex digits}}."""


def files_of(folder: Path) -> Files:
    """Return every file below `folder` but its manifest, in the order of their names."""
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for name, path in _found(folder).items()
    }


def _found(folder: Path) -> dict[str, Path]:
    # Hidden files are a file system's or an editor's own; no library reads them.
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    found.pop(MANIFEST, None)
    return found


def difference(folder: Path, files: Files, *, ignore: tuple[str, ...] = ()) -> str | None:
    """Return the first thing in `folder` that is not as `files` says ("x is missing"); None when all is.

    Sizes are compared before any file is read. ignore: names that do not count.
    """
    found = {name: path for name, path in _found(folder).items() if name not in ignore}
    for name in files:
        if name not in found:
            return f"{name} is missing"
    for name in found:
        if name not in files:
            return f"{name} does not belong there"
    for name, expected in files.items():
        if (size := found[name].stat().st_size) != expected["bytes"]:
            return f"{name} has {size:,} bytes, not {expected['bytes']:,}"
    for name, expected in files.items():
        if sha256_of_file(found[name]) != expected["sha256"]:
            return f"{name} was changed after it was written (its SHA-256 differs)"
    return None


def write_manifest(folder: Path, of: Any) -> None:
    """Write what `folder` holds now into its manifest, atomically. of: plain values that say what it was made from."""
    content = {"of": fingerprint(of), "files": files_of(folder)}
    write_json(folder / MANIFEST, {**content, "sha256": fingerprint(content)})


def check_manifest(folder: Path, of: Any = None) -> str | None:
    """Return what is wrong with a folder that has a manifest, as a sentence; None when all of it is there.

    Everything that was written is there, unchanged, and nothing else, and it was made from `of`, if that is given.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = {"of": manifest["of"], "files": manifest["files"]}
        if manifest["sha256"] != fingerprint(content):
            return f"{MANIFEST} was changed after it was written"
        if of is not None and content["of"] != fingerprint(of):
            return "it was made from other settings or data"
        return difference(folder, content["files"])
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"


def is_sealed(folder: Path) -> bool:
    """True when `folder` was written to its end: it has a manifest."""
    return (folder / MANIFEST).is_file()


def require(folder: Path, of: Any, hint: str) -> None:
    """Raise RunError, naming the folder and what is wrong with it, unless all of it is there."""
    problem = check_manifest(folder, of) if is_sealed(folder) else "it was not written to its end"
    if problem is not None:
        raise RunError(f"{folder} cannot be used: {problem}", hint=hint)
