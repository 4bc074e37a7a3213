"""From recipes and a number of seeds to the cells of a comparison, and the check that its terms are equal."""

import contextlib
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kdcli.compare.variants import Variant, name_of, parse_variants
from kdcli.distill.plan import Plan, make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.distill.teacher import seed_of
from kdcli.errors import InputError, UnfitTaskError, cut
from kdcli.files import source_of
from kdcli.names import checked, folder_of
from kdcli.recipe.load import with_place
from kdcli.recipe.schema import ExportSection, Recipe
from kdcli.runs import Run
from kdcli.tasks.registry import fields_of, kind_of
from kdcli.words import counted

SIZE_TOLERANCE = 0.02
"""How far apart the students' parameter counts may be, as a share of the smallest: ranks are whole numbers."""

PARAMETERS = "student.parameters"
STEPS = "training steps"

NAME = "comparison"
SUFFIXES = ("json", "csv", "md", "png", "svg")
"""The files of a report: comparison.json is written first, and tells that the others are a comparison's, too."""


@dataclass(frozen=True)
class Entry:
    """One recipe on one task: a row of the table.

    label: what the row is called, the same for the same method on every task. variant: the changes of a --variant,
    on top of the overrides; plain: the label of the same recipe without them, None where there are none. terms: what
    must be equal between the rows of a task. stages: how many parts the steps are cut into.
    """

    label: str
    plain: str | None
    variant: Variant
    file: Path
    recipe: Recipe
    overrides: list[str]
    task: str
    method: str
    form: str
    fingerprint: str
    stages: int
    terms: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: an entry with one seed."""

    entry: Entry
    seed: int

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.entry.task}-{self.entry.label}-seed{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """The recipe that is run."""
        return _compared(self.entry.recipe, self.name, self.seed)


def _compared(recipe: Recipe, name: str, seed: int) -> Recipe:
    """Return a recipe as a comparison runs it: with this name and seed, and the teacher that all seeds share.

    Nothing is exported, and no gate is set: a comparison has its own report.
    """
    return recipe.model_copy(
        update={
            "name": name,
            "output": None,
            "seed": seed,
            "teacher": recipe.teacher.model_copy(update={"seed": seed_of(recipe)}),
            "evaluate": recipe.evaluate.model_copy(update={"fail_under": None, "fail_under_retention": None}),
            "export": ExportSection(),
        }
    )


@dataclass(frozen=True)
class Inequality:
    """A term that is not the same for all recipes of a task: {label: value}."""

    task: str
    field: str
    values: dict[str, Any]

    def __str__(self) -> str:
        """Return one line; recipes that agree stand together."""
        together: dict[str, list[str]] = {}
        for label, value in self.values.items():
            together.setdefault(_said(value), []).append(label)
        parts = [f"{value} ({', '.join(labels)})" for value, labels in together.items()]
        return f"{self.task}: {self.field} is {' but '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task, "field": self.field, "values": self.values}


def _said(value: Any) -> str:
    if value is None:
        return "not set"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@dataclass
class ComparisonPlan:
    """What is compared: entries in the order given, the same seeds for each, and what is not equal between them.

    left_out: a line for each recipe whose method does not work on one of the tasks that were asked for.
    """

    entries: list[Entry]
    seeds: list[int]
    unequal: list[Inequality]
    baselines: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of their first recipe."""
        return list(dict.fromkeys(entry.task for entry in self.entries))

    @property
    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that an interrupted comparison has whole seeds."""
        return [Cell(entry, seed) for task in self.tasks for seed in self.seeds for entry in self.of(task)]

    def of(self, task: str) -> list[Entry]:
        """Return the entries of a task."""
        return [entry for entry in self.entries if entry.task == task]

    def to_json(self, root: Path) -> dict[str, Any]:
        """Return what would be run under `root`, for a dry run."""
        return {
            "seeds": self.seeds,
            "baselines": self.baselines,
            "unequal": [difference.to_json() for difference in self.unequal],
            "notes": self.left_out,
            "cells": [
                {
                    "run": cell.name,
                    "task": cell.entry.task,
                    "name": cell.entry.label,
                    "seed": cell.seed,
                    "recipe": str(cell.entry.file),
                    "variant_of": cell.entry.plain,
                    "method": cell.entry.method,
                    "overparam": cell.entry.recipe.overparam is not None,
                    "form": cell.entry.form,
                    "parameters": cell.entry.terms[PARAMETERS],
                    "steps": cell.entry.terms[STEPS],
                    "done": is_done(cell, Run(root / cell.name)),
                }
                for cell in self.cells
            ],
        }


def said_seeds(seeds: list[int]) -> str:
    """Return `2 seeds (42, 43)`."""
    return f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"


def plan_comparison(
    files: list[Path],
    *,
    seeds: int,
    console: Console,
    overrides: list[str] | None = None,
    variants: list[str] | None = None,
    tasks: list[str] | None = None,
    baseline: str | None = None,
    allow_unequal: bool = False,
) -> ComparisonPlan:
    """Read the recipes, plan each, and check that they are on equal terms.

    The seeds are that of the first recipe and those after it. variants: each recipe runs as it is, and once with the
    changes of each of these, "FIELD=VALUE[,FIELD=VALUE...]". tasks: run every recipe on each of these instead of
    its own. baseline: a row's label; by default the row of method `kd`, or else the first.
    Raises InputError for a recipe that is wrong, rows of the same name, a variant that changes nothing, a baseline
    that is not there, and unequal terms unless they are allowed.
    """
    entries: list[Entry] = []
    left_out = []
    changes: list[Variant] = [(), *parse_variants(variants or [])]
    with console.status("planning") as status:
        for chosen in [[task] for task in tasks] if tasks else [[]]:
            for file, variant in itertools.product(files, changes):
                status.update(Text(" on ".join(["planning " + str(file) + name_of(variant), *chosen])))
                try:
                    entries.append(_entry(file, overrides or [], variant, *chosen))
                except UnfitTaskError as error:
                    if not chosen:
                        raise
                    left_out.append(f"{file.stem}{name_of(variant)} is left out on {chosen[0]}: {error.message}")
            if chosen and not any(entry.task == chosen[0] for entry in entries):
                raise InputError(f"none of the recipes' methods works on {chosen[0]}", where="--task")
    first: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = first.setdefault((entry.task, entry.label), entry)
        if other is not entry:
            raise InputError(
                f"{other.file} and {entry.file} are both called {entry.label!r} on task {entry.task}",
                where="name",
                hint='give one of them another name = "..."',
            )
    start = entries[0].recipe.seed
    plan = ComparisonPlan(entries, list(range(start, start + seeds)), [], left_out=left_out)
    for cell in plan.cells:
        checked(cell.name)
    for task in plan.tasks:
        plan.baselines[task] = _baseline(task, plan.of(task), baseline)
        plan.unequal += unequal_terms(task, plan.of(task))
    if plan.unequal and not allow_unequal:
        lines = [str(difference) for difference in plan.unequal]
        raise InputError(
            "\n  ".join(["the recipes are not on equal terms:", *lines]),
            hint="make these fields equal (--set changes them in all recipes), or compare all the same with "
            "--allow-unequal, which says so in the report",
        )
    return plan


def _entry(file: Path, overrides: list[str], variant: Variant, chosen: str | None = None) -> Entry:
    overrides = [*overrides, f"task={chosen}"] if chosen is not None else overrides
    plain = recipe = load_recipe(file, overrides)
    if variant:
        recipe = load_recipe(file, overrides, variant=variant)
        _check_variant(file, variant, plain, recipe)
    kind = kind_of(recipe.task)
    if chosen is not None and (recipe.task.is_own or kind.general):
        raise InputError(f"{file} brings data of its own, which has no place on task {chosen}", where="--task")
    if kind.scored_by_loss and not recipe.finetune:
        raise InputError(
            f'the student of a task of type = "{kind.name}" has no score of its own to compare',
            where=f"{file}: {'finetune' if kind.general else 'task'}",
            hint="add [[finetune]] tables with the tasks to score it on" if kind.general else None,
        )
    try:
        prepared = prepare(recipe, file)
        if prepared.task.scored_by_loss and not recipe.finetune:
            raise InputError(
                f"{recipe.task.name} has no score to compare", where="task", hint=prepared.task.kind.unscored
            )
        planned = make_plan(prepared)
    except InputError as error:
        raise with_place(error, file, overrides, variant=variant) from error
    task = recipe.task.name
    label = label_of(plain.name or file.stem, task)
    return Entry(
        label=label + name_of(variant),
        plain=label if variant else None,
        variant=variant,
        file=file,
        recipe=recipe,
        overrides=overrides,
        task=task,
        method=recipe.method.name,
        form=planned.student.form,
        fingerprint=planned.task.fingerprint,
        stages=len(planned.every_stage),
        terms=_terms(recipe, file, planned),
    )


def _check_variant(file: Path, variant: Variant, plain: Recipe, changed: Recipe) -> None:
    """Raise InputError when a variant changes the recipe's task, or nothing that a comparison runs with."""
    where = f"--variant {cut(','.join(variant))}"
    if changed.task.name != plain.task.name:
        raise InputError(
            f"takes {file} from task {plain.task.name} to {changed.task.name}, where no plain recipe stands beside it",
            where=where,
            hint="--task runs all recipes on another task",
        )
    if _compared(changed, "", 0) == _compared(plain, "", 0):
        raise InputError(
            f"changes nothing in {file} that a comparison runs with",
            where=where,
            hint="leave it out, or give another value; names, seeds, exports and gates are the comparison's own",
        )


def label_of(name: str, task: str) -> str:
    """Return a recipe's name without the task's before or after it: `rte-kd` and `cola-kd` are both `kd`."""
    return name.removeprefix(f"{task}-").removesuffix(f"-{task}") or name


def _terms(recipe: Recipe, file: Path, planned: Plan) -> dict[str, Any]:
    teacher = recipe.teacher.model_dump(exclude={"cache", "cache_dtype"})
    if teacher["model"] is not None:
        teacher["model"] = source_of(teacher["model"], file.resolve().parent)
    teacher["seed"] = seed_of(recipe)
    kind = kind_of(recipe.task)
    return {
        "task (fingerprint of its data)": planned.task.fingerprint,
        **_flat("task", recipe.task.model_dump(include={"max_length", "metrics"})),
        **_flat("task", kind.drawn(fields_of(kind, recipe.task))),
        **_flat("teacher", teacher),
        "task.mixing_temperature": recipe.task.mixing_temperature or 1.0,
        "task.augment": recipe.task.augment.model_dump() if recipe.task.augment is not None else None,
        "evaluate.protocol": recipe.evaluate.protocol,
        "finetune": [section.model_dump() for section in recipe.finetune] or None,
        "train.batch_size": recipe.train.batch_size,
        STEPS: sum(stage.steps for stage in planned.every_stage),
        "train.precision": planned.train.precision,
        **_flat("train", recipe.train.model_dump(include={"select", "eval_every", "patience", "group_by_length"})),
        PARAMETERS: planned.student.parameters,
    }


def _flat(prefix: str, table: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(f"{prefix}.{key}", value) if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return flat


def unequal_terms(task: str, entries: list[Entry]) -> list[Inequality]:
    """Return the terms that differ between the recipes of one task.

    Steps may differ by the rounding of stages, and students' sizes by SIZE_TOLERANCE.
    """
    found = []
    for name in dict.fromkeys(key for entry in entries for key in entry.terms):
        values: dict[str, Any] = {entry.label: entry.terms.get(name) for entry in entries}
        if name == STEPS:
            alike = max(values.values()) - min(values.values()) < max(entry.stages for entry in entries)
        elif name == PARAMETERS:
            alike = max(values.values()) <= (1 + SIZE_TOLERANCE) * min(values.values())
        else:
            first = entries[0].terms.get(name)
            alike = all(value == first for value in values.values())
        if not alike:
            found.append(Inequality(task, name, values))
    return found


def _baseline(task: str, entries: list[Entry], wanted: str | None) -> str:
    labels = [entry.label for entry in entries]
    if wanted is not None:
        label = label_of(wanted, task)
        if label not in labels:
            raise InputError(
                f"no recipe called {wanted!r} on task {task}; there are {', '.join(labels)}", where="--baseline"
            )
        return label
    plain = [entry.label for entry in entries if entry.method == "kd" and entry.recipe.overparam is None]
    any_kd = [entry.label for entry in entries if entry.method == "kd"]
    return [*plain, *any_kd, *labels][0]


def check_folder(folder: Path) -> None:
    """Raise InputError when the report would replace files that are not a comparison's."""
    there = [path for suffix in SUFFIXES if os.path.lexists(path := folder / f"{NAME}.{suffix}")]
    if not there:
        return
    with contextlib.suppress(OSError, ValueError, RecursionError):
        report = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
        if isinstance(report, dict) and {"version", "seeds", "terms", "tasks", "failures"} <= report.keys():
            return
    raise InputError(
        f"{there[0]} is there, and no report of kdcli's",
        where="--output",
        hint=f"move it, or give another --output: the report is written into {NAME}.{', .'.join(SUFFIXES)}",
    )


def check_reusable(plan: ComparisonPlan, root: Path) -> None:
    """Raise InputError when a run that is there already was made from another recipe or other data."""
    others = [cell.name for cell in plan.cells if is_other_run(cell, Run(folder_of(root, cell.name)))]
    if others:
        raise InputError(
            f"there are runs under {root} from another recipe or other data: {', '.join(others)}",
            hint="--force to run these again, or another --output",
        )


def is_done(cell: Cell, run: Run) -> bool:
    """True when `run` is this cell's and finished."""
    return not is_other_run(cell, run) and run.is_done


def is_other_run(cell: Cell, run: Run) -> bool:
    """True when `run` has begun, but not as this cell, or when its record cannot be read."""
    try:
        record = run.record
    except InputError:
        return True
    if record is None:
        return False
    data = record.hashes.data if record.hashes is not None else cell.entry.fingerprint
    return record.recipe != cell.recipe.model_dump(exclude_none=True) or data != cell.entry.fingerprint
