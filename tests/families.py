"""A tiny model of every family, and a tokenizer that all of them take."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from kdcli.data.reviews import reviews
from kdcli.models.families import FAMILIES
from kdcli.models.scratch import train_tokenizer

NAMES = sorted(FAMILIES)


def tokenizer() -> Any:
    """Return a small tokenizer of the `reviews` task."""
    return train_tokenizer(reviews()["train"]["text"][:500], 200)


def tiny(
    family: str, *, layers: int = 2, hidden: int = 32, labels: int = 2, seed: int = 0, **extra: Any
) -> PreTrainedModel:
    """Return a random classifier of `family`, in eval mode: width 32, 4 heads, feed-forward width 64."""
    anatomy = FAMILIES[family]
    values = {
        anatomy.layers: layers,
        anatomy.hidden: hidden,
        anatomy.heads: 4,
        anatomy.intermediate: 2 * hidden,
        "vocab_size": 220,
        "max_position_embeddings": 130,
        "num_labels": labels,
        "pad_token_id": 0,
    }
    if family == "electra":
        values["embedding_size"] = hidden // 2
    if family == "deberta-v2":
        values |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
    if family in ("roberta", "xlm-roberta"):
        values["type_vocab_size"] = 1
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**values, **extra})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        # The usual initialisation makes tiny models nearly constant: too easy to agree with.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model
