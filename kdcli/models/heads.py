"""What stands on a model's body: which heads there are, new ones, and models that start again from random weights."""

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.models.classes import classifier_names
from kdcli.models.families import Reads, family_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """What stands on a model's body. It belongs to the kinds of tasks that it is for.

    name, title, purpose: for people; the purpose follows "a head for". auto: the class of the library that makes body
    and head. architecture: how the class that a config.json names (`architectures`) ends, and `unlike` how one ends
    that is another in spite of that; never names of weights. pipeline_tag: for the model card. outputs: of a forward
    pass and of the ONNX graph; per_token where each token has a row of its own in them. module: where `auto` is.
    on_any_body: True where it needs no weights of its own, so that every body has it. causal: True where the body must
    be one whose tokens see none that come after them. library: that a model with it is loaded by, for the model card.
    reads: what examples of its tasks are.
    """

    name: str
    title: str
    purpose: str
    auto: str
    architecture: tuple[str, ...]
    pipeline_tag: str
    unlike: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("logits",)
    per_token: bool = False
    module: str = "transformers"
    on_any_body: bool = False
    causal: bool = False
    library: str = "transformers"
    reads: Reads = "text"

    def is_of(self, architecture: str) -> bool:
        """True when a class of that name has this head."""
        return architecture.endswith(self.architecture) and not architecture.endswith(self.unlike or ("\n",))

    def auto_class(self) -> Any:
        """Return the class of the library that makes body and head."""
        return getattr(importlib.import_module(self.module), self.auto)

    def make(self, config: Any, **arguments: Any) -> Any:
        """Return a model of a configuration with this head and random weights. arguments: of the library's class."""
        if config.architectures is None:
            # The library looks through them where it has several heads for a family.
            config.architectures = []
        return self.auto_class().from_config(config, **arguments)


BASE = Head(
    "base",
    "a base model",
    "anything but hidden states",
    "AutoModel",
    ("Model",),
    "feature-extraction",
    unlike=("LMHeadModel", "DoubleHeadsModel"),
    outputs=("last_hidden_state",),
    per_token=True,
)
"""No head: what is given are the hidden states of the last block."""

SENTENCE_EMBEDDING = Head(
    "sentence-embedding",
    "a model of sentence embeddings",
    "sentence embeddings",
    "AutoModelForSentenceEmbedding",
    ("ForSentenceEmbedding",),
    "sentence-similarity",
    outputs=("sentence_embedding",),
    module="kdcli.models.embedding",
    on_any_body=True,
    library="sentence-transformers",
)
"""Pooling over the last hidden states, and the modules after it, one vector a text."""

CAUSAL_LM = Head(
    "causal-lm",
    "a causal language model",
    "predicting next tokens",
    "AutoModelForCausalLM",
    ("ForCausalLM", "LMHeadModel"),
    "text-generation",
    per_token=True,
    causal=True,
)
"""The next token at each position. Models that continue texts and those that answer prompts have the same."""

IMAGE_CLASSIFICATION = Head(
    "image-classification",
    "a classifier of images",
    "classifying images",
    "AutoModelForImageClassification",
    ("ForImageClassification", "ForImageClassificationWithTeacher"),
    "image-classification",
    reads="images",
    module="kdcli.models.image_heads",
)

SENTENCE_SETTINGS = "sentence_embedding"
"""What this head adds to a body's configuration: see `kdcli.models.embedding`."""


@dataclass(frozen=True)
class Labelling:
    """What a task asks of a student's outputs. head: which it has. settings: of the configuration of a new one.

    align: puts the outputs of a trained model, named for messages, into the task's order in place; returns notes.
    """

    head: Head
    settings: Mapping[str, Any]
    align: "Callable[[PreTrainedModel, str], list[str]]"


def head_of(model: Any, heads: Iterable[Head]) -> Head | None:
    """Return the head of a model (or of a session, whose configuration tells), one of `heads`, `BASE`, or None."""
    from torch import nn

    if isinstance(model, nn.Module):
        if getattr(model, "base_model", None) is model:
            return BASE
        name = type(model).__name__
    else:
        name = (model.config.architectures or [""])[0]
    return next((head for head in (*heads, BASE) if head.is_of(name)), None)


def check_body(config: Any, head: Head, owner: object, where: str | None = None) -> None:
    """Raise InputError where no head of this sort can stand on a model's body. owner, where: for the message."""
    family = family_of(config)
    if head.causal and not family.causal:
        raise InputError(
            f"{owner} is of the family {family.title}, whose tokens see those that come after them: it cannot get a "
            f"head for {head.purpose}",
            where=where,
            hint="choose a decoder: `kdcli families` lists them",
        )
    known = getattr(head.auto_class(), "_model_mapping", None)
    if known is not None and type(config) not in known:
        raise InputError(
            f"{owner} is of the family {family.title}, for which transformers has no model with a head for "
            f"{head.purpose}",
            where=where,
            hint="choose a model of another family",
        )


def head_parameters(model: "PreTrainedModel") -> "list[nn.Parameter]":
    """Return the parameters of a model's head, which is beside its body, or the classifiers that its body holds."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    for name in classifier_names(model):
        inside -= {id(parameter) for parameter in model.get_submodule(name).parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in inside]


def with_new_head(
    model: "PreTrainedModel", head: Head, settings: Mapping[str, Any] = MappingProxyType({})
) -> "PreTrainedModel":
    """Return a model with a copy of the body of `model` and a fresh head; `model` is not changed.

    settings: of its configuration, such as num_labels. The head comes from PyTorch's global random state. A body
    without a pooler gets a fresh one where the head needs one.
    """
    import torch

    from kdcli.models.blocks import module_at
    from kdcli.models.lowrank import LowRankEmbedding, decoders_of, tie_decoders

    if head == BASE:
        body = copy.deepcopy(model.base_model)
        _forget_head(body.config)
        return body  # type: ignore[return-value]
    config = copy.deepcopy(model.config)
    _forget_head(config)
    for name, value in settings.items():
        setattr(config, name, value)
    family_of(config)
    headed = head.make(config, dtype=torch.float32)
    decoders = decoders_of(headed)
    headed = _on_body(headed, model)
    table = module_at(headed, family_of(config).word_embeddings)
    if isinstance(table, LowRankEmbedding):
        tie_decoders(headed, decoders, table)
    else:
        headed.tie_weights()
    return headed  # type: ignore[no-any-return]


def _forget_head(config: Any) -> None:
    """Remove what a head of sentence embeddings added to a configuration, in place."""
    if hasattr(config, SENTENCE_SETTINGS):
        delattr(config, SENTENCE_SETTINGS)


def with_pooler(kind: type, wanted: bool) -> dict[str, bool]:
    """Return the arguments that make a base model of a class with or without a pooler; none where it has no choice."""
    return {"add_pooling_layer": wanted} if "add_pooling_layer" in inspect.signature(kind).parameters else {}


def _on_body(headed: "PreTrainedModel", model: "PreTrainedModel") -> "PreTrainedModel":
    """Put copies of the parts of a body in the place of those of `headed`, and return it in eval mode."""
    body = headed.base_model
    own_config = getattr(model.base_model, "config", model.config)
    # Some bodies hold the classifier themselves.
    own = {name: headed.get_submodule(name) for name in classifier_names(headed)}
    if not own and hasattr(body, "get_classifier"):
        raise InputError(f"{type(body).__name__} has no linear classifier at its end, so it cannot get a new one")
    headed.config.dtype = model.config.dtype
    # Some bodies have weights beside their parts, such as a token or positions.
    for name, parameter in model.base_model.named_parameters(recurse=False):
        setattr(body, name, copy.deepcopy(parameter))
    for name, child in model.base_model.named_children():
        if child is not None and getattr(body, name, None) is not None:
            # Its modules read the configuration of the whole, not a copy of the old one.
            setattr(body, name, copy.deepcopy(child, {id(own_config): headed.config}))
    for name, classifier in own.items():
        parent, _, attribute = name.rpartition(".")
        setattr(headed.get_submodule(parent), attribute, classifier)
    return headed.eval()
