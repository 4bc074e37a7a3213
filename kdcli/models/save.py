"""Models as Hugging Face folders; what a plain loader could not read says so loudly."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kdcli.errors import RunError
from kdcli.models.checkpoint import KDCLI_MODEL_TYPE, LOCAL
from kdcli.models.families import family_of
from kdcli.models.fused import SplitLinear
from kdcli.models.heads import BASE, SENTENCE_EMBEDDING, with_new_head
from kdcli.models.inputs import INPUTS, inputs_of
from kdcli.models.lowrank import LowRankDecoder, LowRankEmbedding, LowRankLinear
from kdcli.models.processors import SETTINGS, is_image_processor
from kdcli.models.quiet import quiet_transformers
from kdcli.models.sentence_folder import PROMPTS, save_modules

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Return what of `model` differs from its plain architecture, as JSON-able data; empty when nothing does."""
    from kdcli.models.overparam import overparam_state

    structure: dict[str, Any] = {}
    low_rank = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    tables = {m: name for name, m in model.named_modules() if isinstance(m, LowRankEmbedding)}
    decoders = {name: tables[m.table] for name, m in model.named_modules() if isinstance(m, LowRankDecoder)}
    split = {
        name: [part for part, _ in m.named_children()]
        for name, m in model.named_modules()
        if isinstance(m, SplitLinear)
    }
    if split:
        structure["split"] = split
    if low_rank:
        structure["low_rank"] = low_rank
    if tables:
        structure["low_rank_embeddings"] = {name: m.rank for m, name in tables.items()}
    if decoders:
        structure["low_rank_decoders"] = decoders
    if chains := overparam_state(model):
        structure["overparam"] = chains
    return structure


def stored_type(model: "PreTrainedModel") -> "torch.dtype":
    """Return the type that a model's weights have in its file: that of its configuration, whatever it computes in."""
    import torch

    kind = model.config.dtype
    return kind if kind in (torch.bfloat16, torch.float16) else torch.float32  # type: ignore[return-value]


def round_to_stored(model: "PreTrainedModel") -> None:
    """Give each weight the value that it will have in the file, in place: what is scored is what is kept.

    Raises RunError when one is too large for that type.
    """
    import torch

    kind = stored_type(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.to(kind).to(parameter.dtype)
            if bool(rounded.isinf().any()) and not bool(parameter.isinf().any()):
                raise RunError(
                    f"{name} has weights that are too large for {str(kind).removeprefix('torch.')}",
                    hint='set student.dtype = "float32"',
                )
            parameter.copy_(rounded)


def _save_tokenizer(tokenizer: Any, folder: Path, config: "PretrainedConfig") -> None:
    """Write a tokenizer's files into an existing folder: nothing of where it came from, or of its last call.

    config: of the model beside it. What is written gives no token types to a model that does not take them; the
    tokenizer itself is not changed.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    taken = inputs_of(config)
    names = [name for name in tokenizer.model_input_names if name not in INPUTS or name in taken]
    _leave_out(folder / "tokenizer_config.json", (*PASSING, PROMPTS), model_input_names=names)


def save_processor(processor: Any, folder: Path, config: "PretrainedConfig") -> None:
    """Write the files of a tokenizer or an image processor into an existing folder. config: of the model beside it."""
    if not is_image_processor(processor):
        _save_tokenizer(processor, folder, config)
        return
    processor.save_pretrained(folder)
    _leave_out(folder / SETTINGS, LOCAL)


def save_config(config: "PretrainedConfig", folder: Path) -> None:
    """Write config.json into an existing folder, with all its settings."""
    # Models of timm are written without it, under names of timm's.
    settings = {**config.to_dict(), "id2label": config.id2label}
    text = json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    _leave_out(folder / "config.json", LOCAL)


PASSING = (
    *LOCAL,
    "is_local",
    "max_length",
    "pad_to_multiple_of",
    "stride",
    "truncation_strategy",
)
"""What the library writes of a tokenizer's origin and of how it was called last; model_max_length says how long."""


def _leave_out(path: Path, keys: Collection[str], **others: Any) -> None:
    """Write a JSON file once more, without some keys and with others."""
    written = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in written.items() if key not in keys} | others
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model(model: "PreTrainedModel", folder: Path, processor: Any = None) -> None:
    """Write config.json, model.safetensors and the processor's files into an existing folder, in `stored_type`.

    A model of sentence embeddings becomes a folder of sentence-transformers.

    A model with factors or chains in place of matrices gets a configuration that a plain loader refuses,
    instead of one that it would fill with fresh random weights; `kdcli.load_model` restores it to the bit.
    """
    import safetensors.torch
    import torch

    if SENTENCE_EMBEDDING.is_of(type(model).__name__):
        save_modules(model, folder, stored_type(model))
        model = with_new_head(model, BASE)
    structure = structure_of(model)
    kind = stored_type(model)
    # Rounded chains would give another weight, not a rounded one.
    if kind != torch.float32 and "overparam" not in structure:
        model = copy.deepcopy(model).to(dtype=kind)  # type: ignore[call-arg]
    if not structure:
        with quiet_transformers():
            model.save_pretrained(folder)
    else:
        config = json.loads(model.config.to_json_string(use_diff=True))
        config["architectures"] = [type(model).__name__]
        config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        config["kdcli"] = {"base_model_type": config["model_type"], **structure}
        config["model_type"] = KDCLI_MODEL_TYPE
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        if model.can_generate():
            model.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    _leave_out(folder / "config.json", LOCAL)
    for file in folder.glob("*.safetensors"):
        # The library leaves them readable to their owner only, beside files that anyone may read.
        file.chmod((folder / "config.json").stat().st_mode & 0o777)
    if processor is not None:
        save_processor(processor, folder, model.config)
        if family_of(model.config).wraps is not None:
            # What it says of images is of the model's origin, and comes before the processor's file.
            _leave_out(folder / "config.json", ("pretrained_cfg",))
