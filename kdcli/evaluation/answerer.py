"""A trained model that answers examples without gold answers."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kdcli.data.tables import dataset_of
from kdcli.tasks.generated import Writing
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.predict import predict

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Answerer:
    """A PyTorch model or an `OnnxModel`, and how it is asked.

    name: in messages. device: as `train.device`. writing: how a model that writes texts does so.
    """

    name: str
    kind: TaskKind
    model: Any
    processor: Any
    max_length: int
    batch_size: int = 64
    device: str = "auto"
    writing: Writing | None = None

    def __post_init__(self) -> None:
        from torch import nn

        from kdcli.machine import computing_device

        if isinstance(self.model, nn.Module):
            # Once, and not for each part of the examples.
            self.model.to(computing_device(self.device))

    def replies(self, rows: "pa.Table", *, top: int | None = None, first: int = 0) -> list[dict[str, Any]]:
        """Return a reply a row, as `TaskKind.replies` does. rows: of `TaskKind.read_inputs`; first: their number."""
        writing = {"writing": replace(self.writing, first=first)} if self.writing is not None else {}
        return self.kind.replies(
            self.model,
            dataset_of(rows),
            self.processor,
            top=top,
            max_length=self.max_length,
            ask=predict,
            batch_size=self.batch_size,
            owner=self.name,
            device=self.device,
            **writing,
        )
