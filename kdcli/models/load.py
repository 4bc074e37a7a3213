"""Loading models and tokenizers: from safetensors only, with errors that say what to do."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdcli.errors import InputError
from kdcli.models.anatomy import FAMILIES, anatomy_of
from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear
from kdcli.models.quiet import quiet_transformers
from kdcli.models.save import KDCLI_MODEL_TYPE
from kdcli.models.shape import longest_input

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "base": "AutoModel",
}
"""What stands on a model's body, and the class of the library that makes both."""

_HEAD_KEYS = {
    "sequence-classification": ("classifier.",),
    "masked-lm": ("cls.predictions.", "lm_head.", "vocab_transform.", "generator_predictions.", "lm_predictions."),
    "base": ("",),
}


def _folder(name: str | Path) -> Path | None:
    """Return the folder that `name` means, or None for a hub name. Raises InputError for a broken path."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    if path.exists():
        raise InputError(f"{text} is a file; a model is a folder with config.json and model.safetensors")
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or (os.sep != "/" and os.sep in text):
        raise InputError(f"no model folder at {text}", hint="check the path; a hub name looks like owner/name")
    return None


def _read_config(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Return config.json as written. Raises InputError when there is none, or when it is broken."""
    folder = _folder(name)
    if folder is not None:
        path = folder / "config.json"
        if not path.is_file():
            raise InputError(f"{folder} has no config.json", hint="give a Hugging Face model folder")
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HFValidationError

        try:
            path = Path(hf_hub_download(str(name), "config.json", revision=revision))
        except HFValidationError as error:
            raise InputError(f"{name!r} is neither a folder nor a hub name") from error
        except Exception as error:
            raise InputError(
                f"{name!r} is no folder here, and the hub gave no such model ({type(error).__name__})",
                hint="check the name and the network; HF_TOKEN for private models, HF_HUB_OFFLINE=0 to go online",
            ) from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path} names no model_type", hint="give a Hugging Face model folder")
    return config


def _weight_files(name: str | Path, revision: str | None) -> list[Path]:
    """Return the safetensors files of a model. Raises InputError when there are none, or when one is corrupt."""
    from safetensors import SafetensorError, safe_open

    folder = _folder(name)
    if folder is None:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
        except Exception as error:
            raise InputError(f"cannot fetch {name!r} from the hub ({type(error).__name__})") from error
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
        if pickles:
            raise InputError(
                f"{name} has its weights only as a pickle ({', '.join(sorted(pickles))}), which kdcli does not read",
                hint="convert it to model.safetensors: load it in transformers and save_pretrained() it again",
            )
        raise InputError(f"{name} has no model.safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from error
    return files


def _keys(files: list[Path]) -> set[str]:
    from safetensors import safe_open

    keys: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys |= set(tensors.keys())
    return keys


def has_head(name: str | Path, head: str, *, revision: str | None = None) -> bool:
    """True when a checkpoint carries the weights of a head: one of `HEADS`."""
    _known(_read_config(name, revision), name)
    return _has_keys(_keys(_weight_files(name, revision)), head)


def _has_keys(keys: set[str], head: str) -> bool:
    return any(key.startswith(_HEAD_KEYS[head]) for key in keys)


def head_of(model: "PreTrainedModel") -> str:
    """Return which of `HEADS` stands on the body of `model`."""
    if model.base_model is model:
        return "base"
    return "masked-lm" if type(model).__name__.endswith("ForMaskedLM") else "sequence-classification"


def _known(config: dict[str, Any], name: str | Path) -> None:
    family = config["model_type"]
    if family == KDCLI_MODEL_TYPE and isinstance(config.get("kdcli"), dict):
        family = config["kdcli"].get("base_model_type") or family
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{name} is of the family {family!r}, which kdcli does not know; known are {', '.join(sorted(FAMILIES))}",
            hint="a family is one row of the table in kdcli/models/anatomy.py",
        )


def load_config(name: str | Path) -> "PretrainedConfig":
    """Return a model's configuration without its weights; of kdcli's own folders that of the plain family."""
    from transformers import AutoConfig

    raw = dict(_read_config(name))
    _known(raw, name)
    family = raw.pop("model_type")
    if family == KDCLI_MODEL_TYPE:
        family = raw.pop("kdcli")["base_model_type"]
    return AutoConfig.for_model(family, **raw)


def load_model(
    name: str | Path,
    *,
    num_labels: int | None = None,
    label_names: list[str] | None = None,
    problem_type: str | None = None,
    task: str = "sequence-classification",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a model in eval mode and fp32: a hub name, a folder, a low-rank or an over-parameterised one.

    A head that the checkpoint lacks is initialised freshly; anything else missing is an error.
    Raises InputError when there is no such model, its files are broken, or its family is unknown.
    """
    import transformers
    from transformers import AutoConfig

    raw = _read_config(name, revision)
    if not trust_remote_code:
        _known(raw, name)
    files = _weight_files(name, revision)
    changes: dict[str, Any] = {}
    if num_labels is not None:
        changes["num_labels"] = num_labels
    if label_names is not None:
        changes["id2label"] = dict(enumerate(label_names))
        changes["label2id"] = {label: i for i, label in enumerate(label_names)}
    if problem_type is not None:
        changes["problem_type"] = problem_type
    auto = getattr(transformers, HEADS[task])
    if raw["model_type"] == KDCLI_MODEL_TYPE:
        return _load_structured(name, raw, files, task, changes)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **changes)
            model, report = auto.from_pretrained(
                name,
                config=config,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            # What a broken config.json makes the library raise has no common type.
            raise InputError(f"{name} cannot be loaded: {_reason(error)}") from error
    _refuse_holes(name, model, report)
    if not trust_remote_code:
        anatomy_of(model.config)
    return model.eval()


def _reason(error: Exception) -> str:
    """Return the first line of an error that says something, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.rstrip().endswith(":")]
    return lines[0] if lines else type(error).__name__


def _refuse_holes(name: str | Path, model: "PreTrainedModel", report: Any) -> None:
    prefix = model.base_model_prefix + "."
    missing = [key for key in report["missing_keys"] if key.startswith(prefix) and ".pooler." not in key]
    if model.base_model is model:
        missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise InputError(
            f"{name} lacks {len(missing)} of the model's weights, such as {missing[0]}",
            hint="is it another model's file, or an un-contracted one? kdcli folders keep their config.json",
        )
    mismatched = [key[0] if isinstance(key, tuple | list) else key for key in report.get("mismatched_keys", [])]
    inside = [key for key in mismatched if key.startswith(prefix)]
    if inside:
        raise InputError(f"{name}: {inside[0]} has another shape than config.json says")


def _load_structured(
    name: str | Path, raw: dict[str, Any], files: list[Path], head: str, changes: dict[str, Any]
) -> "PreTrainedModel":
    import transformers
    from safetensors.torch import load_model as load_weights
    from transformers import AutoConfig

    from kdcli.tensors.parametrize import restore_overparam

    raw = dict(raw)
    structure = dict(raw.pop("kdcli"))
    raw.pop("model_type")
    raw.update(changes)
    family = structure.pop("base_model_type")
    keys = _keys(files)
    present = next((h for h in ("sequence-classification", "masked-lm") if _has_keys(keys, h)), "base")
    try:
        config: PretrainedConfig = AutoConfig.for_model(family, **raw)
        # Without its own head a headed checkpoint is loaded whole, and only its body is given.
        model = getattr(transformers, HEADS[present if head == "base" else head]).from_config(config)
        root = model.base_model if present == "base" else model
        for path, rank in structure.get("low_rank", {}).items():
            linear = root.get_submodule(path)
            _replace(
                root,
                path,
                LowRankLinear(linear.in_features, linear.out_features, rank, bias=linear.bias is not None),
            )
        for path, rank in structure.get("low_rank_embeddings", {}).items():
            table = root.get_submodule(path)
            _replace(
                root,
                path,
                LowRankEmbedding(table.num_embeddings, table.embedding_dim, rank, table.padding_idx),
            )
        if "overparam" in structure:
            restore_overparam(root, structure["overparam"])
        missing, strangers = load_weights(root, files[0], strict=False)
        if present != "base" and head in (present, "base"):
            holes, surplus = list(missing), list(strangers)
        else:
            body = "" if root is model.base_model else model.base_model_prefix + "."
            holes = [key for key in missing if key.startswith(body) and ".pooler." not in f".{key}"]
            surplus = [key for key in strangers if key.startswith(body) and ".pooler." not in f".{key}"]
        if holes or surplus:
            raise ValueError(f"its weights are not those of its config.json, such as {(holes or surplus)[0]}")
    except Exception as error:
        raise InputError(f"{name} cannot be restored: {_reason(error)}") from error
    return (model.base_model if head == "base" else model).eval()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a folder or a hub name. Raises InputError when there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = _folder(name)
    if folder is not None and not any(
        (folder / file).exists()
        for file in (
            "tokenizer.json",
            "vocab.txt",
            "vocab.json",
            "spm.model",
            "tokenizer.model",
            "sentencepiece.bpe.model",
        )
    ):
        raise InputError(
            f"{folder} has no tokenizer files",
            hint="save the tokenizer beside the model, or set teacher.tokenizer",
        )
    with quiet_transformers():
        try:
            config = _read_config(name) if folder is None or (folder / "config.json").exists() else {}
            if config.get("model_type") == KDCLI_MODEL_TYPE and folder is not None:
                settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
                import transformers

                kind = getattr(transformers, settings.get("tokenizer_class", ""), PreTrainedTokenizerFast)
                return kind.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(name)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the tokenizer of {name} cannot be loaded: {_reason(error)}") from error


def check_tokenizer(model: "PreTrainedModel", tokenizer: Any, max_length: int | None = None) -> None:
    """Raise InputError when the tokenizer can give ids, or up to `max_length` positions, without an embedding."""
    check_vocabulary(model.config, tokenizer)
    positions = longest_input(model.config)
    if max_length is None or positions is None:
        return
    longest = min(max_length, tokenizer.model_max_length)
    # Batches are padded to a multiple of 8.
    if -(-longest // 8) * 8 > positions:
        raise InputError(
            f"max_length {longest} is more than the {positions} positions that the model knows",
            where="task.max_length",
            hint=f"use at most {positions // 8 * 8}",
        )


def check_vocabulary(config: "PretrainedConfig", tokenizer: Any) -> None:
    """Raise InputError when the tokenizer can give ids without an embedding, or none for padding."""
    rows = config.vocab_size
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model has embeddings for {rows:,}",
            where="teacher.tokenizer",
            hint="use the tokenizer that the model was trained with",
        )
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token", where="teacher.tokenizer")


def check_same_tokens(tokenizer: Any, name: str | Path, where: str) -> None:
    """Raise InputError when the model `name` was trained with other tokens than those that `tokenizer` gives.

    A model that comes without a tokenizer of its own is not judged.
    """
    try:
        own = load_tokenizer(name).get_vocab()
    except InputError:
        return
    differing = [(number, token) for token, number in tokenizer.get_vocab().items() if own.get(token) != number]
    if differing:
        number, token = min(differing)
        theirs = next((word for word, place in own.items() if place == number), None)
        found = f"is {theirs!r}" if theirs is not None else "does not exist"
        raise InputError(
            f"both models must read the same tokens: number {number} is {token!r} to the teacher and {found} to {name}",
            where=where,
            hint="choose a student with the teacher's tokenizer",
        )


def load_any(name: str | Path) -> "PreTrainedModel":
    """Load a model with the head that its checkpoint has: a classifier, a language model's, or none."""
    heads = ("sequence-classification", "masked-lm", "base")
    return load_model(name, task=next(head for head in heads if has_head(name, head)))
