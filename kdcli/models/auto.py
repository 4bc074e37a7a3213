"""kdcli's folders as a family of the transformers library, whose models are those of the plain family underneath."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from kdcli.models.checkpoint import KDCLI_MODEL_TYPE, OLD_MODEL_TYPE
from kdcli.models.heads import BASE, Head


class KdcliConfig(PretrainedConfig):
    """The configuration of a folder with factors or chains in place of matrices, as it is written."""

    model_type = KDCLI_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The classes of models would import PyTorch: not before a folder of this kind is met.
        _add_models()
        return super().from_dict(config_dict, **kwargs)


_heads: list[Callable[[], Iterable[Head]]] = []


def add_family(heads: Callable[[], Iterable[Head]]) -> None:
    """Add kdcli's row to the library's table of families. heads: gives those that its models may have."""
    _heads[:] = [heads]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in (KDCLI_MODEL_TYPE, OLD_MODEL_TYPE):
        CONFIG_MAPPING.register(name, KdcliConfig, exist_ok=True)


def _add_models() -> None:
    for head in (*(head for heads in _heads for head in heads()), BASE):
        kind = head.auto_class()
        if KdcliConfig not in kind._model_mapping:
            kind.register(KdcliConfig, _loader(head), exist_ok=True)


def _loader(head: Head) -> type:
    """Return a class whose `from_pretrained` gives a model with a head, of the plain family's own class."""
    from transformers import PreTrainedModel

    class Loader(PreTrainedModel):
        config_class = KdcliConfig

        @classmethod
        def from_pretrained(cls, name: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
            return _load(head, name, **options)

    Loader.__name__ = Loader.__qualname__ = head.auto.replace("Auto", "Kdcli")
    return Loader


def _load(head: Head, name: Any, **options: Any) -> Any:
    import torch

    from kdcli.models.load import load_model

    model: Any = load_model(name, head, revision=options.get("revision"))
    wanted = options.get("dtype") or options.get("torch_dtype")
    if wanted == "auto" or wanted is None:
        # As the library does: the type of the file.
        wanted = model.config.dtype
    kind: Any = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    model = model.to(dtype=kind)
    if (kernel := options.get("attn_implementation")) is not None:
        model.set_attn_implementation(kernel)
    if (device := options.get("device_map")) is not None:
        model = model.to(device if not isinstance(device, dict) else next(iter(device.values())))
    if options.get("output_loading_info"):
        return model, {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return model
