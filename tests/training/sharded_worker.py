"""One of several processes that run recipes in a row, for `test_sharding`: `sharded_worker.py RUNS.json`.

RUNS.json is a list of [recipe's path, [overrides]]. Beside each run's folder it writes how many weights of the student
the first process held in training.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from kdcli.distill.recipe import load_recipe
from kdcli.distill.run import run_distill


def main(runs: list[tuple[str, list[str]]]) -> None:
    held: list[int] = []

    def count(self: TrainerCallback, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        parts = (getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters())
        held.append(sum(part.numel() for part in parts))

    TrainerCallback.on_step_begin = count  # type: ignore[method-assign, assignment]
    for path, overrides in runs:
        held.clear()
        recipe = Path(path)
        result = run_distill(
            load_recipe(recipe, overrides),
            recipe_path=recipe,
            output=recipe.parent / "runs",
            console=Console(quiet=True),
        )
        (recipe.parent / f"{result.run.path.name}.held").write_text(str(held[-1]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
