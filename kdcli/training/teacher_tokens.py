"""A fixed teacher's most probable next tokens, computed once and kept on disk (`teacher.top_k`).

Logits of all tokens would take more room than any disk has: of each position the k most probable tokens are kept, with
the probability of all others together, and the student is compared over these k + 1 outcomes.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from kdcli.files import atomic_folder, cache_dir, fingerprint, write_json
from kdcli.manifest import check_manifest, is_sealed, write_manifest
from kdcli.models.capture import Capture
from kdcli.models.finite import NotFiniteError
from kdcli.models.hashing import hash_of_dataset, hash_of_model
from kdcli.objectives.distribution import Distribution
from kdcli.objectives.divergence import top_and_rest
from kdcli.objectives.rows import chunk_of
from kdcli.signals import Logits, Request, TopTokens
from kdcli.tasks.predict import by_length, placed
from kdcli.terminal import tell
from kdcli.training.distributed import main_does

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind

IDS, LOGS, PLACES, RECORD = "ids.bin", "log_probabilities.bin", "places.npy", "record.json"

PLACE, COUNT = "teacher_tokens_at", "teacher_tokens"
"""Of a training row where its tokens begin, and how many positions of it there are."""

SAMPLE = 4
"""Rows on which the cut is measured."""


@dataclass(frozen=True)
class Cut:
    """What is kept of each distribution: k tokens at a temperature, at predicted or at all positions."""

    k: int
    temperature: float
    everywhere: bool = False


@dataclass
class Table:
    """What is kept for one data set. places: (rows, 2), where each row begins and how many positions it has."""

    folder: Path
    cut: Cut
    places: np.ndarray
    rest: float

    @cached_property
    def ids(self) -> np.ndarray:
        """(positions, k), mapped into memory."""
        return np.memmap(self.folder / IDS, np.int32, "r").reshape(-1, self.cut.k)

    @cached_property
    def log_probabilities(self) -> np.ndarray:
        """(positions, k + 1), mapped into memory."""
        return np.memmap(self.folder / LOGS, np.float32, "r").reshape(-1, self.cut.k + 1)

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself.
        return {key: value for key, value in self.__dict__.items() if key not in ("ids", "log_probabilities")}


@dataclass
class KnownTokens:
    """What is kept for the rows of training and, beside them, for the held-out ones."""

    tables: list[Table]

    @property
    def cut(self) -> Cut:
        """What is kept of each distribution."""
        return self.tables[0].cut

    def to(self, device: torch.device) -> None:
        """Do nothing: what a batch needs comes with it."""

    def placed(self, rows: Dataset, number: int = 0) -> Dataset:
        """Return the rows of table `number` with the places of their tokens, which a `TokensCollator` reads."""
        before = sum(len(table.ids) for table in self.tables[:number])
        places = self.tables[number].places
        rows = rows.add_column(PLACE, places[:, 0] + before)  # type: ignore[call-arg]
        return rows.add_column(COUNT, places[:, 1])  # type: ignore[call-arg]

    def read(self, place: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and log-probabilities of the positions of a row."""
        for table in self.tables:
            if place < len(table.ids):
                return table.ids[place : place + count], table.log_probabilities[place : place + count]
            place -= len(table.ids)
        raise IndexError("no such row")

    def of(self, batch: Mapping[str, Tensor]) -> SimpleNamespace:
        """Return what is known for a batch of a `TokensCollator`, in the place of a model's output."""
        return SimpleNamespace(logits=TopTokens(batch[IDS], batch[LOGS], self.cut.temperature))


@dataclass
class TokensCollator:
    """Adds the teacher's tokens to batches."""

    collator: Any
    known: KnownTokens

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.collator(rows)
        found = [self.known.read(row[PLACE], row[COUNT]) for row in rows]
        batch[IDS] = torch.from_numpy(np.concatenate([ids for ids, _ in found]).astype(np.int64))
        batch[LOGS] = torch.from_numpy(np.concatenate([logs for _, logs in found]))
        return batch

    def begin_epoch(self, epoch: int) -> None:
        """Tell the collator below which epoch begins, where it cares."""
        if hasattr(self.collator, "begin_epoch"):
            self.collator.begin_epoch(epoch)


def top_tokens(logits: Logits, cut: Cut) -> TopTokens:
    """Return what is kept of a teacher's logits, formed some rows at a time."""
    ids, logs, chunk = [], [], chunk_of(logits)
    for start in range(0, len(logits), chunk):
        table = torch.log_softmax(logits[start : start + chunk].float() / cut.temperature, dim=-1)
        chosen = table.topk(cut.k, dim=-1).indices
        ids.append(chosen)
        logs.append(torch.cat(top_and_rest(table, chosen), 1))
    return TopTokens(torch.cat(ids), torch.cat(logs), cut.temperature)


def keep_tokens(
    teacher: "PreTrainedModel",
    rows: Dataset,
    collator: Any,
    cut: Cut,
    *,
    kind: "TaskKind",
    batch_size: int,
    device: str,
    console: Console,
) -> Table:
    """Return the most probable tokens of a fixed teacher for an encoded data set, computed in one pass.

    The folder is named by the teacher's weights and configuration, the inputs, the positions that are kept and the cut,
    and appears whole or not at all; one that is damaged is made again, and the console told. Raises NotFiniteError when
    logits contain NaN or inf.
    """
    of = {
        "model": hash_of_model(teacher),
        "inputs": hash_of_dataset(rows, labels=not cut.everywhere),
        "cut": [cut.k, cut.temperature, cut.everywhere],
        "format": 2,
    }
    folder = cache_dir() / "tokens" / fingerprint(of)

    def make() -> None:
        problem = check_manifest(folder, of) if is_sealed(folder) else None
        if problem is not None:
            tell(console, f"cache: {folder} is made again: {problem}")
        if problem is not None or not is_sealed(folder):
            with atomic_folder(folder, ours=True) as new:
                _write(new, teacher, rows, collator, cut, kind, batch_size, device)
                write_manifest(new, of)

    main_does(make)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return Table(folder, cut, np.load(folder / PLACES), record["rest"])


def _write(
    folder: Path,
    teacher: "PreTrainedModel",
    rows: Dataset,
    collator: Any,
    cut: Cut,
    kind: "TaskKind",
    batch_size: int,
    device: str,
) -> None:
    """Write the tokens in the order of the pass, longest rows first."""
    capture = Capture(teacher, Request(logits=True, all_positions=cut.everywhere), kind)
    places, rest, total = np.zeros((len(rows), 2), np.int64), 0.0, 0
    try:
        with (
            placed(teacher, device) as place,
            torch.inference_mode(),
            (folder / IDS).open("wb") as ids,
            (folder / LOGS).open("wb") as logs,
        ):
            order = by_length(rows)
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                batch = collator(rows.__getitems__(numbers.tolist()))
                positions = kind.positions(batch, everywhere=cut.everywhere)
                assert positions is not None
                counts = np.bincount(positions.numpy() // batch["input_ids"].shape[1], minlength=len(numbers))
                batch = {name: values.to(place) for name, values in batch.items()}
                with capture as running:
                    (table,) = running.run(batch).predictions
                found = top_tokens(table.logits, cut)
                if not found.log_probabilities.isfinite().all():
                    raise NotFiniteError(
                        "the logits of the teacher contain NaN or inf",
                        hint="its weights are damaged, or too large for the precision that it runs in",
                    )
                ids.write(found.ids.to(torch.int32).cpu().numpy().tobytes())
                logs.write(found.log_probabilities.cpu().numpy().tobytes())
                places[numbers, 0] = total + np.cumsum(counts) - counts
                places[numbers, 1] = counts
                total += int(counts.sum())
                rest += float(found.log_probabilities[:, -1].double().exp().sum())
    finally:
        capture.close()
    np.save(folder / PLACES, places)
    write_json(folder / RECORD, {"rest": rest / max(total, 1), "positions": total})


def measure_cut(
    teacher: "PreTrainedModel",
    student: "PreTrainedModel",
    rows: Dataset,
    collator: Any,
    cut: Cut,
    *,
    kind: "TaskKind",
    distribution: Distribution,
    device: str,
) -> tuple[float, float]:
    """Return the student's divergence from the teacher on a few rows: over all tokens, and over those that are kept."""
    few = np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)
    batch = collator(rows.__getitems__(few.tolist()))
    request, tables = Request(logits=True, all_positions=cut.everywhere), []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for model in (student, teacher):
            place = stack.enter_context(placed(model, device))
            capture = Capture(model, request, kind)
            stack.callback(capture.close)
            with capture as running:
                tables += running.run({name: values.to(place) for name, values in batch.items()}).predictions
        own, other = tables
        whole, kept = (
            distribution.divergence(own.logits, logits, own.weights, cut.temperature, scale=False)
            for logits in (other.logits, top_tokens(other.logits, cut))
        )
        return float(whole), float(kept)
