"""Locks between processes, which end with the process that holds them, however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def _forget() -> None:
    # A child of fork (a data loader's worker) must not hold what its parent held when that is killed.
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class BusyError(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock that `path` stands for while the block runs; its folder is made, the file goes when it is let go.

    Raises BusyError when another process holds it, OSError when the place cannot be written to.
    """
    if fcntl is None:
        from filelock import FileLock, Timeout

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, blocking=False):
                yield
        except Timeout:
            raise BusyError(path) from None
        return
    handle = _open_and_take(path)
    try:
        yield
    finally:
        # Removed first: who finds no file makes a new one, who has the old one open sees that it is gone.
        with contextlib.suppress(OSError):
            path.unlink()
        _close(handle)


def _open_and_take(path: Path) -> int:
    lost: OSError | None = None
    for _ in range(1000):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        except FileNotFoundError as error:
            # Another process has just removed the folder that it had made for itself; or nothing can be made there.
            lost = error
            continue
        lost = None
        _held.add(handle)
        if _take(handle) is False:
            _close(handle)
            raise BusyError(path)
        # Its last holder may have removed the file between our opening and our locking it: that one locks nothing.
        if _is_at(handle, path):
            return handle
        _close(handle)
    if lost is not None:
        raise lost
    raise BusyError(path)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[bool]:
    """Mark a folder that this process has just made as in use while the block runs; False when it was lost meanwhile.

    Another process that takes it for a leftover must not remove it.
    """
    if fcntl is None:
        yield True
        return
    handle = _hold(folder, certainly=False)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _close(handle)


@contextlib.contextmanager
def if_unused(path: Path) -> Iterator[bool]:
    """Say whether no living process uses `path`, and keep it so while the block runs; False where that is not known."""
    handle = _hold(path, certainly=True) if fcntl is not None else None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            _close(handle)


def _hold(path: Path, *, certainly: bool) -> int | None:
    try:
        handle = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return None
    _held.add(handle)
    taken = _take(handle)
    if (taken if certainly else taken is not False) and _is_at(handle, path):
        return handle
    _close(handle)
    return None


def _take(handle: int) -> bool | None:
    """Lock a file without waiting. False when another process has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # That nothing protects there is no reason to refuse all work.
        return None
    return True


def _close(handle: int) -> None:
    if handle in _held:
        _held.discard(handle)
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        there, ours = os.stat(path, follow_symlinks=False), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
