"""Regression: a number for a text, or for a pair of texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.tasks.kind import Fields, TaskKind
from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION, one_per_example

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction


class Regression(TaskKind):
    """A number."""

    name = "regression"
    title = "a number"
    head = SEQUENCE_CLASSIFICATION
    fields = Fields
    metrics = ("pearson", "spearman", "mse", "mae")
    provides = frozenset({"labels", "one-per-example", "text"})

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Normal

        return Normal()

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        return one_per_example(output, batch)


KIND = Regression()
