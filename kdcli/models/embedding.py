"""Sentence embeddings: a body, pooling of its last hidden states, and the modules of sentence-transformers after it."""

import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import ModelOutput

from kdcli.errors import InputError
from kdcli.models.heads import SENTENCE_EMBEDDING, SENTENCE_SETTINGS, with_pooler
from kdcli.models.shape import shape_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACTIVATIONS = {
    "Identity": "torch.nn.modules.linear.Identity",
    **{
        name: f"torch.nn.modules.activation.{name}"
        for name in ("Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "ELU", "LeakyReLU", "Mish", "Softplus", "Hardtanh")
    },
}
"""Activations of a Dense module: PyTorch's names, and the paths that sentence-transformers writes for them."""

ASSUMED: dict[str, Any] = {
    "pooling": ["mean"],
    "modules": [],
    "max_seq_length": None,
    "do_lower_case": False,
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": None,
}
"""What a body without modules of its own gets, as in sentence-transformers: the mean over its tokens, and no more."""

READING = ("max_seq_length", "do_lower_case", "prompts", "default_prompt_name", "similarity_fn_name")
"""What of that says how texts are read, and how embeddings are compared."""


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return _at(states, mask.int().argmax(1))


def _last(states: Tensor, mask: Tensor) -> Tensor:
    last = (mask.int() * torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)).argmax(1)
    return _at(states * mask[..., None].to(states.dtype), last)


def _at(states: Tensor, positions: Tensor) -> Tensor:
    return states.gather(1, positions[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


def _sum(states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    weights = weights[..., None].to(states.dtype)
    return (states * weights).sum(1), weights.sum(1).clamp(min=1e-9)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(states, mask)
    return total / count


def _mean_by_root(states: Tensor, mask: Tensor) -> Tensor:
    total, count = _sum(states, mask)
    return total / count.sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    # A token weighs its number from 1, counted from the first real one (SGPT, arXiv 2202.08904, section 3).
    return _mean(states, mask.cumsum(1) * mask)


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)


POOLING = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""From (batch, seq, hidden) and a mask (batch, seq) to (batch, hidden): sentence-transformers' names, in the order in
which it joins several."""


class Dense(nn.Module):
    """A linear map of the embedding and an activation: (batch, in) to (batch, out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = getattr(nn, activation)()

    def forward(self, embedding: Tensor) -> Tensor:
        return self.activation(self.linear(embedding))  # type: ignore[no-any-return]


class Normalize(nn.Module):
    """The embedding at unit length."""

    def forward(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding, dim=-1)


@dataclass
class EmbeddingOutput(ModelOutput):
    """What a model of sentence embeddings gives: (batch, dimension), and what its body was asked for beside it."""

    sentence_embedding: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class _Embedding(PreTrainedModel):
    """A body with pooling and modules after it, by its configuration. A family's class has the family's own base."""

    body_class: type[PreTrainedModel]

    def __init__(self, config: "PretrainedConfig") -> None:
        super().__init__(config)
        settings = copy.deepcopy(getattr(config, SENTENCE_SETTINGS, ASSUMED))
        setattr(config, SENTENCE_SETTINGS, settings)
        config.architectures = [type(self).__name__]
        setattr(self, self.base_model_prefix, self.body_class(config, **with_pooler(self.body_class, False)))
        self.pooling = tuple(settings["pooling"])
        self.after_pooling = nn.ModuleList()
        width = len(self.pooling) * shape_of(config).hidden
        for module in settings["modules"]:
            self.after_pooling.append(module_of(module, width))
            width = module.get("out_features", width)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> EmbeddingOutput:
        """Return the embeddings of texts. inputs: further ones of the body."""
        found = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        states = found.last_hidden_state
        mask = states.new_ones(states.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
        embedding = torch.cat([POOLING[mode](states, mask) for mode in self.pooling], -1)
        for module in self.after_pooling:
            embedding = module(embedding)
        return EmbeddingOutput(embedding, found.get("hidden_states"), found.get("attentions"))


def module_of(settings: dict[str, Any], width: int) -> nn.Module:
    """Return a new module that a configuration describes. width: of the embeddings that it is given."""
    if settings["type"] == "Normalize":
        return Normalize()
    return Dense(width, settings["out_features"], settings["bias"], settings["activation"])


@functools.cache
def class_over(body: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class of models of sentence embeddings whose body is of a class of the library."""
    base = next(kind for kind in body.__mro__[1:] if issubclass(kind, PreTrainedModel))
    name = f"{body.__name__.removesuffix('Model')}{SENTENCE_EMBEDDING.architecture[0]}"
    prefix = body.base_model_prefix or "model"
    own = {"body_class": body, "base_model_prefix": prefix, "config_class": body.config_class, "__module__": __name__}
    return type(name, (_Embedding, base), own)


class _Classes:
    """The library's table of classes by that of their configuration: here over its table of bodies."""

    def __init__(self) -> None:
        self._registered: dict[type, type] = {}

    def __contains__(self, config: type) -> bool:
        return config in self._registered or config in AutoModel._model_mapping

    def __getitem__(self, config: type) -> type:
        return self._registered.get(config) or class_over(AutoModel._model_mapping[config])

    def register(self, config: type, model: type, exist_ok: bool = False) -> None:
        self._registered[config] = model


class AutoModelForSentenceEmbedding(_BaseAutoModelClass):
    """Models of sentence embeddings of every family, in the library's way."""

    _model_mapping = _Classes()  # type: ignore[assignment]


def settings_of(model_or_config: Any) -> dict[str, Any]:
    """Return how embeddings are made, as the configuration of their model has it: plain values by name."""
    return getattr(getattr(model_or_config, "config", model_or_config), SENTENCE_SETTINGS)  # type: ignore[no-any-return]


def dimension_of(model_or_config: Any) -> int:
    """Return how wide the embeddings of a model are, by its configuration."""
    found = shape_of(getattr(model_or_config, "config", model_or_config)).embedding
    assert found is not None
    return found


def on_body(body: PreTrainedModel, settings: dict[str, Any], weights: dict[str, Tensor]) -> PreTrainedModel:
    """Return a model of sentence embeddings around a body, which becomes a part of it and loses its pooler.

    weights: of the modules after pooling, by their names in the whole. No random number is drawn.
    """
    config, kind = body.config, type(body)
    setattr(config, SENTENCE_SETTINGS, settings)
    with torch.device("meta"):
        model = class_over(kind)(config)  # type: ignore[arg-type]
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # type: ignore[assignment]
    setattr(model, model.base_model_prefix, body)
    model.load_state_dict(weights, strict=False, assign=True)
    return model.eval()


def read_alike(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let a student of sentence embeddings read texts as its teacher does, in place; no other models are changed."""
    own, given = (getattr(model.config, SENTENCE_SETTINGS, None) for model in (student, teacher))
    if own is not None and given is not None:
        own.update(copy.deepcopy({name: given[name] for name in READING}))


def append_dense(
    model: PreTrainedModel, weight: Tensor, bias: Tensor | None = None, *, normalize: bool = False
) -> None:
    """Put a linear map (out, in) after the last module of a model of sentence embeddings, in place.

    normalize: whether embeddings of unit length follow. Raises InputError where the map does not fit.
    """
    out_features, in_features = weight.shape
    if in_features != (width := dimension_of(model)):
        raise InputError(f"a map of {in_features} features does not fit embeddings of {width}")
    settings: dict[str, Any] = {
        "type": "Dense",
        "out_features": out_features,
        "bias": bias is not None,
        "activation": "Identity",
    }
    added = [settings, {"type": "Normalize"}] if normalize else [settings]
    modules: Any = model.after_pooling
    device = next(model.parameters()).device
    for one in added:
        modules.append(module_of(one, in_features).to(device).train(model.training))
    settings_of(model)["modules"] = [*settings_of(model)["modules"], *added]
    linear = modules[-len(added)].linear
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
