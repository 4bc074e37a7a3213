"""A recipe of a tiny run on `reviews`, which a test changes where it needs to, and the run itself."""

from pathlib import Path
from typing import Any

from rich.console import Console

from kdcli.distill.recipe import load_recipe
from kdcli.distill.run import run_distill
from kdcli.runs import to_toml

TINY: dict[str, Any] = {
    "method": {"name": "kd"},
    "task": {"name": "reviews", "train_samples": 48, "validation_samples": 24},
    "teacher": {
        "scratch": {"layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "vocab_size": 300},
        "finetune": {"max_steps": 2, "learning_rate": 1e-3},
    },
    "student": {"form": "depth", "layers": 1},
    "train": {"max_steps": 2, "learning_rate": 1e-3, "precision": "fp32", "device": "cpu"},
}
FOLDER = {"model": "teacher", "finetune": False}
"""A teacher that a test puts beside its recipe."""


def changed(document: dict[str, Any], *without: str, **changes: Any) -> dict[str, Any]:
    """Return a recipe without some of its tables, and with others changed.

    A dictionary is merged into its table, where None removes a field; anything else takes the table's place.
    """
    result = {key: value for key, value in document.items() if key not in without}
    for key, value in changes.items():
        if isinstance(value, dict):
            table = result.get(key)
            merged = {**(table if isinstance(table, dict) else {}), **value}
            value = {name: entry for name, entry in merged.items() if entry is not None}
        result[key] = value
    return result


def tiny_recipe(*without: str, **changes: Any) -> dict[str, Any]:
    """Return TINY, changed."""
    return changed(TINY, *without, **changes)


def write_recipe(path: Path, document: dict[str, Any]) -> Path:
    """Write a recipe as TOML, and return its path."""
    path.write_text(to_toml(document), encoding="utf-8")
    return path


def run_recipe(path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Run a recipe in this process, quietly, into `runs` beside it, and return the run's document."""
    loaded = load_recipe(path, list(overrides))
    options = {"output": path.parent / "runs", "console": Console(quiet=True), **options}
    return run_distill(loaded, recipe_path=path, **options).to_json()
