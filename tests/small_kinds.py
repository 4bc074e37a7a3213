"""Kinds of tasks that the package does not have, as another package would offer them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from kdcli.objectives.distribution import Categorical
from kdcli.tasks import registry
from kdcli.tasks.text_inputs import TextFields, TextKind, read_texts


class Texts(TextKind):
    """Texts alone: neither gold answers nor masked tokens; a student follows its teacher's classes."""

    name = "texts"
    title = "texts without answers"
    fields = TextFields
    provides: ClassVar[frozenset[str]] = frozenset({"one-per-example", "text"})
    metrics = usual_metrics = ("loss",)
    scored_by_loss = True
    distribution = Categorical()

    def read_labels(self, *_: Any) -> Any:
        raise AssertionError("there are no labels")

    labels_for = read_labels

    def read(
        self, columns: Any, fields: Any, source: str, notes: list[str], labels: Any = None
    ) -> tuple[pa.Table, tuple[str, ...]]:
        return pa.table(read_texts(columns, fields.columns, source)), ()

    def encode(self, rows: Any, processor: Any, max_length: int) -> Any:
        # Whatever a batch calls its labels is no gold answer of this kind.
        return super().encode(rows.add_column("label", np.zeros(len(rows), np.int64)), processor, max_length)

    def predictions(self, output: Any, batch: Any, *, everywhere: bool = False) -> Any:
        (table,) = super().predictions(output, batch)
        table.target = None
        return [table]

    def configure(self, labels: Any) -> dict[str, Any]:
        return {}


TEXTS = Texts()


@contextmanager
def offered(folder: Path) -> Iterator[None]:
    """Install a package that offers these kinds, with its files in `folder`, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        info = folder / "small_kinds-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small-kinds\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[kdcli.tasks]\ntexts = small_kinds:TEXTS\n")
        patch.syspath_prepend(str(folder))
        registry.offers().forget()
        yield
    registry.offers().forget()
