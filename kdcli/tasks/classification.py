"""Classification: one class out of several for a text, or for a pair of texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.tasks.kind import Fields, TaskKind
from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION, one_per_example

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction


class Classification(TaskKind):
    """One class out of several."""

    name = "classification"
    title = "one class out of several"
    head = SEQUENCE_CLASSIFICATION
    fields = Fields
    metrics = ("accuracy", "f1", "mcc", "balanced_accuracy")
    provides = frozenset({"labels", "classes", "one-per-example", "text"})

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "label_names": list(labels),
            "problem_type": "single_label_classification",
        }

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        return one_per_example(output, batch)


KIND = Classification()
