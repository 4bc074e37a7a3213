"""What libraries raise on a disk that takes nothing more is told as that; what is a bug stays one."""

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import tokenizer

from kdcli.errors import InputError, RunError
from kdcli.faults import explain, unwritable, writing

TARGET = Path("runs/one/student")


def safetensors_file(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(100_000)}, path)


def json_file(path: Path) -> None:
    with path.open("w") as file:
        json.dump(list(range(100_000)), file)


def tokenizer_file(path: Path) -> None:
    tokenizer().backend_tokenizer.save(str(path))


def torch_file(path: Path) -> None:
    torch.save({"weight": torch.zeros(100_000)}, path)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Let this process write files of 4 KB at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [safetensors_file, json_file, tokenizer_file, torch_file])
def test_every_writer_that_the_system_stops_names_the_file_and_a_remedy(write: Callable[[Path], None], tmp_path: Path):
    with pytest.raises(OSError) as caught, writing(TARGET), small_files():
        write(tmp_path / "file")
    told = explain(caught.value)
    # C++ does not say why a file is torn.
    expected = "the disk failed at" if write is torch_file else "larger than is allowed"
    assert isinstance(told, RunError) and expected in told.message and told.hint is not None
    assert str(TARGET) in told.message


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "cannot write /data/x: the disk is full"),
        (errno.EDQUOT, "cannot write /data/x: your quota is used up"),
        (errno.EACCES, "no permission for /data/x"),
        (errno.EPERM, "no permission for /data/x"),
        (errno.EROFS, "cannot write /data/x: its file system is read-only"),
        (errno.EIO, "the disk failed at /data/x"),
        (errno.EMFILE, "too many files are open"),
        (errno.EFBIG, "larger than is allowed"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_file_and_a_remedy(number: int, words: str):
    for error in (OSError(number, os.strerror(number), "/data/x"), RuntimeError("inside a library")):
        if not isinstance(error, OSError):
            error.__cause__ = OSError(number, os.strerror(number), "/data/x")
        told = explain(error)
        assert told is not None and told.exit_code == 3 and words in told.message and told.hint


def test_a_place_that_the_user_chose_is_input_and_a_full_disk_is_not():
    assert isinstance(unwritable(TARGET, PermissionError(errno.EACCES, "Permission denied")), InputError)
    full = unwritable(TARGET, OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(full, OSError) and full.filename == str(TARGET)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("unexpected keyword"), RuntimeError("shapes differ"), TypeError("no"), AssertionError()],
)
def test_what_may_be_a_bug_is_not_explained_away(error: Exception):
    assert explain(error) is None
    with pytest.raises(type(error)), writing(TARGET):
        raise error
