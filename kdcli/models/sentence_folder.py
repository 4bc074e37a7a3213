"""Folders of the library sentence-transformers: the modules after the transformer, prompts and lengths, in and out.

`modules.json` names the modules: the transformer, at the folder's root (or, in folders before 2021, in
`0_Transformer`), a pooling, and any number of linear maps (Dense) and normalisations, each in a folder of its own.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.models.checkpoint import contained, local_folder
from kdcli.models.heads import SENTENCE_EMBEDDING, SENTENCE_SETTINGS, Head, with_pooler

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MODULES, MODEL, TRANSFORMER = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
"""Files of the list of modules, of prompts and similarity, and of the transformer's own settings."""

SETTINGS = (
    TRANSFORMER,
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names that the last file has had: the first such file that says anything holds, as in sentence-transformers."""

KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
"""The modules that kdcli can run, by their classes' names."""

PROMPTS = "sentence_prompts"
"""The setting of a tokenizer that holds what its folder says of prompts and length: copies of it keep it."""

ROLES = {"query": ("query",), "document": ("document", "passage", "corpus")}
"""What a text may be to its embedding, and the names of the prompts for it, the first one that there is."""

POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The form of pooling that every version of sentence-transformers reads, in the order in which it joins them."""


@dataclass(frozen=True)
class Module:
    """One line of modules.json. kind: its class, without its package, which differs by version. path: its folder."""

    kind: str
    path: str


@dataclass(frozen=True)
class _Files:
    """The files of a model: below a local folder, or of a hub name at a revision."""

    name: str
    folder: Path | None
    revision: str | None

    def find(self, path: str, said: str | None = None) -> Path | None:
        """Return a file; None where there is none. said: the file that names it."""
        if self.folder is not None:
            return contained(self.folder, path, said) if (self.folder / path).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, path, revision=self.revision))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
        except Exception as error:
            raise InputError(f"cannot fetch {path} of {self.name!r} from the hub ({type(error).__name__})") from error

    def read(self, path: str, kind: type = dict, said: str | None = None) -> Any:
        """Return what a JSON file holds; an empty `kind` where there is none. Raises InputError where it is broken."""
        file = self.find(path, said)
        if file is None:
            return kind()
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(f"{self.name}: {path} is not valid JSON: {error}") from error
        if not isinstance(found, kind):
            raise InputError(f"{self.name}: {path} is no {'list' if kind is list else 'table'} of settings")
        return found


def _files(name: str | Path, revision: str | None) -> _Files:
    folder = local_folder(name)
    if folder is None or (folder / MODULES).is_file() or not (folder.parent / MODULES).is_file():
        return _Files(str(name), folder, revision)
    above = _Files(str(name), folder.parent, None)
    # In the old layout the transformer has a folder of its own.
    return above if any(module.path == folder.name for module in _modules(above)) else _Files(str(name), folder, None)


def _modules(files: _Files) -> list[Module]:
    found = []
    for number, entry in enumerate(files.read(MODULES, list)):
        kind, path = (entry.get(key) if isinstance(entry, dict) else None for key in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(path, str):
            raise InputError(f"{files.name}: entry {number} of {MODULES} has no type and path")
        found.append(Module(_kind(kind), path))
    return found


def _kind(path: str) -> str:
    """Return the name of a class of sentence-transformers, whose package differs by version; others as they are."""
    return path.rpartition(".")[2] if path.startswith("sentence_transformers.") else path


def has_pooling(name: str | Path, revision: str | None = None) -> bool:
    """True for a folder or hub name of a model of sentence embeddings: its modules.json lists a pooling."""
    return any(module.kind == "Pooling" for module in _modules(_files(name, revision)))


def modules_beside(folder: Path) -> tuple[Path, list[Module]]:
    """Return the folder that modules.json is in, and the modules that have a folder of their own beside a transformer.

    Raises InputError for one that lies elsewhere.
    """
    files = _files(folder, None)
    assert files.folder is not None
    modules = [module for module in _modules(files) if module.kind != "Transformer" and module.path]
    for module in modules:
        contained(files.folder, module.path, MODULES)
    return files.folder, modules


def copy_settings(root: Path, folder: Path) -> None:
    """Write modules.json, with the transformer at the root, and what is beside it into a folder."""
    lines = json.loads((root / MODULES).read_text(encoding="utf-8"))
    _write(folder / MODULES, [{**line, "path": ""} if _kind(line["type"]) == "Transformer" else line for line in lines])
    if (root / MODEL).is_file():
        shutil.copyfile(contained(root, MODEL), folder / MODEL)


def note_on_pooling(name: str | Path, head: Head, revision: str | None = None) -> list[str]:
    """Return what a user should know about the embeddings of a model: that no file says how they are made."""
    if head != SENTENCE_EMBEDDING or has_pooling(name, revision):
        return []
    return [f"{name} has no {MODULES}: its embeddings are the mean over a text's tokens, as in sentence-transformers"]


def with_modules(body: "PreTrainedModel", name: str | Path, revision: str | None = None) -> "PreTrainedModel":
    """Return a model of sentence embeddings: a body, loaded from `name`, and the modules that are there for it.

    Without modules.json it is the mean over a text's tokens, as in sentence-transformers.
    Raises InputError for a module or a setting that kdcli cannot run, and for files that are missing or do not fit.
    """
    from kdcli.models.embedding import ASSUMED, on_body
    from kdcli.models.shape import shape_of

    files = _files(name, revision)
    modules = _modules(files)
    if files.find(MODULES) is None:
        return on_body(body, ASSUMED, {})
    if (unknown := [module.kind for module in modules if module.kind not in KNOWN]) or not modules:
        what = f"has the module {unknown[0]}, which kdcli cannot run" if unknown else f"has an empty {MODULES}"
        raise InputError(f"{name} {what}", hint=f"supported are {', '.join(KNOWN)}")
    if [module.kind for module in modules[:2]] != ["Transformer", "Pooling"] or any(
        module.kind in ("Transformer", "Pooling") for module in modules[2:]
    ):
        order = ", ".join(module.kind for module in modules)
        raise InputError(f"{name}: {MODULES} lists {order}", hint="kdcli takes Transformer, Pooling, then the others")
    settings = {**_transformer_settings(files, modules[0]), **_model_settings(files)}
    width = shape_of(body.config).hidden
    settings["pooling"] = _pooling(files, modules[1], width, prompts=any(settings["prompts"].values()))
    width *= len(settings["pooling"])
    settings["modules"] = []
    weights: dict[str, Tensor] = {}
    for number, module in enumerate(modules[2:]):
        if module.kind == "Normalize":
            _check_names(files, f"{module.path}/config.json", files.read(f"{module.path}/config.json", said=MODULES))
            settings["modules"].append({"type": "Normalize"})
            continue
        dense, tensors = _dense(files, module, width)
        settings["modules"].append(dense)
        width = dense["out_features"]
        weights |= {f"after_pooling.{number}.linear.{key}": tensor for key, tensor in tensors.items()}
    return on_body(body, settings, weights)


def _transformer_settings(files: _Files, module: Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SETTINGS:
        path = f"{module.path}/{name}" if module.path else name
        if found := files.read(path, said=MODULES):
            break
    usual = {
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    }
    for key, value in found.items():
        if key in ("max_seq_length", "do_lower_case", "unpad_inputs", "model_args", "model_kwargs"):
            continue
        if value and value != usual.get(key):
            raise InputError(f"{files.name}: {path} sets {key}, which kdcli cannot follow", hint="remove it")
    length = found.get("max_seq_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise InputError(f"{files.name}: {path} says max_seq_length {length!r}, not a number of tokens")
    return {"max_seq_length": length, "do_lower_case": bool(found.get("do_lower_case"))}


def _model_settings(files: _Files) -> dict[str, Any]:
    found = files.read(MODEL)
    if found.get("truncate_dim") is not None:
        raise InputError(
            f"{files.name}: {MODEL} sets truncate_dim, and kdcli takes whole embeddings",
            hint="remove it, or add a Dense module that is as narrow",
        )
    prompts, default = found.get("prompts") or {}, found.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"{files.name}: prompts in {MODEL} is no table of texts")
    if default is not None and default not in prompts:
        raise InputError(
            f"{files.name}: {MODEL} names the default prompt {default!r}, which is none of its prompts",
            hint=f"it has {', '.join(prompts) or 'none'}",
        )
    return {
        "prompts": {name: text or "" for name, text in prompts.items()},
        "default_prompt_name": default,
        "similarity_fn_name": found.get("similarity_fn_name"),
    }


def _required(files: _Files, module: Module) -> tuple[str, dict[str, Any]]:
    path = f"{module.path}/config.json"
    if files.find(path, MODULES) is None:
        raise InputError(f"{files.name} has no {path}, which {MODULES} names", hint="copy the whole folder")
    return path, files.read(path, said=MODULES)


def _check_names(files: _Files, path: str, config: Mapping[str, Any]) -> None:
    """Raise InputError for a module that reads or writes something else than the embedding."""
    for key in ("module_input_name", "module_output_name"):
        if (name := config.get(key)) not in (None, "sentence_embedding"):
            raise InputError(f"{files.name}: {path} says {key} {name!r}; kdcli knows sentence_embedding alone")


def _check_width(files: _Files, path: str, said: Any, width: int, of: str) -> None:
    if said != width:
        raise InputError(f"{files.name}: {path} says {said!r} features, and {of} gives {width}")


def _pooling(files: _Files, module: Module, width: int, *, prompts: bool) -> list[str]:
    from kdcli.models.embedding import POOLING

    path, config = _required(files, module)
    modes = config.get("pooling_mode")
    if modes is None:
        unknown = [key for key in config if key.startswith("pooling_mode_") and key not in POOLING_KEYS]
        named = [mode for key, mode in POOLING_KEYS.items() if config.get(key)]
        modes = [key for key in unknown if config[key]] + named or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in POOLING for mode in modes):
        wrong = next((mode for mode in modes if mode not in POOLING), modes) if isinstance(modes, list) else modes
        raise InputError(f"{files.name}: {path} says unknown pooling {wrong!r}; known are {', '.join(POOLING)}")
    said = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    _check_width(files, path, said, width, "the transformer")
    if prompts and config.get("include_prompt") is False:
        raise InputError(
            f"{files.name}: {path} leaves the tokens of prompts out of pooling (include_prompt = false)",
            hint="kdcli pools over all tokens of a text: use another teacher",
        )
    return modes


def _dense(files: _Files, module: Module, width: int) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from kdcli.models.embedding import ACTIVATIONS

    path, config = _required(files, module)
    _check_names(files, path, config)
    if config.get("use_residual"):
        raise InputError(f"{files.name}: {path} sets use_residual, which kdcli cannot follow")
    _check_width(files, path, config.get("in_features"), width, "the module before it")
    out, bias = config.get("out_features"), config.get("bias", True)
    if isinstance(out, bool) or not isinstance(out, int) or out < 1:
        raise InputError(f"{files.name}: {path} says out_features {out!r}, not a number of features")
    said = config.get("activation_function", ACTIVATIONS["Tanh"])
    activation = next((name for name, known in ACTIVATIONS.items() if known == said), None)
    if activation is None:
        raise InputError(
            f"{files.name}: {path} says unknown activation {said!r}",
            hint=f"known are {', '.join(ACTIVATIONS.values())}",
        )
    weights = files.find(f"{module.path}/model.safetensors", MODULES)
    if weights is None:
        raise InputError(
            f"{files.name} has no {module.path}/model.safetensors",
            hint=f"weights in a pickle are not read: kdcli convert {files.name} --out DIR",
        )
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights} is not a readable safetensors file: {error}") from error
    shapes = {"linear.weight": (out, width), **({"linear.bias": (out,)} if bias else {})}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise InputError(f"{weights} has {_words(found)}, and by {path} it should have {_words(shapes)}")
    settings = {"type": "Dense", "out_features": out, "bias": bool(bias), "activation": activation}
    return settings, {name.removeprefix("linear."): tensor.float() for name, tensor in tensors.items()}


def _words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items()) or "nothing"


def save_modules(model: "PreTrainedModel", folder: Path, dtype: Any) -> None:
    """Write all files of a model of sentence embeddings beside its body's: every version of the library reads them.

    dtype: of the weights in the files.
    """
    from safetensors.torch import save_file

    from kdcli.models.embedding import ACTIVATIONS, settings_of
    from kdcli.models.shape import shape_of

    settings, width = settings_of(model), shape_of(model.config).hidden
    transformer = {name: settings[name] for name in ("max_seq_length", "do_lower_case")}
    # A body has no pooler, which nothing reads: none is made when it is loaded.
    if arguments := with_pooler(type(model.base_model), False):
        transformer["model_args"] = arguments
    _write(folder / TRANSFORMER, {key: value for key, value in transformer.items() if value is not None})
    kept = {name: settings[name] for name in ("prompts", "default_prompt_name", "similarity_fn_name")}
    _write(folder / MODEL, {"model_type": "SentenceTransformer", **kept})
    modes = settings["pooling"]
    in_order = modes == [mode for mode in POOLING_KEYS.values() if mode in modes]
    pooling = {key: mode in modes for key, mode in POOLING_KEYS.items()} if in_order else {"pooling_mode": modes}
    entries = [Module("Transformer", ""), Module("Pooling", "1_Pooling")]
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
    width *= len(modes)
    modules: Any = model.after_pooling
    for number, (one, module) in enumerate(zip(settings["modules"], modules, strict=True), 2):
        entries.append(Module(one["type"], f"{number}_{one['type']}"))
        if one["type"] == "Normalize":
            continue
        config = {
            "in_features": width,
            "out_features": one["out_features"],
            "bias": one["bias"],
            "activation_function": ACTIVATIONS[one["activation"]],
        }
        path = folder / entries[-1].path
        _write(path / "config.json", config)
        tensors = {f"linear.{key}": value.to(dtype) for key, value in module.linear.state_dict().items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        width = one["out_features"]
    lines = [
        {"idx": number, "name": str(number), "path": one.path, "type": f"sentence_transformers.models.{one.kind}"}
        for number, one in enumerate(entries)
    ]
    _write(folder / MODULES, lines)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def note_reading(tokenizer: Any, name: str | Path, revision: str | None = None) -> None:
    """Let a tokenizer know what its model's folder says of prompts, of length and of upper case, in place."""
    files = _files(name, revision)
    modules = _modules(files)
    if any(module.kind == "Pooling" for module in modules):
        found = {**_transformer_settings(files, modules[0]), **_model_settings(files)}
    elif files.folder is not None:
        # A graph has all settings in its config.json.
        found = files.read("config.json").get(SENTENCE_SETTINGS) or {}
    else:
        found = {}
    if found:
        tokenizer.init_kwargs[PROMPTS] = found
        if found["do_lower_case"]:
            _lower(tokenizer)


def _lower(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    if "Lowercase" in str(backend.normalizer) or "lowercase=True" in str(backend.normalizer):
        return
    backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])])


def prompts_of(tokenizer: Any) -> list[str]:
    """Return all texts that may stand before another, by its model's folder."""
    return sorted({prompt for prompt in _reading(tokenizer).get("prompts", {}).values() if prompt})


def prompt_of(tokenizer: Any, role: str | None = None) -> str:
    """Return what stands before a text, by its model's folder; "" for nothing.

    role: "query" or "document" in a search; None for a text as such, which has the default prompt, if there is one.
    """
    found = _reading(tokenizer)
    prompts = found.get("prompts", {})
    if role is not None:
        return next((prompts[name] for name in ROLES[role] if name in prompts), "")
    return prompts.get(found.get("default_prompt_name"), "")  # type: ignore[no-any-return]


def longest_text(tokenizer: Any, max_length: int) -> int:
    """Return how many tokens of a text its model takes, `max_length` at most."""
    said = _reading(tokenizer).get("max_seq_length") or max_length
    return min(max_length, getattr(tokenizer, "model_max_length", max_length), said)


def _reading(tokenizer: Any) -> dict[str, Any]:
    return getattr(tokenizer, "init_kwargs", {}).get(PROMPTS) or {}
