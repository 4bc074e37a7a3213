"""Names that become folders: of runs, of tasks, of a comparison's rows. The only place that makes a path of one."""

import unicodedata
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from kdcli.errors import InputError

LATEST = "latest"
"""The name beside the runs that stands for the newest one."""

LONGEST = 100
_BYTES = 200
"""What file systems take is 255 bytes, and temporary names are a little longer than the name itself."""

_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³")}
"""What Windows takes for a device, with any ending."""

_BLANK = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and signs that show nothing."""

_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def problem_of(name: str) -> str | None:
    """Return why `name` cannot be the name of a folder, after "it"; None when it can. Letters of any script can."""
    if not name:
        return "is empty"
    if len(name) > LONGEST or len(name.encode("utf-8", "replace")) > _BYTES:
        return f"is too long: at most {LONGEST} characters, and {_BYTES} bytes of UTF-8"
    for character in name:
        if character in "/\\":
            return f"has a {character} in it: a name is no path"
        if character in ':*?"<>|':
            return f"has a {character} in it, which some file systems do not take"
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or (
            unicodedata.bidirectional(character) in _DIRECTIONS or character in "\u200e\u200f\u061c"
        ):
            return f"has the control character U+{ord(character):04X} in it"
    if name[0] in "-.":
        return f"begins with a {'dash' if name[0] == '-' else 'dot'}"
    if name[0].isspace() or name[-1].isspace() or name[-1] == ".":
        return "begins or ends with a space or ends with a dot"
    if all(unicodedata.category(c) in ("Cf", "Mn", "Zs") or c in _BLANK for c in name):
        return "has nothing in it that can be seen"
    if name.split(".")[0].rstrip().casefold() in _DEVICES:
        return "is the name of a device on Windows"
    return "is kdcli's own name for the newest run" if same_folder(name) == LATEST else None


def safe_name(name: str) -> str:
    """Return `name`. Raises ValueError when it cannot be the name of a folder."""
    if problem := problem_of(name):
        raise ValueError(f"{_shown(name)} cannot be a name: it {problem}")
    return name


Name = Annotated[str, AfterValidator(safe_name)]
"""A name in a recipe that becomes a folder's."""


def folder_of(parent: Path, name: str, *, where: str = "name") -> Path:
    """Return the folder `name` in `parent`. Raises InputError, naming the field, when the name is none for a folder."""
    return parent / checked(name, where)


def checked(name: str, where: str = "name") -> str:
    """Return `name`. Raises InputError, naming the field `where`, when it cannot be the name of a folder."""
    if problem := problem_of(name):
        hint = "use a plain word" + (", such as --set name=mine" if where == "name" else "")
        raise InputError(f"{_shown(name)} cannot be a name: it {problem}", where=where, hint=hint)
    return name


def same_folder(name: str) -> str:
    """Return a form of `name` that is equal for names which some file systems take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _shown(name: str) -> str:
    shown = ascii(name) if not name.isprintable() else repr(name)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
