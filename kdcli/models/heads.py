"""What stands on a model's body: which heads there are, new ones, and models that start again from random weights."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcli.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """What stands on a model's body. It belongs to the kinds of tasks that it is for.

    name, title: for people. auto: the class of the library that makes body and head. architecture: how the class that
    a config.json names (`architectures`) ends; never names of weights. pipeline_tag: for the model card. inputs: of
    the ONNX graph, as far as tokenizer and family have them. outputs: of the graph and of a forward pass; per_token
    where each token has a row of its own in them.
    """

    name: str
    title: str
    auto: str
    architecture: tuple[str, ...]
    pipeline_tag: str
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
    outputs: tuple[str, ...] = ("logits",)
    per_token: bool = False


@dataclass(frozen=True)
class Labelling:
    """What a task asks of a student's outputs. settings: of a new head.

    align: puts the outputs of a trained model, named for messages, into the task's order in place; returns notes.
    """

    settings: Mapping[str, Any]
    align: "Callable[[PreTrainedModel, str], list[str]]"


HEADS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "base": "AutoModel",
}
"""What stands on a model's body, and the class of the library that makes both."""


TITLES = {
    "sequence-classification": "a classifier of texts",
    "masked-lm": "a masked language model",
    "base": "a base model",
}


def head_of(model: "PreTrainedModel") -> str:
    """Return which of `HEADS` stands on the body of `model`."""
    if model.base_model is model:
        return "base"
    return "masked-lm" if type(model).__name__.endswith("ForMaskedLM") else "sequence-classification"


def with_new_head(model: "PreTrainedModel", head: str, **labels: Any) -> "PreTrainedModel":
    """Return a model with a copy of the body of `model` and a fresh head, one of `HEADS`; `model` is not changed.

    labels: of a classifier, as `with_classifier` takes them. The head comes from PyTorch's global random state.
    """
    import torch
    import transformers

    if head == "sequence-classification":
        return with_classifier(model, **labels)
    if head == "base":
        return copy.deepcopy(model.base_model)  # type: ignore[return-value]
    config = copy.deepcopy(model.config)
    headed = _on_body(getattr(transformers, HEADS[head]).from_config(config, dtype=torch.float32), model)
    named = dict(headed.named_parameters())
    if all(source in named for source in headed.all_tied_weights_keys.values()):
        headed.tie_weights()
    # Factors in the table's place are no matrix that the head could share: it has one of its own.
    return headed


def with_classifier(
    model: "PreTrainedModel", *, num_labels: int = 2, label_names: list[str] | None = None, problem_type: Any = None
) -> "PreTrainedModel":
    """Return a classifier with a copy of the body of `model` and a fresh head; `model` is not changed.

    The head comes from PyTorch's global random state. A body without a pooler gets a fresh one where its family's
    classifiers need one.
    """
    import torch
    import transformers

    config = copy.deepcopy(model.config)
    names = label_names if label_names is not None else [f"LABEL_{i}" for i in range(num_labels)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = problem_type
    family_of(config)
    return _on_body(
        getattr(transformers, HEADS["sequence-classification"]).from_config(config, dtype=torch.float32), model
    )


def _on_body(headed: "PreTrainedModel", model: "PreTrainedModel") -> "PreTrainedModel":
    """Put copies of the parts of a body in the place of those of `headed`, and return it in eval mode."""
    body = headed.base_model
    headed.config.dtype = model.config.dtype
    for name, child in model.base_model.named_children():
        if child is not None and getattr(body, name, None) is not None:
            setattr(body, name, copy.deepcopy(child))
    return headed.eval()
