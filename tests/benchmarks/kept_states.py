"""Seconds of a training step of MaKD with kept states (`teacher.cache = "all"`), as a ratio to a step of kd.

    python tests/benchmarks/kept_states.py [--batch 32] [--sequence 64] [--rounds 8] [--max-ratio 1.3]

Both train a low-rank student of half of the block weights; kd has the teacher's logits. All steps alternate in one
process, in fp32 on a CPU; reading the states, of other rows each time, is part of a step. Processor seconds stand
beside those of the clock: on a machine that does other work, too, they say more. The first pass, which keeps the
states, is not a step. Ends with 1 when the ratio of processor seconds with states in fp32 is above --max-ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from method_time import Step, World
from rich.console import Console

from kdcli.recipe.schema import StudentSection
from kdcli.signals import Request
from kdcli.training.teacher_states import KeptStates, StatesCollator, keep_states, layout_of


def reading(world: World, step: Step, kept: KeptStates) -> Step:
    """Return a step that takes other rows each time, as a loader does."""
    rows, collator = list(kept.placed(world.encoded.train)), StatesCollator(world.encoded.collator, kept)
    size = len(rows) // 4

    def go(number: int) -> None:
        first = number % 4 * size
        world.batch = collator(rows[first : first + size])
        step(number)

    return go


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--max-ratio", type=float, default=1.3)
    options = parser.parse_args()
    world = World("classification", options.batch, options.sequence, bf16=False, device=torch.device("cpu"))
    section = StudentSection(form="low-rank", budget=0.5)
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Step] = {name: world.method(name, section)[name][0] for name in ("kd", "makd")}
        for dtype in ("fp32", "bf16"):
            kept: list[KeptStates] = []
            [[step]] = world.method("makd", section, keeping(world, Path(folder) / dtype, dtype, kept)).values()
            steps[f"makd, kept in {dtype}"] = reading(world, step, kept[0])
        world.place()
        clock: dict[str, list[float]] = {name: [] for name in steps}
        processor: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(options.rounds + 2):
            # Forwards and backwards in turn: none always follows the same one.
            for name in list(steps) if number % 2 else reversed(steps):
                begun, used = time.perf_counter(), time.process_time()
                steps[name](number)
                clock[name].append(time.perf_counter() - begun)
                processor[name].append(time.process_time() - used)
    ratios = {}
    print(f"{options.batch} x {options.sequence} tokens")
    print("| step | ms | ratio | processor ms | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in steps:
        cells = []
        for seconds in (clock, processor):
            ratios[name] = statistics.median(a / b for a, b in zip(seconds[name][2:], seconds["kd"][2:], strict=True))
            cells += [f"{1000 * statistics.median(seconds[name][2:]):.0f}", f"{ratios[name]:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    if (ratio := ratios["makd, kept in fp32"]) > options.max_ratio:
        sys.exit(f"makd with kept states: its ratio to kd is {ratio:.3f}, above {options.max_ratio}")


def keeping(world: World, folder: Path, dtype: str, kept: list[KeptStates]) -> Callable[[Request], KeptStates]:
    """Return what keeps the states that a stage asks for, and adds them to `kept`."""

    def keep(request: Request) -> KeptStates:
        kept.append(
            keep_states(
                world.teacher,
                world.encoded.train,
                world.encoded.collator,
                kind=world.task.kind,
                request=request,
                layout=layout_of(world.teacher, request, dtype),  # type: ignore[arg-type]
                folder=folder,
                batch_size=64,
                device="cpu",
                console=Console(quiet=True),
            )
        )
        return kept[-1]

    return keep


if __name__ == "__main__":
    main()
