"""What the files of a checkpoint say before any weight is read: family, architecture, tensors and their types."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kdcli.errors import InputError
from kdcli.files import expanded
from kdcli.models import families
from kdcli.models.families import Family
from kdcli.models.heads import SENTENCE_EMBEDDING
from kdcli.models.older_files import joined, names_of_today
from kdcli.models.sizes import check_room, check_sizes
from kdcli.models.written import as_read

KDCLI_MODEL_TYPE = "kdcli (pip install kdcli, then import kdcli)"
"""The model type of a folder that holds factors or chains in place of matrices.

A program that does not know it prints it, so it says what to do.
"""

OLD_MODEL_TYPE = "kdcli"
"""The same in folders of earlier versions."""

LOCAL = ("_name_or_path", "name_or_path", "local_files_only")
"""What a configuration may say of the place that it was loaded from."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

BESIDE = (".json", ".txt", ".model", ".md")
"""Files beside the weights: configuration, tokenizer, model card."""

DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Floating-point types of a safetensors file, and PyTorch's names of those that kdcli writes for them."""


class Stored(NamedTuple):
    """A tensor in a file: its type as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration as written, and the tensors of its files by their names of today.

    revision: of a hub name; None is the newest. pooled: whether modules beside it make sentence embeddings of it.
    parts: the tensors of its files that are several of the model's, each with the names of its equal parts.
    """

    name: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    revision: str | None = None
    pooled: bool = False
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def structure(self) -> dict[str, Any] | None:
        """What of the model differs from its plain architecture; None for a plain folder."""
        return dict(self.config["kdcli"]) if is_structured(self.config) else None

    @property
    def architecture(self) -> str | None:
        """The class that the model was saved from, as config.json says; that of the whole, where modules follow."""
        if self.pooled:
            return SENTENCE_EMBEDDING.architecture[0]
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    @cached_property
    def dtype(self) -> str:
        """The type that most of the weights are stored in: "float32", "bfloat16" or "float16"."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in DTYPES:
                size = 1
                for length in tensor.shape:
                    size *= length
                counts[tensor.dtype] += size
        if not counts and (said := self.config.get("dtype", self.config.get("torch_dtype"))) in DTYPES.values():
            return str(said)
        return DTYPES[counts.most_common(1)[0][0]] if counts else "float32"

    def state(self) -> dict[str, Any]:
        """Return all tensors, by their names of today."""
        from safetensors import safe_open

        state = {}
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    # A tensor in the file's own memory may lie at an odd address, which changes a sum's last bits.
                    names = self.parts.get(_todays(key), [_todays(key)])
                    tensor = tensors.get_tensor(key)
                    shares = tensor.chunk(len(names)) if len(names) > 1 else [tensor]
                    for name, part in zip(names, shares, strict=True):
                        state[name] = part.clone()
        return state


def _todays(key: str) -> str:
    """Return a tensor's name, where an old checkpoint has one that the library no longer uses."""
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def local_folder(name: str | Path) -> Path | None:
    """Return the folder that `name` means, or None for a hub name. Raises InputError for a broken path.

    In the old layout of sentence-transformers it is the one that the transformer is in.
    """
    path = expanded(name)
    if path.is_dir():
        return path if (path / "config.json").exists() else _nested(path) or path
    text = str(name)
    if path.exists():
        raise InputError(f"{text} is a file; a model is a folder with config.json and model.safetensors")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or (os.sep != "/" and os.sep in text):
        raise InputError(f"no model folder at {text}", hint="check the path; a hub name looks like owner/name")
    return None


def read_config(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Return config.json as written. Raises InputError when there is none, or when it is broken."""
    folder = local_folder(name)
    if folder is not None:
        path = folder / "config.json"
        _refuse_adapter(folder)
        if not path.is_file():
            raise InputError(f"{folder} has no config.json", hint="give a Hugging Face model folder")
        contained(folder, path.name)
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            path = Path(hf_hub_download(str(name), "config.json", revision=revision))
        except HFValidationError as error:
            raise InputError(f"{name!r} is neither a folder nor a hub name") from error
        except Exception as error:
            raise _not_found(str(name), revision, error) from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    config = as_read(config, str(path)) if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path} names no model_type", hint="give a Hugging Face model folder")
    if isinstance(config.get("id2label"), list):
        raise InputError(
            f"{path}: id2label is an array, where the library reads a table",
            hint='write it as {"0": "first class", "1": "second class", ...}',
        )
    return config


def _not_found(name: str, revision: str | None, error: Exception) -> InputError:
    """Return why a hub name gave no config.json. error: the library's."""
    from huggingface_hub import errors
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return InputError(
            f"model {name!r} not found: there is no such folder, it is not in the cache, and HF_HUB_OFFLINE is set",
            hint="check the name, or unset HF_HUB_OFFLINE to fetch the model from the hub",
        )
    # The most particular first: some of these are kinds of others.
    reasons = {
        errors.LocalEntryNotFoundError: "it is not in the cache, and the hub cannot be reached",
        errors.EntryNotFoundError: "the hub's model has no config.json",
        errors.RevisionNotFoundError: f"the hub's model has no revision {revision!r}",
        errors.GatedRepoError: "the hub gives it only to accounts that have been granted access",
        errors.RepositoryNotFoundError: "the hub has no such model, or it is private",
    }
    reason = next(
        (why for kind, why in reasons.items() if isinstance(error, kind)), "the hub does not answer as it should"
    )
    return InputError(
        f"model {name!r} not found: there is no such folder, and {reason}",
        hint="check the name and the network; private and gated models need HF_TOKEN",
    )


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / SINGLE).exists():
        raise InputError(
            f"{folder} is a PEFT adapter, not a whole model",
            hint="merge it into its base model with peft: AutoPeftModelForSequenceClassification.from_pretrained("
            "FOLDER).merge_and_unload().save_pretrained(OUT)",
        )


def _nested(folder: Path) -> Path | None:
    """Return the folder of the transformer in a sentence-transformers folder of the old layout."""
    if not (folder / "modules.json").is_file():
        return None
    return next((path for path in sorted(folder.glob("*_Transformer")) if (path / "config.json").is_file()), None)


def is_structured(config: Mapping[str, Any]) -> bool:
    """True for the configuration of a folder that holds factors or chains in place of matrices."""
    return config["model_type"] in (KDCLI_MODEL_TYPE, OLD_MODEL_TYPE)


def _family_of(config: Mapping[str, Any]) -> Any:
    if not is_structured(config):
        return config["model_type"]
    own = config.get("kdcli")
    return (own.get("base_model_type") if isinstance(own, dict) else None) or OLD_MODEL_TYPE


def check_config(config: Mapping[str, Any], name: str | Path) -> Family:
    """Return the family of a configuration. Raises InputError when it is unknown, or a size is none."""
    family = families.get(_family_of(config), owner=name)
    check_sizes(config, family, f"{name}: config.json")
    return family


_CONFIGURATIONS_ALONE: ContextVar[bool] = ContextVar("configurations_alone", default=False)


@contextmanager
def configurations_alone(wanted: bool = True) -> Iterator[None]:
    """Within this block models are shapes, on the meta device: no file of weights is opened, and none need be there."""
    token = _CONFIGURATIONS_ALONE.set(wanted)
    try:
        yield
    finally:
        _CONFIGURATIONS_ALONE.reset(token)


def looks_at_configurations() -> bool:
    """True within `configurations_alone`."""
    return _CONFIGURATIONS_ALONE.get()


def open_checkpoint(name: str | Path, revision: str | None = None, *, any_family: bool = False) -> Checkpoint:
    """Return what a folder or a hub name holds. Reads headers, no weights.

    any_family: for a model that brings its own code.
    Raises InputError when there is no such model, its family is unknown, a file is broken, or config.json says sizes
    that are none, or more than the file can hold.
    """
    config = read_config(name, revision)
    foreign = any_family and ("auto_map" in config or not families.is_known(_family_of(config)))
    family = None if foreign else check_config(config, name)
    if looks_at_configurations():
        if is_structured(config):
            raise InputError(
                f"{name} has factors or chains in place of matrices, whose sizes its weights say",
                hint="leave --config-only out",
            )
        return Checkpoint(str(name), config, (), {}, revision)
    files = _weight_files(name, revision)
    tensors = _tensors(files)
    parts: dict[str, list[str]] = {}
    if family is not None:
        shapes = {key: one.shape for key, one in tensors.items()}
        check_room(config, family, shapes, f"{name}: config.json", names_of_today)
        parts = joined(family, shapes) if not is_structured(config) else {}
    for key, names in parts.items():
        whole = tensors.pop(key)
        each = Stored(whole.dtype, (whole.shape[0] // len(names), *whole.shape[1:]))
        tensors |= dict.fromkeys(names, each)
    from kdcli.models.sentence_folder import has_pooling

    return Checkpoint(str(name), config, tuple(files), tensors, revision, has_pooling(name, revision), parts)


def _weight_files(name: str | Path, revision: str | None) -> list[Path]:
    """Return the safetensors files of a model. Raises InputError when there are none, or one lies elsewhere."""
    folder = local_folder(name)
    if folder is None:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        except Exception as error:
            raise InputError(f"cannot fetch {name!r} from the hub ({type(error).__name__})") from error
    if (folder / SINGLE).is_file():
        return [inside(folder, SINGLE, SINGLE)]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    pickles = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    if pickles:
        raise InputError(
            f"{name} has its weights only as a pickle ({', '.join(sorted(pickles))}), which kdcli does not read",
            hint=f"convert it first: kdcli convert {name} --out DIR",
        )
    if any(folder.glob("model-*.safetensors")):
        raise InputError(f"{name} has parts of a model, but no {INDEX} that says which", hint="copy the whole folder")
    raise InputError(f"{name} has no {SINGLE}")


def _indexed(folder: Path) -> list[Path]:
    path = folder / INDEX
    try:
        places = json.loads(contained(folder, INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not names or not all(isinstance(one, str) for one in names):
            raise ValueError("its weight_map names no files")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no index of safetensors files: {error}") from error
    return [inside(folder, one, INDEX) for one in names]


def inside(folder: Path, name: str, said: str, *, suffix: str = ".safetensors") -> Path:
    """Return a weight file of `folder`. Raises InputError when it has another suffix, is missing, or lies outside.

    said: the file that names it.
    """
    path = folder / name
    if path.suffix != suffix:
        raise InputError(f"{folder / said} names {name!r}, which is no {suffix} file; kdcli reads nothing else")
    contained(folder, name, said)
    if not path.is_file():
        raise InputError(f"{path} is missing, which {said} names", hint="copy the whole folder")
    return path


def contained(folder: Path, name: str, said: str | None = None) -> Path:
    """Return a path below `folder`. Raises InputError when it lies, or leads, outside.

    said: the file that names it. Links are followed; those of the hub's cache lead from its snapshots to its blobs.
    """
    path = folder / name
    home, target = folder.resolve(), path.resolve()
    cached = home.parent.name == "snapshots" and home.parents[1] / "blobs" == target.parent
    direct = not os.path.isabs(name) and ".." not in Path(name).parts
    if not direct or not (target.is_relative_to(home) or cached):
        raise InputError(
            f"{folder / (said or name)}: {name!r} lies outside the model's folder ({target})",
            hint="copy the file into the folder, if it belongs to the model",
        )
    return path


def check_beside(folder: Path) -> None:
    """Raise InputError when one of the files beside the weights in `folder` lies, or leads, outside.

    Which of them the library reads depends on what is in them.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in BESIDE:
            contained(folder, path.name)


def _tensors(files: list[Path]) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    part = tensors.get_slice(key)
                    if _todays(key) in found:
                        raise InputError(f"{file}: {key} is in another file of the model, too")
                    found[_todays(key)] = Stored(part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    return found
