"""Tiny models of which only outputs are seen, and halves of CLIP and SigLIP that read images."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, ViTImageProcessor

from kdcli.models.heads import IMAGE_CLASSIFICATION

SIDE = 32
"""Pixels of a side of all these models' images."""

TINY_VIT = {"embed_dims": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
TINY_VIT["window_sizes"] = [2, 2, 2, 1]


def _classifier(name: str, classes: int, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **sizes)
    config.num_labels = classes
    model: PreTrainedModel = IMAGE_CLASSIFICATION.auto_class().from_config(config)
    return model


def swin(classes: int = 3) -> PreTrainedModel:
    """Return a Swin with two stages of two blocks, the second of them with shifted windows."""
    sizes = {"image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2]}
    return _classifier("swin", classes, **sizes, window_size=4, drop_path_rate=0.0)


def timm_model(architecture: str, classes: int = 3, **arguments: Any) -> PreTrainedModel:
    """Return a model of timm with timm's own random weights."""
    import timm

    model: Any = _classifier("timm_wrapper", classes, architecture=architecture, model_args=arguments)
    torch.manual_seed(0)
    made = timm.create_model(architecture, num_classes=classes, **arguments)
    model.timm_model.load_state_dict(made.state_dict())
    return model.eval()  # type: ignore[no-any-return]


def tower(name: str, **sizes: Any) -> Any:
    """Return the configuration of a half that reads images."""
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoConfig.for_model(name, **{**tiny, "image_size": SIDE, "patch_size": 8, **sizes})


def whole(name: str, part: str, **sizes: Any) -> PreTrainedModel:
    """Return a model that reads images and texts, with the tiny half `part`."""
    torch.manual_seed(0)
    texts = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts |= {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, vision_config=tower(part, **sizes).to_dict(), text_config=texts)
    return AutoModel.from_config(config).eval()  # type: ignore[no-any-return]


OUTER: dict[str, Callable[..., PreTrainedModel]] = {
    "swin": swin,
    "tiny-vit": lambda classes=3: timm_model("tiny_vit_5m_224", classes, **TINY_VIT),
    "vit": lambda classes=3: timm_model(
        "vit_tiny_patch16_224", classes, img_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ),
    "two-heads": lambda classes=3: timm_model(
        "deit_tiny_distilled_patch16_224", classes, img_size=SIDE, patch_size=8, embed_dim=32, depth=1, num_heads=2
    ),
}


def processor() -> Any:
    """Return an image processor of these models."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE})
