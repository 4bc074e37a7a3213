"""Models as Hugging Face folders; what a plain loader could not read says so loudly."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kdcli.models.checkpoint import KDCLI_MODEL_TYPE
from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear
from kdcli.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Return what of `model` differs from its plain architecture, as JSON-able data; empty when nothing does."""
    from kdcli.tensors.parametrize import overparam_state

    structure: dict[str, Any] = {}
    low_rank = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    embeddings = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankEmbedding)}
    if low_rank:
        structure["low_rank"] = low_rank
    if embeddings:
        structure["low_rank_embeddings"] = embeddings
    if chains := overparam_state(model):
        structure["overparam"] = chains
    return structure


def save_model(model: "PreTrainedModel", folder: Path, tokenizer: Any = None) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into an existing folder.

    A model with factors or chains in place of matrices gets a configuration that a plain loader refuses,
    instead of one that it would fill with fresh random weights; `kdcli.load_model` restores it to the bit.
    """
    import safetensors.torch

    structure = structure_of(model)
    if not structure:
        with quiet_transformers():
            model.save_pretrained(folder)
    else:
        config = json.loads(model.config.to_json_string(use_diff=True))
        config["architectures"] = [type(model).__name__]
        config["kdcli"] = {"base_model_type": config["model_type"], **structure}
        config["model_type"] = KDCLI_MODEL_TYPE
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    for file in folder.glob("*.safetensors"):
        # The library leaves them readable to their owner only, beside files that anyone may read.
        file.chmod((folder / "config.json").stat().st_mode & 0o777)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
