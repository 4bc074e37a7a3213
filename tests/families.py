"""A tiny model of every family, and a tokenizer that all of them take."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from kdcli.data.reviews import reviews
from kdcli.models.families import FAMILIES
from kdcli.models.scratch import train_tokenizer

NAMES = sorted(FAMILIES)

EXTRA: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "electra": {"embedding_size": 16},
    "modernbert": {"local_attention": 6, "attention_dropout": 0.1, **FAMILIES["modernbert"].scratch},
    "mpnet": {"pad_token_id": 1},
    "roberta": {"type_vocab_size": 1},
    "camembert": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
}
"""What a tiny model of a family needs, or is to show, beside its sizes."""


def matrices(family: str, layers: int = 2) -> int:
    """Return how many block matrices with weights of their own a model of `layers` blocks has."""
    return len(FAMILIES[family].matrices) * (1 if FAMILIES[family].repeated else layers)


def tokenizer() -> Any:
    """Return a small tokenizer of the `reviews` task."""
    return train_tokenizer(reviews()["train"]["text"][:500], 200)


def tiny(
    family: str, *, layers: int = 2, hidden: int = 32, labels: int = 2, seed: int = 0, **extra: Any
) -> PreTrainedModel:
    """Return a random classifier of `family`, in eval mode: width 32, 4 heads, feed-forward width 64."""
    sizes = FAMILIES[family].sizes
    values = {
        sizes.layers: layers,
        sizes.hidden: hidden,
        sizes.heads: 4,
        sizes.intermediate: 2 * hidden,
        sizes.vocabulary: 220,
        sizes.positions: 130,
        "num_labels": labels,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**values, **EXTRA.get(family, {}), **extra})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        # The usual initialisation makes tiny models nearly constant: too easy to agree with.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model
