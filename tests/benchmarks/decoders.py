"""Decoders on equal terms: the table of recipes/benchmarks/README.md with a real 135M teacher, row by row.

    KDCLI_DATA_DIR=... python tests/benchmarks/decoders.py --teacher FOLDER --output decoders [--workers 11]
    python tests/benchmarks/decoders.py --output decoders --report

FOLDER holds a causal language model (SmolLM2-135M-Instruct). It is fine-tuned on the training rows first, once, and is
the teacher of all rows: students of half of its blocks, and low-rank students of as many block weights. Each row is a
process of its own, which trains a student, scores it on held-out rows and on two other sets of instructions, and leaves
one file in OUTPUT/rows; rows that are there are not made again. Terms are equal: the same teacher, rows, steps and
batch, the learning rates of recipes/methods, and each row's last checkpoint. On-policy rows (`gkd`), whose steps take
several times as long, have `--on-policy-steps`; `seqkd` has as many rows as the teacher has time to write to. The peak
of the memory of a process is told beside the sum of its parts: weights of teacher and student, gradients, two moments.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import kdcli
from kdcli.files import write_json
from kdcli.markdown import table_row

OPDF = {"length": 1}


@dataclass(frozen=True)
class Row:
    """A student: a method with its options, its form, and whether it is trained as chains."""

    name: str
    label: str
    method: dict[str, Any]
    form: str = "depth"
    chains: bool = False
    rate: float = 3e-4


def _rows() -> Iterator[Row]:
    methods: tuple[tuple[str, str, dict[str, Any], str], ...] = (
        ("sft", "no teacher (`kd`, alpha = 0)", {"name": "kd", "alpha": 0.0}, "depth"),
        ("kd", "`kd`", {"name": "kd"}, "depth"),
        ("makd", "`makd`", {"name": "makd"}, "low-rank"),
        ("seqkd", "`seqkd`", {"name": "seqkd"}, "depth"),
        ("gkd", "`gkd`", {"name": "gkd"}, "depth"),
        ("hs", "`hs`", {"name": "hs"}, "depth"),
    )
    for name, label, method, form in methods:
        rate = 1e-4 if form == "low-rank" else 3e-4
        yield Row(name, label, method, form, rate=rate)
        if name != "sft":
            yield Row(f"{name}-opdf", f"{label} +OPDF, L = 1", method, form, chains=True, rate=rate)


ROWS = {row.name: row for row in _rows()}
SETS = {"held-out": "{data}", "selfinst": "selfinst", "vicuna80": "vicuna80"}
TEACHER = "teacher"


def task_of(options: argparse.Namespace, name: str, train: str, validation: str, **more: Any) -> dict[str, Any]:
    """Return the table `[task]` of a set of instructions."""
    folder = Path(os.environ["KDCLI_DATA_DIR"]) / "instruct"
    files = {
        "train": str(folder / train / "train.parquet"),
        "validation": str(folder / validation / "validation.parquet"),
    }
    lengths = {"max_length": options.max_length, "max_prompt_length": options.max_length // 2}
    return {"name": name, "type": "instruct", **files, **lengths, **more}


def recipe_of(row: Row | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row's recipe; None for the one whose run leaves nothing but the teacher."""
    method = dict(row.method) if row is not None else {"name": "kd"}
    steps = options.steps if row is not None else 1
    if method["name"] in ("gkd", "seqkd"):
        method["max_new_tokens"] = options.new_tokens
    if method["name"] == "gkd":
        steps = options.on_policy_steps
    low_rank = row is not None and row.form == "low-rank"
    document: dict[str, Any] = {
        "name": row.name if row is not None else TEACHER,
        # Generated texts are scored afterwards, on all sets alike.
        "task": task_of(
            options, options.data, options.data, options.data, validation_samples=options.held, metrics=["perplexity"]
        ),
        "method": method,
        "teacher": {"model": str(options.teacher), "seed": 42},
        "student": {"form": "low-rank", "budget": 0.5} if low_rank else {"layers": options.layers},
        "train": {
            "max_steps": steps,
            "batch_size": options.batch_size,
            "learning_rate": row.rate if row is not None else 3e-4,
            "scheduler": "cosine",
            "select": "last",
            "eval_every": 1_000_000,
            "device": options.device,
        },
        "evaluate": {"batch_size": options.eval_batch},
        "seed": options.seed,
    }
    if options.teacher_epochs:
        rates = {"learning_rate": options.teacher_rate, "batch_size": 32}
        document["teacher"]["finetune"] = {"epochs": options.teacher_epochs, **rates}
    else:
        document["teacher"]["finetune"] = False
    rows = options.written if method["name"] == "seqkd" else None
    if rows := rows or options.rows_of_set:
        document["task"]["train_samples"] = rows
    if row is not None and row.chains:
        document["overparam"] = OPDF
    return document


def train(row: Row | None, options: argparse.Namespace) -> tuple[Any, float]:
    """Run a recipe, and return its run and the seconds it took."""
    begun = time.perf_counter()
    console = Console(stderr=True, quiet=not options.verbose)
    done = kdcli.distill(recipe_of(row, options), output=options.output / "runs", force=True, console=console)
    return done, time.perf_counter() - begun


def peak_bytes(device: str) -> int:
    """Return the most memory that this process has taken, of the GPU where there is one."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def scores(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return ROUGE-L of greedy text and the perplexity of the responses on every set."""
    from kdcli.distill.recipe import SCHEMAS
    from kdcli.evaluation.score import evaluate_model
    from kdcli.recipe.load import recipe_of as read
    from kdcli.tasks.load import load_task

    found = {}
    for name, pattern in SETS.items():
        folder = pattern.format(data=options.data)
        table = task_of(options, name, options.data, folder, validation_samples=options.scored)
        table |= {"metrics": ["rouge_l", "exact_match", "perplexity"], "max_new_tokens": options.new_tokens}
        recipe = read({"task": table, "method": "kd", "teacher": {"model": str(options.teacher)}}, SCHEMAS)
        task = load_task(recipe.task, recipe.evaluate, base=Path())
        sizes = {"batch_size": options.eval_batch, "max_length": options.max_length}
        [found[name]] = evaluate_model(model, tokenizer, task, device=options.device, **sizes).values()
    return found


def make(name: str, options: argparse.Namespace) -> None:
    """Make one row, and write its file."""
    import torch

    from kdcli.models.load import load_tokenizer

    done, seconds = train(None if name == TEACHER else ROWS[name], options)
    record, peak = done.record, peak_bytes(options.device)
    folder = Path(record.teacher_path or options.teacher) if name == TEACHER else done.run.student
    begun = time.perf_counter()
    model = kdcli.load_model(folder)
    found = scores(model, load_tokenizer(folder), options)
    teacher = record.result.teacher
    side = teacher if name == TEACHER else record.result.student
    assert teacher is not None and side is not None
    trained = record.result.student.parameters
    # Weights, gradients and two moments in fp32, beside the teacher's weights.
    parts = 4 * teacher.parameters + 16 * trained
    write_json(
        options.output / "rows" / f"{name}.json",
        {
            "name": name,
            "scores": found,
            "parameters": side.parameters,
            "steps": recipe_of(ROWS.get(name), options)["train"]["max_steps"],
            "train_seconds": record.seconds.train,
            "run_seconds": seconds,
            "score_seconds": time.perf_counter() - begun,
            "peak_bytes": peak,
            "bytes_of_parts": parts,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    )


def run_all(names: list[str], options: argparse.Namespace) -> None:
    """Make the teacher, then all rows that are not there, several at a time."""
    waiting = [name for name in names if not (options.output / "rows" / f"{name}.json").exists()]
    (options.output / "rows").mkdir(parents=True, exist_ok=True)
    (options.output / "logs").mkdir(exist_ok=True)

    def one(name: str) -> None:
        begun = time.monotonic()
        log = options.output / "logs" / f"{name}.txt"
        with log.open("w") as out:
            code = subprocess.call([sys.executable, __file__, *sys.argv[1:], "--row", name], stdout=out, stderr=out)
        print(f"{name}: exit code {code} after {time.monotonic() - begun:.0f} s", flush=True)

    os.environ |= {"KDCLI_CACHE": str((options.output / "cache").resolve()), "TOKENIZERS_PARALLELISM": "false"}
    if TEACHER in waiting:
        # The other rows find it in the cache; its scores are made beside them.
        waiting.remove(TEACHER)
        train(None, options)
        waiting.insert(0, TEACHER)
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, waiting))


def report(options: argparse.Namespace) -> str:
    """Return the table of what is finished, as Markdown."""
    files = [options.output / "rows" / f"{name}.json" for name in (TEACHER, *ROWS)]
    found = [json.loads(path.read_text()) for path in files if path.exists()]
    head = [
        "",
        *(f"{name}, ROUGE-L" for name in SETS),
        "perplexity",
        "parameters",
        "steps",
        "ms a step",
        "peak MB",
        "parts MB",
    ]
    lines = [f"On {', '.join(sorted({row['device'] for row in found}))}.", "", table_row(head)]
    lines.append(table_row(["---", *["---:"] * (len(head) - 1)]))
    for row in found:
        label = ROWS[row["name"]].label if row["name"] in ROWS else "teacher"
        steps = row["steps"] if row["name"] in ROWS else 0
        lines.append(
            table_row(
                [
                    label,
                    *(f"{100 * row['scores'][name]['rouge_l']:.2f}" for name in SETS),
                    f"{row['scores']['held-out']['perplexity']:.2f}",
                    f"{row['parameters']:,}",
                    f"{steps:,}" if steps else "",
                    f"{1000 * row['train_seconds'] / steps:.0f}" if steps else "",
                    f"{row['peak_bytes'] / 1e6:,.0f}" if steps else "",
                    f"{row['bytes_of_parts'] / 1e6:,.0f}" if steps else "",
                ]
            )
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/decoders"))
    parser.add_argument("--teacher", type=Path, help="folder of the causal language model to begin with")
    parser.add_argument("--teacher-epochs", type=float, default=1.0, help="of its fine-tuning; 0 takes it as it is")
    parser.add_argument("--teacher-rate", type=float, default=5e-5)
    parser.add_argument("--data", default="alpaca9k", help="the folder of instruct/ that is trained on")
    parser.add_argument("--rows-of-set", type=int, help="use this many of its rows")
    parser.add_argument("--written", type=int, help="rows of `seqkd`, to which the teacher writes a response each")
    parser.add_argument("--layers", type=int, default=15, help="blocks of students of fewer blocks")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--on-policy-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--scored", type=int, help="score this many rows of each set")
    parser.add_argument("--held", type=int, default=64, help="held-out rows whose loss is followed while training")
    parser.add_argument("--eval-batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[TEACHER, *ROWS], help="these rows alone")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--report", action="store_true", help="print the table of what is finished, and run nothing")
    options = parser.parse_args()
    if options.row is not None:
        make(options.row, options)
        return
    if not options.report:
        run_all(options.only or [TEACHER, *ROWS], options)
    print(report(options))


if __name__ == "__main__":
    main()
