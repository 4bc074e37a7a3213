"""The classes of a model: their number, their names, their order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError
from kdcli.words import counted

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

TWO_HEADS = ("cls_classifier", "distillation_classifier")
"""The heads of a DeiT with a distillation token, whose outputs hold the logits of each beside their mean."""


def class_names_of(config: "PretrainedConfig") -> list[str]:
    """Return a model's class names in the order of its logits."""
    names = config.id2label or {}
    return [str(names[i]) for i in sorted(names)]  # type: ignore[index, type-var]


def equal_names(names: Sequence[str]) -> str | None:
    """Return the words that say which two classes have the same name, such as "classes 0 and 2 are both named 'no'"."""
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if first.setdefault(name, number) != number:
            return f"classes {first[name]} and {number} are both named {name!r}"
    return None


def name_classes(config: "PretrainedConfig", names: Sequence[str], where: str) -> None:
    """Give a model's classes names, in place. Raises InputError when there are not as many."""
    if len(names) != config.num_labels:
        raise InputError(
            f"{counted(len(names), 'name')}, but the model has {counted(config.num_labels or 0, 'class', 'classes')}",
            where=where,
            hint="name all of them, in the model's order",
        )
    if twice := equal_names(names):
        raise InputError(f"{twice}: each class needs a name of its own", where=where)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def reorder_classes(model: "PreTrainedModel", order: Sequence[int]) -> None:
    """Let class i of `model` be what was its class `order[i]`, in place; the names are left to the caller."""
    if list(order) == list(range(len(order))):
        return
    import torch

    rows = torch.tensor(list(order))
    with torch.no_grad():
        for head in classifiers(model):
            head.weight.copy_(head.weight[rows].clone())
            if head.bias is not None:
                head.bias.copy_(head.bias[rows].clone())


def classifiers(model: "PreTrainedModel") -> "list[nn.Linear]":
    """Return the linear layers that give logits: one, or several whose mean is the model's prediction."""
    if not (names := classifier_names(model)):
        raise InputError(f"{type(model).__name__} has no linear classifier at its end")
    return [model.get_submodule(name) for name in names]  # type: ignore[misc]


def has_two_heads(model: "PreTrainedModel") -> bool:
    """True where a model's outputs hold the logits of two heads, so that gold labels and a teacher can teach one each.

    Of timm's models with two heads the outputs hold the mean alone.
    """
    return set(TWO_HEADS) <= set(classifier_names(model))


def classifier_names(model: "PreTrainedModel") -> list[str]:
    """Return the paths of the linear layers that give logits; none where there are none."""
    from torch import nn

    body: Any = model.base_model
    if hasattr(body, "get_classifier"):
        # A body of timm holds them itself.
        layers = body.get_classifier()
        own = {id(one) for one in (layers if isinstance(layers, tuple) else (layers,)) if isinstance(one, nn.Linear)}
        return [name for name, module in model.named_modules() if id(module) in own]
    classes, found = model.config.num_labels, {}
    for name, module in model.named_modules():
        head = name.partition(".")[0]
        if head not in TWO_HEADS and not head.startswith(("classifier", "qa_outputs")):
            continue
        if isinstance(module, nn.Linear) and module.out_features == classes:
            # What stands before it in a head may by chance be as wide.
            found[head] = name
    return list(found.values())
