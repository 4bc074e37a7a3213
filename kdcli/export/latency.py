"""How long one forward pass takes: PyTorch eager and ONNX Runtime, in turn, on the same inputs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from kdcli.export.session import OnnxModel
from kdcli.models.inputs import model_inputs
from kdcli.words import counted

WARM_UP = 5

REST = 0.005
"""Seconds between two contestants."""


@dataclass
class LatencyReport:
    """rows: model, backend, batch, sequence, p50, p95, p99 (milliseconds), throughput (examples a second)."""

    rows: list[dict[str, Any]]
    threads: int
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {"threads": self.threads, "runs": self.runs, "rows": self.rows}

    def of(self, model: str, backend: str, batch: int, sequence: int) -> dict[str, Any]:
        """Return one row."""
        return next(
            row
            for row in self.rows
            if (row["model"], row["backend"], row["batch"], row["sequence"]) == (model, backend, batch, sequence)
        )

    def table(self) -> Table:
        title = (
            f"latency in ms, {counted(self.threads, 'thread')}, {counted(self.runs, 'run')} each, in turn\n"
            "size: batch x tokens; speed: against PyTorch eager"
        )
        # Eight columns fit into 80 characters without frames and paddings.
        table = Table(title=title, title_style="", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in (
            "model",
            "size",
            "backend",
            "p50",
            "p95",
            "p99",
            "examples/s",
            "speed",
        ):
            table.add_column(name, justify="right" if name not in ("model", "backend") else "left", no_wrap=True)
        for row in self.rows:
            eager = self.of(row["model"], "PyTorch", row["batch"], row["sequence"])
            table.add_row(
                row["model"],
                f"{row['batch']} x {row['sequence']}",
                row["backend"],
                *(f"{row[key]:.2f}" for key in ("p50", "p95", "p99")),
                f"{row['throughput']:,.0f}",
                f"{eager['p50'] / row['p50']:.2f}x",
            )
        return table


@torch.inference_mode()
def measure(
    models: Mapping[str, tuple[Any, OnnxModel | None]],
    *,
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int],
    threads: int,
    runs: int,
    vocab_size: int = 1000,
) -> LatencyReport:
    """Time every model over a grid of batch sizes and sequence lengths.

    models: name -> (PyTorch model, its ONNX session or None). All contestants of a grid cell run once a round,
    in turn, so that a drift of the machine's speed meets all of them; the first rounds are not counted, and in every
    round each rests and runs once uncounted before it is timed.
    PyTorch's thread count is set for the time and restored. Sessions keep the count they were opened with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for batch in batch_sizes:
            for sequence in sequence_lengths:
                rows += _cell(models, batch, sequence, runs, vocab_size)
    finally:
        torch.set_num_threads(before)
    return LatencyReport(rows, threads, runs)


def _cell(
    models: Mapping[str, tuple[Any, OnnxModel | None]], batch: int, sequence: int, runs: int, vocab_size: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (batch, sequence), generator=generator)
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    contestants: list[tuple[str, str, Callable[[], Any]]] = []
    for name, (model, exported) in models.items():
        inputs = model_inputs(model, full)
        contestants.append((name, "PyTorch", lambda model=model, inputs=inputs: model(**inputs)))  # type: ignore[misc]
        if exported is not None:
            contestants.append(
                (name, "ONNX Runtime", lambda exported=exported, inputs=inputs: exported(**inputs))  # type: ignore[misc]
            )
    times: list[list[float]] = [[] for _ in contestants]
    for round_ in range(runs + WARM_UP):
        for i, (_, _, call) in enumerate(contestants):
            # The last contestant's threads still wait for work at full speed: give them time to go to sleep,
            # and this one's a call to wake up.
            time.sleep(REST)
            call()
            begun = time.perf_counter()
            call()
            if round_ >= WARM_UP:
                times[i].append(1000 * (time.perf_counter() - begun))
    rows = []
    for (name, backend, _), values in zip(contestants, times, strict=True):
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        rows.append(
            {
                "model": name,
                "backend": backend,
                "batch": batch,
                "sequence": sequence,
                "p50": float(p50),
                "p95": float(p95),
                "p99": float(p99),
                "throughput": 1000 * batch / float(np.mean(values)),
            }
        )
    return rows
