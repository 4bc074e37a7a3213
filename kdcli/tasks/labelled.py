"""What kinds of tasks share whose examples have one answer each: a label in a column of its own."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdcli.data.columns import Column, Columns, is_missing
from kdcli.tasks.kind import TaskKind

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import Tensor

    from kdcli.signals import Prediction


class LabelledKind(TaskKind):
    """Examples with one answer each. What an example is, and what its label means, is left to others."""

    @abstractmethod
    def read_examples(self, columns: Columns, fields: Any, source: str) -> dict[str, Any]:
        """Return what is shown to a model, as columns of rows. Arguments are those of `read`."""

    @abstractmethod
    def read_labels(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None
    ) -> tuple[Any, tuple[str, ...]]:
        """Return a label a row, as a batch takes them, and the names of all labels. Arguments are those of `read`."""

    def read(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        import pyarrow as pa

        from kdcli.data.tables import array_of_labels

        inputs = self.read_examples(columns, fields, source)
        values, labels = self.read_labels(columns, fields, source, notes, labels)
        return pa.table({**inputs, "label": array_of_labels(values)}), labels

    @abstractmethod
    def labels_for(
        self, config: Any, columns: Columns, fields: Any, source: str, notes: list[str], names: Sequence[str] | None
    ) -> tuple[Any, tuple[str, ...]]:
        """Return the same, where the labels are a model's own. Arguments are those of `read_for`."""

    def read_for(
        self,
        config: Any,
        columns: Columns,
        fields: Any,
        source: str,
        notes: list[str],
        names: Sequence[str] | None,
        form: Mapping[str, Any],
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        import pyarrow as pa

        from kdcli.data.tables import array_of_labels

        inputs = self.read_examples(columns, fields, source)
        values, labels = self.labels_for(config, columns, fields, source, notes, names)
        return pa.table({**inputs, "label": array_of_labels(values)}), labels

    def has_answers(self, columns: Columns, fields: Any) -> bool:
        values = columns.get(fields.label or "label", Column())
        return not all(map(is_missing, values))

    def predictions(
        self, output: Any, batch: "Mapping[str, Tensor]", *, everywhere: bool = False
    ) -> "list[Prediction]":
        """Return one table with a row an example: logits (batch, classes) beside the labels of the batch, if any."""
        from kdcli.signals import Prediction

        own, taught = (getattr(output, name, None) for name in ("cls_logits", "distillation_logits"))
        heads = (own, taught) if own is not None and taught is not None else None
        return [Prediction(output.logits, target=batch.get("labels"), heads=heads)]


def gold(rows: Any) -> "np.ndarray":
    """Return the labels of rows (a table or a data set), (n, ...)."""
    import pyarrow as pa

    from kdcli.data.rows import array_of

    if not isinstance(rows, pa.Table):
        return array_of(rows, "label")
    column = rows.column("label")
    if not pa.types.is_list(column.type):
        return column.to_numpy()
    return column.combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
