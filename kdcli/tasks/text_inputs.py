"""What kinds of tasks share whose examples are one text, or a pair of texts, each with one prediction."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdcli.models.heads import Head

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.signals import Prediction

SEQUENCE_CLASSIFICATION = Head(
    "sequence-classification",
    "a classifier of texts",
    "AutoModelForSequenceClassification",
    ("ForSequenceClassification",),
    "text-classification",
)


def one_per_example(output: Any, batch: "Mapping[str, Tensor]") -> "list[Prediction]":
    """Return one table with a row an example: logits (batch, classes) beside the labels of the batch, if any."""
    from kdcli.signals import Prediction

    return [Prediction(output.logits, target=batch.get("labels"))]
