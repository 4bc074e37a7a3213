"""Tensors in the cache: a file says what it was made from and what it holds, and is checked when it is read."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from rich.console import Console
from torch import Tensor

from kdcli.files import remove, write_bytes
from kdcli.terminal import tell

KEY = "kdcli"


def _digest(tensors: dict[str, Tensor], of: str) -> str:
    digest = hashlib.sha256(of.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def keep_tensors(path: Path, tensors: dict[str, Tensor], *, of: str) -> None:
    """Write tensors on the CPU to `path`, atomically. of: what they were made from, as a fingerprint.

    The cache only saves time: a full or read-only disk does not end the run.
    """
    with contextlib.suppress(OSError):
        # One entry: several are written in no fixed order, and equal content is to be an equal file.
        metadata = {KEY: json.dumps({"of": of, "sha256": _digest(tensors, of)})}
        if path.is_dir():
            remove(path)
        write_bytes(path, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def kept_tensors(
    path: Path, shapes: Mapping[str, tuple[int | None, ...]] | None, *, of: str, console: Console | None
) -> dict[str, Tensor] | None:
    """Return what `keep_tensors` wrote under `path`; None when there is no such file, or not as it was written.

    shapes: what it must hold, or how the shapes begin; None where `of` says that. console: is told about a file that is
    damaged, and so is made again.
    """
    problem = "it is a folder"
    try:
        if path.is_dir():
            raise IsADirectoryError(problem)
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("of") != of:
            problem = "it was made from something else"
        elif metadata.get("sha256") != _digest(tensors, of):
            problem = "it was changed after it was written (its SHA-256 differs)"
        elif shapes is not None and {
            name: tuple(tensor.shape[: len(shapes.get(name, ()))]) for name, tensor in tensors.items()
        } != dict(shapes):
            problem = "its tensors have other shapes"
        elif not all(tensor.isfinite().all() for tensor in tensors.values()):
            problem = "it contains NaN or inf"
        else:
            return tensors
    except FileNotFoundError:
        return None
    except (OSError, safetensors.SafetensorError, ValueError, AttributeError, RecursionError) as error:
        problem = f"it cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if console is not None:
        tell(console, f"cache: {path} is made again: {problem}")
    return None
