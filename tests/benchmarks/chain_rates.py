"""Chains of tensors: the best score and the width of the plateau over learning rates, by the rule and matched.

KDCLI_DATA_DIR=... python tests/benchmarks/chain_rates.py [--tasks sst2 stsb] [--steps 150] [--seeds 3] [--until 12:45]

A grid of lengths x learning rates x ways x tasks x seeds, resumable: a cell that is finished in the output folder is
not run again, and a table is written after each. Cells come by priority: a whole seed before the next one, and in it
the middle rates of the default length first. The teacher of a task and a seed is fine-tuned once.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import encoder, need_data, run

TASKS = {"stsb": "Pearson", "sst2": "accuracy"}
WAYS = ("by-length", "matched")


@dataclass(frozen=True)
class Cell:
    """One run. length: None for a student without chains."""

    task: str
    length: int | None
    way: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        form = "plain" if self.length is None else f"{self.way}-{self.length}"
        return f"{self.task}-{form}-{self.rate:g}-{self.seed}"


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yield all cells, the most telling ones first."""
    rates = sorted(options.rates)
    middle = [*rates[1:-1], rates[-1], rates[0]]
    for seed in range(1, options.seeds + 1):
        for length in [None, *sorted(options.lengths, key=lambda length: (length != 3, -length))]:
            for rate in middle:
                for task in options.tasks:
                    for way in WAYS if length is not None else ("plain",):
                        yield Cell(task, length, way, rate, seed)


def document(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of a cell."""
    recipe: dict[str, Any] = {
        "task": {
            "name": cell.task,
            "train_samples": options.samples,
            "validation_samples": options.validation,
            "max_length": options.max_length,
        },
        "method": "kd",
        "teacher": {"model": encoder(), "finetune": {"epochs": options.teacher_epochs, "learning_rate": 1e-4}},
        "student": {"form": "depth", "layers": options.layers},
        "train": {
            "max_steps": options.steps,
            "batch_size": options.batch_size,
            "learning_rate": cell.rate,
            "select": "last",
            "log_every": 10,
        },
        "seed": cell.seed,
    }
    if cell.length is not None:
        recipe["overparam"] = {
            "length": cell.length,
            "learning_rate": cell.way,
            "targets": options.targets,
            "aux_weight": options.aux_weight,
            "svd_dtype": "float32",
        }
    return recipe


def table(done: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the cells that are done as Markdown tables: a task each, a row for a length and a way."""
    lines = [
        f"Students of {options.layers} blocks of the 6-block, 384-wide encoder, `kd`, {options.steps} steps of "
        f"{options.batch_size} of {options.samples:,} rows, {options.validation} validation rows; chains for "
        f"{' and '.join(options.targets)}, aux_weight {options.aux_weight:g}; 100 x score; mean over the seeds done. "
        "Plateau: the rates within 1 point of the row's best."
    ]
    for task in options.tasks:
        metric = TASKS[task]
        rates = sorted(options.rates)
        lines += ["", f"{task}, {metric}:", ""]
        lines.append("| L | rate of the chains | " + " | ".join(f"{r:g}" for r in rates) + " | best | plateau |")
        lines.append("| --- " * (len(rates) + 4) + "|")
        for length in [None, *sorted(options.lengths)]:
            for way in WAYS if length is not None else ("plain",):
                row: list[float | None] = []
                for rate in rates:
                    wanted = {"task": task, "length": length, "way": way, "rate": rate}
                    scores = [one["score"] for one in done if wanted.items() <= one.items()]
                    row.append(100 * statistics.mean(scores) if scores else None)
                found = [score for score in row if score is not None]
                if not found:
                    continue
                shown = " | ".join("" if score is None else f"{score:.1f}" for score in row)
                plateau = sum(score >= max(found) - 1.0 for score in found)
                whole = "" if len(found) == len(rates) else f" (of {len(found)} done)"
                name = "no chains" if length is None else str(length)
                lines.append(f"| {name} | {way} | {shown} | {max(found):.1f} | {plateau}{whole} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--validation", type=int, default=800)
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--teacher-epochs", type=float, default=3.0)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["attention", "ffn"], choices=["attention", "ffn"])
    parser.add_argument("--aux-weight", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 1, 3, 8])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--until", help="start no cell after this time of day in UTC, as 12:45")
    parser.add_argument("--output", type=Path, default=Path("bench"))
    options = parser.parse_args()
    need_data()
    options.output.mkdir(parents=True, exist_ok=True)
    done = []
    for cell in cells(options):
        if options.until is not None and f"{datetime.now(UTC):%H:%M}" >= options.until:
            break
        record = run(cell.name, document(cell, options), options.output).to_json()
        score, seconds = record["student"]["score"], record["seconds"]
        done.append({**asdict(cell), "score": score, "teacher": record["teacher"]["score"], "seconds": seconds})
        (options.output / "chain_rates.json").write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
        (options.output / "chain_rates.md").write_text(table(done, options), encoding="utf-8")
    print(table(done, options))


if __name__ == "__main__":
    main()
