"""What disks, rights and memory do to a program, said in words: which file, what is the matter, what to do."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from kdcli.errors import InputError, KdcliError, RunError, cut

_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
"""How Rust's libraries (safetensors, tokenizers) and wrapped messages give the number of an error."""

_TORN = ("unexpected pos", "PytorchStreamWriter failed", "basic_ios::clear", "iostream error", "file write failed")
"""What C++ says of a file that it could not write to its end; it does not say why."""

_NO_MEMORY = "can't allocate memory"

_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by|exited unexpectedly)")
"""How PyTorch says that a process that prepares batches has ended."""

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE)

_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of words that can be no path: they are the user's."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let whatever fails in the block because `path` cannot be written be an OSError that names it."""
    try:
        yield
    except KdcliError:
        raise
    except OSError as error:
        # A temporary name says nothing to the user.
        named = error.filename is not None and ".kdcli-" not in str(error.filename)
        if not named and error.errno in (*_OF_THE_DISK, errno.EACCES, errno.EPERM):
            error.filename, error.filename2 = str(path), None
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None and any(words in str(error) for words in _TORN):
            number = errno.ENOSPC if _is_full(path) else errno.EIO
        if number not in _OF_THE_DISK:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def unwritable(place: Path, error: OSError) -> Exception:
    """Return what to raise for a place that nothing can be written to: the user's choice is at fault, or the disk."""
    if error.errno in _OF_THE_DISK and error.errno != errno.EROFS:
        error.filename = str(place)
        return error
    return InputError(f"cannot write to {place}: {error.strerror}", hint="choose another place, or allow writing there")


def explain(error: BaseException) -> KdcliError | None:
    """Return an error in the user's words for what is no fault of the program; None when it may be one."""
    if isinstance(error, KdcliError):
        return error
    for part in _chain(error):
        if isinstance(part, MemoryError) or type(part).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(part):
            hint = "set a smaller train.batch_size or task.max_length, or end other programs"
            return RunError("there is not enough memory", hint=hint)
        if _WORKER.search(str(part)):
            return RunError(
                "a process that prepares batches was ended, most likely for want of memory",
                hint="set a smaller train.workers or train.batch_size, then run the command again with --resume",
            )
        if isinstance(part, OSError) and part.errno is not None:
            return _explained(part.errno, part.filename, part.strerror)
        if (number := _number_of(part)) is not None:
            return _explained(number, None, os.strerror(number))
    if type(error).__name__ == "SafetensorError":
        return RunError(f"a file of weights is broken: {error}", hint="make it again: --force, or delete it")
    return None


def _explained(number: int, name: object, reason: str | None) -> KdcliError:
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    if number in _NO_PATH:
        shown = f": {cut(str(path))}" if path is not None else ""
        return InputError(f"{(reason or os.strerror(number)).lower()}{shown}", hint="give another path")
    again = "then run the command again (a distill with --resume)"
    at = f" {path}" if path is not None else " a file"
    if number == errno.ENOSPC and path is not None and _lacks_inodes(path):
        what = f"cannot write{at}: its disk takes no more files (no free inodes)"
        return RunError(what, hint=f"remove some files there, {again}")
    message, hint = {
        errno.ENOSPC: (f"cannot write{at}: the disk is full", f"free some space there, {again}"),
        errno.EDQUOT: (f"cannot write{at}: your quota is used up", f"remove some files, {again}"),
        errno.EACCES: (f"no permission for{at}", "check its owner and mode, and those of its folder"),
        errno.EPERM: (f"no permission for{at}", "check its owner and mode, and those of its folder"),
        errno.EROFS: (f"cannot write{at}: its file system is read-only", "choose another place for it"),
        errno.EIO: (f"the disk failed at{at}: {reason}", "check the disk; the system's log may say more"),
        errno.EFBIG: (f"cannot write{at}: it is larger than is allowed", "raise the limit (ulimit -f)"),
        errno.EMFILE: (f"cannot open{at}: too many files are open", "raise the limit: ulimit -n 4096"),
        errno.ENFILE: (f"cannot open{at}: too many files are open", "end other programs"),
    }.get(number, (f"{reason or os.strerror(number)}:{at}", None))
    return RunError(message, hint=hint)


def _chain(error: BaseException) -> Iterator[BaseException]:
    part: BaseException | None = error
    for _ in range(10):
        if part is None:
            return
        yield part
        part = part.__cause__ or part.__context__


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if found := _NUMBER.search(str(error)):
        return int(found[1] or found[2])
    # C++ gives the words alone.
    return next((number for number in _OF_THE_DISK if os.strerror(number) in str(error)), None)


def _is_full(path: Path) -> bool:
    room = _room(path)
    return room is not None and (room.f_bavail * room.f_frsize < 1 << 20 or _lacks_inodes(path))


def _lacks_inodes(path: Path) -> bool:
    room = _room(path)
    # A few have come back with what was removed since.
    return room is not None and room.f_files > 0 and room.f_favail < 64 and room.f_bavail * room.f_frsize >= 1 << 20


def _room(path: Path) -> os.statvfs_result | None:
    if not hasattr(os, "statvfs"):
        return None
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return os.statvfs(folder)
    return None
