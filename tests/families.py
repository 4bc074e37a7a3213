"""A tiny model of every family, and a tokenizer that all of them take."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from kdcli.data.reviews import reviews
from kdcli.models.families import FAMILIES
from kdcli.models.heads import IMAGE_CLASSIFICATION
from kdcli.models.scratch import train_tokenizer

NAMES = sorted(name for name, family in FAMILIES.items() if family.reads == "text" and not family.causal)
"""Encoders."""

IMAGES = sorted(name for name, family in FAMILIES.items() if family.reads == "images" and family.outputs_only is None)
"""Those that read images, and whose blocks are seen."""

DECODERS = sorted(name for name, family in FAMILIES.items() if family.causal)

EXTRA: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    "electra": {"embedding_size": 16},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"bos_token_id": 1, "eos_token_id": 2},
    "phi3": {"eos_token_id": 2},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"head_dim": 16},
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
    """Return a random classifier (of images or texts), or causal language model, of `family`, in eval mode.

    Its width is 32, its feed-forward width 64; it has 4 heads, of keys and values 2 where these may be fewer. An image
    has 16 x 16 pixels, a patch 4 x 4.
    """
    sizes = FAMILIES[family].sizes
    values: dict[str, Any] = {
        sizes.layers: layers,
        sizes.hidden: hidden,
        sizes.heads: 4,
        "num_labels": labels,
    }
    values |= {sizes.ratio: 2} if sizes.ratio is not None else {sizes.intermediate: 2 * hidden}
    if FAMILIES[family].reads == "images":
        values |= {sizes.image: 16, sizes.patch: 4, sizes.channels: 3}
    else:
        values |= {sizes.vocabulary: 220, sizes.positions: 130, "pad_token_id": 0}
    if sizes.kv_heads is not None:
        values[sizes.kv_heads] = 2
    torch.manual_seed(seed)
    values |= EXTRA.get(family, {})
    for name in set(sizes.by_block) & set(values):
        values[name] = [values[name][layer % 2] for layer in range(layers)]
    config = AutoConfig.for_model(family, **{**values, **extra})
    classifier = IMAGE_CLASSIFICATION.auto_class() if family in IMAGES else AutoModelForSequenceClassification
    auto = AutoModelForCausalLM if FAMILIES[family].causal else classifier
    if config.architectures is None:
        # The library cannot choose among the two classes that DeiT has.
        config.architectures = []
    model = auto.from_config(config).eval()
    with torch.no_grad():
        # The usual initialisation makes tiny models nearly constant: too easy to agree with.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model
