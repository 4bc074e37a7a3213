"""Masked language modelling: plain text, of which a model predicts the masked tokens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.models.heads import Head
from kdcli.tasks.kind import Fields, TaskKind

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.objectives.distribution import Distribution
    from kdcli.signals import Prediction

MASKED_LM = Head(
    "masked-lm",
    "a masked language model",
    "AutoModelForMaskedLM",
    ("ForMaskedLM", "ForPreTraining"),
    "fill-mask",
)


class MaskedLM(TaskKind):
    """Plain text in blocks; some tokens are masked, others in every epoch."""

    name = "text"
    title = "plain text"
    head = MASKED_LM
    fields = Fields
    metrics = ("loss",)
    provides = frozenset({"vocabulary"})
    scored_by_loss = True
    inputs_change = True

    @property
    def distribution(self) -> "Distribution":
        from kdcli.objectives.distribution import Categorical

        return Categorical()

    def configure(self, labels: Sequence[str]) -> dict[str, Any]:
        return {}

    def positions(self, batch: "Mapping[str, Tensor]", *, everywhere: bool = False) -> "Tensor":
        """Return the masked positions, or all real ones."""
        return batch["real_positions" if everywhere else "masked_positions"]

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return one table with a row a masked token, or a real one, over the vocabulary."""
        from kdcli.objectives.distribution import row_weights
        from kdcli.signals import Prediction

        positions, masked = self.positions(batch, everywhere=everywhere), batch["masked_positions"]
        shape = batch["labels"].shape
        logits = output.logits.flatten(0, 1)
        if len(logits) != len(positions):
            logits = logits[positions]
        weights, target = row_weights(positions, *shape), batch["labels"].flatten()[masked]
        if not everywhere:
            return [Prediction(logits, weights, target)]
        return [Prediction(logits, weights, target, batch["masked_among_real"], row_weights(masked, *shape))]


KIND = MaskedLM()
