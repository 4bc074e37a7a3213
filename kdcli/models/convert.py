"""From a pickle of weights to safetensors."""

import json
import shutil
from pathlib import Path
from typing import Any

from kdcli.errors import InputError
from kdcli.models.checkpoint import BESIDE, SINGLE, contained, inside, local_folder, open_checkpoint
from kdcli.models.sentence_folder import copy_settings, modules_beside

PICKLE, PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"


def convert_pickle(name: str | Path, folder: Path) -> dict[str, Any]:
    """Write model.safetensors, the configuration and the tokenizer of a pickled model into an existing folder.

    So are the modules of a model of sentence embeddings, each in its folder.
    Returns how many tensors there are, their bytes in millions, and their type.
    Raises InputError when there is no pickle, when it holds anything but tensors, or when a file leads out of
    the folder.
    """
    source = local_folder(name) or _fetched(str(name))
    root, modules = modules_beside(source)
    # Weights of modules alone may be a pickle.
    older = [place for one in modules if _is_pickled(place := root / one.path)]
    tensors = _converted(source, folder, name) if not older or _pickle_of(source) else _copied(source, folder)
    for one in modules:
        place, target = root / one.path, folder / one.path
        if place.is_dir():
            target.mkdir()
            part = _converted(place, target, name) if place in older else _copied(place, target)
            tensors |= {f"{one.path}.{key}": value for key, value in part.items()}
    if modules:
        copy_settings(root, folder)
    made = open_checkpoint(folder, any_family=True)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"tensors": len(tensors), "megabytes": round(size / 1e6, 3), "dtype": made.dtype}


def _pickle_of(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (PICKLE, PICKLES))


def _is_pickled(folder: Path) -> bool:
    return _pickle_of(folder) and not (folder / SINGLE).is_file()


def _converted(source: Path, folder: Path, name: str | Path) -> dict[str, Any]:
    """Write a pickle's tensors as safetensors, and the files beside it; return the tensors."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    for path in _pickles(source, name):
        for key, value in _read(path).items():
            # Tensors that share memory are written one by one.
            tensors[key] = value.contiguous().clone()
    _copy_beside(source, folder)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / SINGLE).chmod((folder / "config.json").stat().st_mode & 0o777)
    return tensors


def _copied(source: Path, folder: Path) -> dict[str, Any]:
    """Copy the files of a folder that has no pickle, or none that is needed; return its tensors."""
    from safetensors.torch import load_file

    _copy_beside(source, folder)
    if not (source / SINGLE).is_file():
        return {}
    shutil.copyfile(contained(source, SINGLE), folder / SINGLE)
    return load_file(folder / SINGLE)


def _copy_beside(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in BESIDE and not path.name.endswith(".index.json"):
            shutil.copyfile(contained(source, path.name), folder / path.name)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [
        "pytorch_model*.bin",
        "*/pytorch_model.bin",
        "*/model.safetensors",
        *(f"*{suffix}" for suffix in BESIDE),
    ]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise InputError(
            f"model {name!r} not found: no local folder and no such hub repository ({type(error).__name__})"
        ) from error


def _pickles(folder: Path, name: str | Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json", hint="give a Hugging Face model folder")
    if (folder / PICKLE).is_file():
        return [inside(folder, PICKLE, PICKLE, suffix=".bin")]
    if not (folder / PICKLES).is_file():
        what = f"has {SINGLE} already" if (folder / SINGLE).exists() else f"has no {PICKLE}"
        raise InputError(f"{name} {what}: there is nothing to convert")
    try:
        places = json.loads(contained(folder, PICKLES).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / PICKLES} is no index of weights: {error}") from error
    return [inside(folder, file, PICKLES, suffix=".bin") for file in files]


def _read(path: Path) -> dict[str, Any]:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # What a broken or a forbidden pickle makes the library raise has no common type.
        raise InputError(
            f"{path} cannot be read as weights alone ({type(error).__name__})",
            hint="it is damaged, or holds objects of other code, which kdcli does not run",
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise InputError(f"{path} holds something else than a table of tensors", hint="give a model's own state_dict")
    return found
