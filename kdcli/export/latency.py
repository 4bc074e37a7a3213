"""How long one forward pass takes: PyTorch eager and ONNX Runtime, in turn, on the same inputs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcli.export.session import OnnxModel
from kdcli.models.inputs import model_inputs
from kdcli.words import counted

WARM_UP = 5

REST = 0.005
"""Seconds between two contestants."""

RUNS = 30
"""Timed calls of each contestant in a cell of the grid, where time allows."""

LIMIT = 60.0
"""Seconds for a whole grid, where the number of runs is not given."""

WIDE = 1.5
"""How much longer than the fastest call three quarters of the calls may take."""

FEW = 5
"""Fewer calls than these show no spread."""


def is_steady(times: Sequence[float]) -> bool:
    """True when repeated times of one thing are close enough to say how long it takes.

    That is when three quarters of them are within 1.5 times the fastest, and there are 5 at least. Other programs and
    the scheduler only ever add to a time: the fastest call is the one that they disturbed least, and a median far
    above it measures them. The upper quartile, unlike p95, lets a few hiccups pass.
    """
    return len(times) >= FEW and float(np.percentile(times, 75)) <= WIDE * min(times)


@dataclass
class LatencyReport:
    """rows: model, backend, batch, sequence, runs, fastest, p50, p75, p95, p99 (milliseconds), throughput (examples a
    second), steady: whether the times are close enough together to rely on (`is_steady`)."""

    rows: list[dict[str, Any]]
    threads: int

    def to_json(self) -> dict[str, Any]:
        runs = max((row["runs"] for row in self.rows), default=0)
        return {"threads": self.threads, "runs": runs, "rows": self.rows}

    def doubt(self) -> str | None:
        """Return which times not to rely on, and what to do; None when all are steady."""
        unsteady = [row for row in self.rows if not row["steady"]]
        if not unsteady:
            return None
        row = max(unsteady, key=lambda row: row["p75"] / row["fastest"])
        worst = f"{row['model']} {row['batch']} x {row['sequence']} in {row['backend']}"
        if row["runs"] < FEW:
            seen = f"{worst} had {counted(row['runs'], 'run')}"
        else:
            seen = f"{worst} took from {row['fastest']:.2f} to {row['p99']:.2f} ms"
        return (
            f"{len(unsteady)} of {len(self.rows)} latencies are unsteady, marked *: {seen}. Measure again with more "
            "--runs, on a machine that does nothing else, or with fewer --threads"
        )

    def of(self, model: str, backend: str, batch: int, sequence: int) -> dict[str, Any]:
        """Return one row."""
        return next(
            row
            for row in self.rows
            if (row["model"], row["backend"], row["batch"], row["sequence"]) == (model, backend, batch, sequence)
        )


@torch.inference_mode()
def measure(
    models: Mapping[str, tuple[Any, OnnxModel | None]],
    *,
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int],
    threads: int,
    runs: int | None = None,
    vocab_size: int = 1000,
    limit: float = LIMIT,
) -> LatencyReport:
    """Time every model over a grid of batch sizes and sequence lengths.

    models: name -> (PyTorch model, its ONNX session or None). All contestants of a grid cell run once a round,
    in turn, so that a drift of the machine's speed meets all of them; the first rounds are not counted, and in every
    round each rests and runs once uncounted before it is timed.
    runs: timed calls of each; None takes 30, or as many as the first calls show to fit into `limit` seconds for the
    whole grid, and one at least.
    PyTorch's thread count is set for the time and restored. Sessions keep the count they were opened with.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    cells = [(batch, sequence) for batch in batch_sizes for sequence in sequence_lengths]
    end = time.perf_counter() + limit
    try:
        for number, (batch, sequence) in enumerate(cells):
            # What a cell leaves over is for those after it.
            share = None if runs is not None else (end - time.perf_counter()) / (len(cells) - number)
            rows += _cell(models, batch, sequence, runs or RUNS, share, vocab_size)
    finally:
        torch.set_num_threads(before)
    return LatencyReport(rows, threads)


def _cell(
    models: Mapping[str, tuple[Any, OnnxModel | None]],
    batch: int,
    sequence: int,
    runs: int,
    seconds: float | None,
    vocab_size: int,
) -> list[dict[str, Any]]:
    """Return the rows of one cell. seconds: for all of it; None for as long as `runs` calls take."""
    begun = time.perf_counter()
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

    def one_round() -> list[float]:
        """Time every contestant once, in milliseconds."""
        found = []
        for _, _, call in contestants:
            # The last contestant's threads still wait for work at full speed: give them time to go to sleep,
            # and this one's a call to wake up.
            time.sleep(REST)
            call()
            started = time.perf_counter()
            call()
            found.append(1000 * (time.perf_counter() - started))
        return found

    first = one_round()
    warm_up = WARM_UP - 1
    if seconds is not None:
        # A round is two calls of each.
        cost = sum(2 * milliseconds / 1000 + REST for milliseconds in first)
        affordable = int(max(0.0, begun + seconds - time.perf_counter()) / cost)
        warm_up = min(warm_up, affordable // 4)
        runs = max(1, min(runs, affordable - warm_up))
    for _ in range(warm_up):
        one_round()
    rounds: list[list[float]] = []
    # The machine may have become slower since the first round.
    while len(rounds) < runs and not (rounds and seconds is not None and time.perf_counter() > begun + seconds):
        rounds.append(one_round())
    times = list(zip(*rounds, strict=True))
    rows = []
    for (name, backend, _), values in zip(contestants, times, strict=True):
        p50, p75, p95, p99 = np.percentile(values, [50, 75, 95, 99])
        rows.append(
            {
                "model": name,
                "backend": backend,
                "batch": batch,
                "sequence": sequence,
                "runs": len(values),
                "steady": is_steady(values),
                "fastest": min(values),
                "p50": float(p50),
                "p75": float(p75),
                "p95": float(p95),
                "p99": float(p99),
                "throughput": 1000 * batch / float(np.mean(values)),
            }
        )
    return rows
