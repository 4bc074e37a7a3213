"""The methods on equal terms: makes the tables of recipes/benchmarks/README.md, cell by cell.

    KDCLI_DATA_DIR=... python tests/benchmarks/tables.py --output tables --minutes 13
    KDCLI_DATA_DIR=... python tests/benchmarks/tables.py --output tables --cpu [--workers 2] [--threads 1]
    KDCLI_DATA_DIR=... python tests/benchmarks/tables.py --output tables --study kinds [--workers 1]
    KDCLI_DATA_DIR=... python tests/benchmarks/tables.py --output tables --study images --teacher FOLDER
    python tests/benchmarks/tables.py --output tables [--cpu] [--study kinds] --report

A cell is one student: a row of a table, a task and a seed. Cells run in the order of their importance, several side by
side (`--workers` processes of `--threads` threads, all on the same card), and each leaves one file in OUTPUT/cells: the
same command goes on where it was stopped. After `--minutes` no new cell starts. At the end, or with `--report` at once,
the tables are printed from whatever is finished; `--plan` prints the cells and what they cost.

Equal terms: all rows of a task have the same teacher (fine-tuned once, for the students of all seeds), the same
training rows and as many steps, and the learning rate of their recipe in recipes/methods. Within a table, students have
equal numbers of parameters: a student of whole blocks has 3, 2 or 1 of the teacher's 6, which is a half, a third or a
sixth of the block weights, and a low-rank student has the same share, so that totals differ by biases alone, by less
than 0.2 %. A quarter and an eighth of the block weights stand in the tables of the next larger size, with fewer
parameters than the rows around them: no whole blocks make these shares, and blocks without a part of their neurons
would be a poor baseline.

`--study kinds` has the tables of further kinds of tasks (questions, tags, sentence embeddings, several languages), and
`--study images` those of image classification; their rows and sizes stand in kinds.py and images.py. What follows is
about the other ones.

`makd` is as recipes/methods has it; the tables of its starts and ranks have the other values beside it.

Sizes with `--cpu`: a part of the training rows, at most 64 tokens, batches of 32. The methods that take
factorised training run on SST-2 only, the starts of `makd`'s factors on STS-B and SST-2 only.

Sizes without: whole training sets (of SST-2 20,000 sentences), at most 128 tokens, bf16, on one GPU. A step of such
small models is bound by the launches of its kernels, not by arithmetic, so batches are large and steps few: 156 to 237
a student. The estimate that `--plan` prints takes 10 ms for a step of plain fine-tuning, other methods' steps in the
ratios that were measured on a CPU, 3 seconds a cell to load, score and write, and a card that does the work of five
processes at a time. It has not been run on a GPU yet.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import AT_A_TIME, RECIPES, Cell, Outcome, Profile, Row, Size, Study
from common import encoder, need_data
from images import IMAGES
from kinds import KINDS

from kdcli.compare.report import difference_text
from kdcli.compare.statistics import Difference, paired_difference, summarise
from kdcli.files import write_json
from kdcli.markdown import table_row

METRICS = {
    "sst2": "SST-2, accuracy",
    "cola": "CoLA, MCC",
    "mrpc": "MRPC, F1",
    "rte": "RTE, accuracy",
    "stsb": "STS-B, Pearson",
}
"""The columns of the tables."""
ORDER = ("stsb", "sst2", "cola", "mrpc", "rte")
"""The order that tasks run in."""
HALF, THIRD, SIXTH = "Half of the block weights", "A third of the block weights", "A sixth of the block weights"
CHAINS = "Methods that take factorised training, half of the block weights"
STARTS = "Starts of the factors of `makd`, half of the block weights"
RANKS = "Ranks of `makd`, half of the block weights"


def _blocks(table: str, number: int, *recipes: str) -> list[Row]:
    return [Row(table, f"`{recipe}`", recipe, (f"student.layers={number}",)) for recipe in recipes]


def _low_rank(table: str, share: str, label: str = "`makd`") -> Row:
    return Row(table, label, "makd", (f"student.budget={share}",))


def _variants(recipe: str) -> list[Row]:
    return [
        Row(CHAINS, f"`{recipe}` +SVD", recipe, ('overparam.factorization="svd"',)),
        Row(CHAINS, f"`{recipe}` +OPDF, L = 1", recipe, ("overparam.length=1",)),
    ]


(KD,), (KD_THIRD,), (KD_SIXTH,) = (_blocks(table, n, "kd") for table, n in ((HALF, 3), (THIRD, 2), (SIXTH, 1)))
MAKD = _low_rank(HALF, "0.5")
OTHERS = ("tinybert", "distilbert", "minilm")
ADAPTIVE = ("theseus", "adkd", "dbkd", "lgtm")
STAGES: list[list[Row]] = [
    [MAKD, KD],
    [Row(RANKS, '`ranks = "even"`', "makd", ('student.ranks="even"',))],
    _blocks(HALF, 3, *OTHERS),
    [_low_rank(THIRD, "0.25", "`makd`, a quarter"), _low_rank(THIRD, "0.3333"), KD_THIRD],
    [_low_rank(SIXTH, "0.125", "`makd`, an eighth"), _low_rank(SIXTH, "0.1667"), KD_SIXTH],
    [
        Row(STARTS, f'`init = "{start}"`', "makd", (f'student.init="{start}"',))
        for start in ("svd", "activations", "gradients")
    ],
    [Row(CHAINS, f"`{recipe}`", recipe) for recipe in ADAPTIVE],
    _blocks(THIRD, 2, *OTHERS),
    _blocks(SIXTH, 1, *OTHERS),
    *map(_variants, ADAPTIVE),
]
"""All rows, in the order that they run in: those of a stage together, task by task and seed by seed."""
BASELINES = {HALF: KD, THIRD: KD_THIRD, SIXTH: KD_SIXTH, CHAINS: KD, RANKS: MAKD, STARTS: MAKD}
"""The tables, and the row that differences are taken from in each; it may be one of another table."""

COMMON = ('train.select="last"', "train.eval_every=100000", "teacher.seed=42", "teacher.finetune.learning_rate=1e-4")
ON_STSB = ("train.learning_rate=3e-4",)
CPU = Profile(
    {
        "sst2": Size(1_000, 32, 3, 3),
        "cola": Size(4_000, 32, 3, 6),
        "mrpc": Size(1_000, 32, 3, 6),
        "rte": Size(500, 32, 3, 6),
        "stsb": Size(2_000, 32, 3, 6, ON_STSB),
    },
    (*COMMON, "task.max_length=64", 'train.device="cpu"'),
    {STARTS: ("stsb", "sst2"), CHAINS: ("sst2",)},
)
GPU = Profile(
    {
        "sst2": Size(20_000, 256, 3, 2),
        "cola": Size(8_551, 128, 3, 4),
        "mrpc": Size(3_668, 64, 3, 4),
        "rte": Size(2_490, 64, 4, 4),
        "stsb": Size(5_749, 96, 3, 4, ON_STSB),
    },
    (*COMMON, "task.max_length=128", 'train.device="cuda"', "evaluate.batch_size=256"),
    {},
)


METHODS = Study(tuple(map(tuple, STAGES)), METRICS, ORDER, BASELINES, CPU, GPU)
STUDIES = {"methods": METHODS, "kinds": KINDS, "images": IMAGES}


def next_cell(waiting: Sequence[Cell], running: Iterable[Cell], taught: Iterable[str]) -> Cell | None:
    """Return the first cell that may start now; None when all have to wait.

    taught: tasks with a teacher in the cache. The first cell of another task makes its teacher, and no other cell
    of that task starts meanwhile.
    """
    busy = {cell.task for cell in running} - set(taught)
    return next((cell for cell in waiting if cell.task not in busy), None)


def outcomes_of(output: Path, cells: Sequence[Cell], profile: Profile) -> dict[Cell, Outcome]:
    """Return what is finished; a file that was made from other sizes counts as none."""
    found = {}
    for cell in cells:
        path = output / "cells" / f"{cell.name}.json"
        if path.is_file():
            outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
            if outcome.changes == cell.changes(profile):
                found[cell] = outcome
    return found


# What worker processes do


def begin(threads: int) -> None:
    """Set up a worker process: its threads, and one encoding of each set of rows for all its cells."""
    import torch

    import kdcli.tasks.encode as encoding
    from kdcli.models.hashing import hash_of_dataset, hash_of_tokenizer

    torch.set_num_threads(threads)
    encode = encoding.encode
    known: dict[Any, Any] = {}

    def remembered(dataset: Any, tokenizer: Any, max_length: int) -> Any:
        key = (hash_of_dataset(dataset), hash_of_tokenizer(tokenizer), max_length)
        if key not in known:
            known[key] = encode(dataset, tokenizer, max_length)
        return known[key]

    encoding.encode = remembered


def run_cell(cell: Cell, profile: Profile, output: Path, model: str) -> Outcome:
    """Train and score a student of a teacher, write its outcome, and leave nothing else of it."""
    from rich.console import Console

    from kdcli.distill.recipe import load_recipe
    from kdcli.distill.run import run_distill

    begun = time.perf_counter()
    file, changes = RECIPES / f"{cell.row.recipe}.toml", cell.changes(profile)
    placed = [change.replace("NEW", f"{model}/start") for change in changes]
    recipe = load_recipe(file, [*placed, f'name="{cell.row.recipe}"', f"teacher.model={json.dumps(model)}"])
    folder = output / "runs" / cell.name
    done = run_distill(recipe, recipe_path=file, output=folder, force=True, console=Console(stderr=True, quiet=True))
    record = done.record
    teacher, student = record.result.teacher, record.result.student
    assert teacher is not None and teacher.score is not None and student.score is not None
    outcome = Outcome(
        cell=cell.name,
        changes=changes,
        teacher=teacher.score,
        student=student.score,
        parameters=student.parameters,
        train_seconds=record.seconds.train,
        seconds=round(time.perf_counter() - begun - done.run.document["seconds"].get("teacher", 0.0), 2),
        device=str(record.versions["device"]),
        megabytes=student.megabytes,
        teacher_parameters=teacher.parameters,
        teacher_megabytes=teacher.megabytes,
    )
    write_json(output / "cells" / f"{cell.name}.json", asdict(outcome))
    shutil.rmtree(folder)
    return outcome


def run_all(
    cells: Sequence[Cell],
    profile: Profile,
    output: Path,
    *,
    workers: int,
    threads: int,
    minutes: float | None,
    model: str | None = None,
) -> None:
    """Run what is not finished, the first cells first, until all are done or no time is left.

    model: of the teacher; the real encoder where there is none.
    """
    model = model or encoder()
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    # Before the workers import torch; and teachers are kept beside the cells.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    os.environ["KDCLI_CACHE"] = str((output / "cache").resolve())
    (output / "cells").mkdir(parents=True, exist_ok=True)
    finished = outcomes_of(output, cells, profile)
    waiting = [cell for cell in cells if cell not in finished]
    taught: set[str] = set()
    running: dict[Future[Outcome], Cell] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=begin, initargs=(threads,)) as pool:
        while True:
            while len(running) < workers and time.monotonic() < deadline:
                if (cell := next_cell(waiting, running.values(), taught)) is None:
                    break
                waiting.remove(cell)
                running[pool.submit(run_cell, cell, profile, output, model)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                if (error := future.exception()) is not None:
                    print(f"{cell.name}: failed\n" + "".join(traceback.format_exception(error)), flush=True)
                    continue
                taught.add(cell.task)
                outcome = future.result()
                print(
                    f"{cell.name}: teacher {outcome.teacher:.4f} student {outcome.student:.4f} "
                    f"({outcome.train_seconds:.0f} of {outcome.seconds:.0f} s)",
                    flush=True,
                )
    print(f"{len(waiting)} of {len(cells)} cells were not started", flush=True)


# The tables


def tables(outcomes: dict[Cell, Outcome], seeds: int = 3, study: Study = METHODS) -> str:
    """Return the tables of whatever is finished, as Markdown: scores of 100, then paired differences."""
    devices = ", ".join(sorted({outcome.device for outcome in outcomes.values()}))
    head = [f"{len(outcomes)} students, on {devices or 'no device yet'}.", ""]
    return "\n".join([*head, *(line for title in study.baselines for line in _table(title, outcomes, seeds, study))])


def _table(title: str, outcomes: dict[Cell, Outcome], seeds: int, study: Study) -> Iterator[str]:
    own = [row for stage in study.stages for row in stage if row.table == title]
    rows = [row for row in own if any(cell.row == row for cell in outcomes)]
    if not rows:
        return
    baseline, metrics = study.baselines[title], study.metrics
    tasks = [task for task in metrics if any(cell.row in rows and cell.task == task for cell in outcomes)]
    others = [row for row in rows if row != baseline]
    yield from (f"### {title}", "", table_row(["", *(metrics[task] for task in tasks), "parameters", "MB", "seconds"]))
    yield table_row(["---", *["---:"] * (len(tasks) + 3)])
    taught = [outcome for cell, outcome in outcomes.items() if cell.task in tasks]
    sizes = f"{max(outcome.teacher_parameters for outcome in taught):,}", _megabytes(taught, "teacher_megabytes")
    yield table_row(["teacher", *(_teacher(outcomes, task) for task in tasks), *sizes, ""])
    for row in [baseline, *others]:
        mine = [outcome for cell, outcome in outcomes.items() if cell.row == row]
        scores = [_score(_scores(outcomes, row, task), seeds) for task in tasks]
        yield table_row([row.label, *scores, _parameters(mine), _megabytes(mine, "megabytes"), _seconds(mine)])
    yield from ("", table_row([f"less {baseline.label}", *(metrics[task].partition(",")[0] for task in tasks)]))
    yield table_row(["---", *["---:"] * len(tasks)])
    for row in others:
        pairs = (paired_difference(_scores(outcomes, row, task), _scores(outcomes, baseline, task)) for task in tasks)
        yield table_row([row.label, *map(_difference, pairs)])
    yield ""


def _scores(outcomes: dict[Cell, Outcome], row: Row, task: str) -> dict[int, float]:
    return {cell.seed: o.student for cell, o in outcomes.items() if (cell.row, cell.task) == (row, task)}


def _teacher(outcomes: dict[Cell, Outcome], task: str) -> str:
    scores = {round(100 * outcome.teacher, 2) for cell, outcome in outcomes.items() if cell.task == task}
    return " or ".join(f"{score:.2f}" for score in sorted(scores))


def _score(scores: dict[int, float], seeds: int) -> str:
    summary = summarise(scores)
    if summary is None:
        return ""
    spread = f" ± {100 * summary.std:.2f}" if summary.std is not None else ""
    return f"{100 * summary.mean:.2f}{spread}" + (f" ({summary.count})" if summary.count < seeds else "")


def _difference(difference: Difference | None) -> str:
    text = difference_text("score", difference)
    if difference is None or difference.low is None or difference.high is None:
        return text
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


def _parameters(outcomes: list[Outcome]) -> str:
    """Return the parameters; tasks of one output have fewer than those of two."""
    return f"{max(outcome.parameters for outcome in outcomes):,}" if outcomes else ""


def _megabytes(outcomes: list[Outcome], field: str) -> str:
    return f"{max(getattr(outcome, field) for outcome in outcomes):.1f}" if outcomes else ""


def _seconds(outcomes: list[Outcome]) -> str:
    summary = summarise(dict(enumerate(outcome.train_seconds for outcome in outcomes)))
    return f"{summary.mean:.0f}" if summary is not None else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default="methods", help="which set of tables")
    parser.add_argument("--output", type=Path, default=Path("bench/tables"))
    parser.add_argument("--teacher", help="folder of the teacher of images, which image_teacher.py makes")
    parser.add_argument("--cpu", action="store_true", help="sizes that finish on a CPU, and run there")
    parser.add_argument("--workers", type=int, help="processes side by side (default: 12, or 2 with --cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each of them")
    parser.add_argument("--minutes", type=float, help="start no cell after these")
    parser.add_argument("--seeds", type=int, help="how many, from 42 (default: 3 for methods, 2 for others)")
    parser.add_argument("--tasks", nargs="+", help="these tasks alone")
    parser.add_argument("--plan", action="store_true", help="print the cells and what they cost, and run nothing")
    parser.add_argument("--report", action="store_true", help="print the tables of what is finished, and run nothing")
    options = parser.parse_args()
    study = STUDIES[options.study]
    profile = study.cpu if options.cpu or study.gpu is None else study.gpu
    seeds = options.seeds or study.seeds
    cells = [cell for cell in study.cells(profile, seeds) if cell.task in (options.tasks or study.order)]
    if options.plan:
        for cell in cells:
            print(cell.name)
        if profile is not study.gpu:
            print(f"{len(cells)} cells")
            return
        seconds = sum(cell.seconds(profile) for cell in cells)
        print(f"{len(cells)} cells; {seconds:,.0f} seconds one by one on a GPU, {seconds / AT_A_TIME / 60:.1f} minutes")
        return
    if not options.report:
        need_data()
        workers = options.workers or (2 if options.cpu else 12)
        sizes = {"workers": workers, "threads": options.threads}
        run_all(cells, profile, options.output, **sizes, minutes=options.minutes, model=options.teacher)
    print(tables(outcomes_of(options.output, cells, profile), seeds, study))


if __name__ == "__main__":
    main()
