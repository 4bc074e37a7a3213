"""What a kind of task is: everything that is particular to it, in one object. One file of this folder a kind.

Adding a kind is writing one file with a subclass of `TaskKind` in it, called `KIND`, or offering one from another
package as an entry point `kdcli.tasks`. No other module asks which kind a task is of.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kdcli.models.heads import Head
from kdcli.recipe.schema import Section

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction

CAPABILITIES = {
    "labels": "gold labels",
    "classes": "one class out of several",
    "one-per-example": "one prediction an example",
    "text": "texts as they were written",
    "vocabulary": "predictions over a vocabulary",
}
"""What a kind may provide and a method may need, in words that follow "needs"."""


class Fields(Section):
    """Base of a kind's own fields, which stand beside the common ones in `[task]`."""


@dataclass(frozen=True)
class Encoded:
    """A task as a model reads it. collator: from rows of either set to a batch."""

    train: "Dataset"
    selection: "Dataset"
    collator: Any


class TaskKind(ABC):
    """One kind of task: its data, its head, what a model predicts on it, and how that is scored."""

    name: ClassVar[str]
    title: ClassVar[str]
    head: ClassVar[Head]
    fields: ClassVar[type[Fields]]
    metrics: ClassVar[tuple[str, ...]]
    """Names of all metrics that fit; the first one is the default."""
    provides: ClassVar[frozenset[str]]
    """Some of `CAPABILITIES`."""
    scored_by_loss: ClassVar[bool] = False
    """True where a student's only score is its distillation loss on held-out rows."""
    inputs_change: ClassVar[bool] = False
    """True where inputs are drawn again in every epoch (dynamic masking): no output of the teacher may be cached."""

    @property
    @abstractmethod
    def distribution(self) -> "Distribution":
        """What one row of logits parametrises."""

    # Data and labels

    @abstractmethod
    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return what a new head's configuration must know: num_labels, id2label, problem_type."""

    # What a model reads and predicts

    def positions(self, batch: "Mapping[str, Tensor]", *, everywhere: bool = False) -> "Tensor | None":
        """Return the flat positions (of batch x seq) at which the head has to run; None where it runs on all.

        everywhere: at all real tokens, not only at those with a gold answer.
        """
        return None

    @abstractmethod
    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return the tables of predictions that a model's output holds; as many for every model and batch.

        output: of a forward pass, with the head's `outputs` as attributes. Where `positions` gives some, its
        logits may be those of these positions alone, (1, positions, classes).
        """
