"""The results of a comparison, as a table for people, as Markdown, CSV and JSON."""

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdcli import __version__
from kdcli.compare.plan import NAME, STEPS, Cell, ComparisonPlan, Entry, Inequality, said_seeds
from kdcli.compare.run import Failure, Results
from kdcli.compare.statistics import Difference, Summary, paired_difference, summarise
from kdcli.distill.record import FinishedRun
from kdcli.evaluation.result import Metrics
from kdcli.files import remove_leftovers, write_bytes, write_json, write_text
from kdcli.markdown import escaped, table_row
from kdcli.tasks.metrics import is_error, retention_of, shown
from kdcli.words import counted

AVERAGE = "average"
COLUMNS = ("", "score", "difference", "kept", "parameters in training", "at inference", "seconds")
TO_PLAIN = "to the plain recipe"
"""A column beside the difference, where there are variants."""
FIELDS = (
    *("task", "metric", "name", "method", "overparam", "form", "seeds", "score", "std"),
    *("difference", "difference_low", "difference_high", "retention"),
    *("variant_of", "to_plain", "to_plain_low", "to_plain_high"),
    *("parameters_training", "parameters_inference", "seconds", "recipe"),
)


@dataclass
class Row:
    """A recipe on one task, or its average over tasks. seconds: of training, mean over whole trainings.

    difference: to the baseline; to_plain: a variant's to its plain recipe. sets: where the score is the mean of those
    on several sets, such as the parts of the task, these, each the mean over seeds.
    """

    label: str
    entry: Entry
    scores: dict[int, float]
    trained: int | None
    parameters: int | None
    seconds: float | None
    runs: list[str]
    summary: Summary | None = None
    difference: Difference | None = None
    to_plain: Difference | None = None
    retention: float | None = None
    sets: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.label,
            "recipe": str(self.entry.file),
            "method": self.entry.method,
            "form": self.entry.form,
            "overparam": self.entry.recipe.overparam is not None,
            "scores": {str(seed): score for seed, score in self.scores.items()},
            "mean": self.summary.mean if self.summary else None,
            "std": self.summary.std if self.summary else None,
            "difference": self.difference.to_json() if self.difference else None,
            "variant": {
                "of": self.entry.plain,
                "changes": list(self.entry.variant),
                "difference": self.to_plain.to_json() if self.to_plain else None,
            }
            if self.entry.plain is not None
            else None,
            "retention": self.retention,
            **({"sets": self.sets} if self.sets else {}),
            "parameters": {"training": self.trained, "inference": self.parameters},
            "seconds": self.seconds,
            "runs": self.runs,
        }


@dataclass
class Block:
    """All rows of one task. teacher_score: None when the teacher was not scored. teacher_sets: as a row's."""

    title: str
    metric: str
    baseline: str
    teacher_score: float | None
    teacher_parameters: int | None
    rows: list[Row]
    teacher_sets: dict[str, float] = field(default_factory=dict)

    @property
    def sets(self) -> list[list[str]]:
        """The table of the scores on each of several sets, its heading first; empty where there is one set."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.sets))
        scored = [("teacher", self.teacher_sets), *((row.label, row.sets) for row in self.rows)]
        cells = [
            [label, *(shown(self.metric, sets[name]) if name in sets else "" for name in names)]
            for label, sets in scored
            if sets
        ]
        return [["", *names], *cells] if names else []

    def finish(self) -> "Block":
        """Fill in what follows from the scores."""
        by_label = {row.label: row for row in self.rows}
        for row in self.rows:
            row.summary = summarise(row.scores)
            if row.label != self.baseline:
                row.difference = paired_difference(row.scores, by_label[self.baseline].scores)
            if (plain := by_label.get(row.entry.plain or "")) is not None:
                row.to_plain = paired_difference(row.scores, plain.scores)
            if row.summary is not None and self.teacher_score is not None:
                row.retention = retention_of(self.metric, row.summary.mean, self.teacher_score)
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.title,
            "metric": self.metric,
            "baseline": self.baseline,
            "teacher": {
                "score": self.teacher_score,
                "parameters": self.teacher_parameters,
                **({"sets": self.teacher_sets} if self.teacher_sets else {}),
            },
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass
class Report:
    """A whole comparison. terms: what is equal for all recipes of a task, in words, or what is known to differ."""

    seeds: list[int]
    blocks: list[Block]
    average: Block | None
    terms: dict[str, str]
    unequal: list[Inequality]
    notes: list[str]
    failures: list[Failure]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "seeds": self.seeds,
            "terms": self.terms,
            "unequal": [difference.to_json() for difference in self.unequal],
            "notes": self.notes,
            "tasks": [block.to_json() for block in self.blocks],
            "average": self.average.to_json() if self.average else None,
            "failures": [failure.to_json() for failure in self.failures],
        }

    @property
    def columns(self) -> list[str]:
        """The headings of the table: with variants, one more difference."""
        with_variants = any(row.entry.plain is not None for block in self.blocks for row in block.rows)
        return [*COLUMNS[:3], *([TO_PLAIN] if with_variants else []), *COLUMNS[3:]]

    def cells_of(self, block: Block) -> Iterable[list[str]]:
        """Yield the cells of each row of a task as people read them, under `columns`, the teacher first."""
        for cells in _cells(block, len(self.seeds)):
            yield [cells.get(column, "") for column in self.columns]

    @property
    def all_blocks(self) -> list[Block]:
        return [*self.blocks, *([self.average] if self.average else [])]

    def markdown(self) -> str:
        """Return the report as Markdown, with the figure that lies beside it."""
        lines = [
            "# Comparison",
            "",
            f"{said_seeds(self.seeds)}. Scores are means over seeds, {_unit(self.blocks)}, with their standard"
            " deviation (n - 1); differences are paired by seed, with the 95 % t interval of their mean. `kept` is the"
            " share of the teacher's score; seconds are those of training.",
            "",
            *(f"- {escaped(task)}: {escaped(words)}" for task, words in self.terms.items()),
            "",
        ]
        for heading, entries in (
            ("Not on equal terms", [str(difference) for difference in self.unequal]),
            ("Notes", self.notes),
            ("Without a result", [f"{failure.cell.name}: {failure.message}" for failure in self.failures]),
        ):
            if entries:
                lines += [f"**{heading}:**", "", *(f"- {escaped(entry)}" for entry in entries), ""]
        for block in self.all_blocks:
            lines += [f"## {escaped(heading_of(block))}", ""]
            lines += [table_row(self.columns), table_row(["---", *["---:"] * (len(self.columns) - 1)])]
            lines += [table_row([escaped(cells[0]), *cells[1:]]) for cells in self.cells_of(block)]
            lines.append("")
            if block.sets:
                head, *rows = ([escaped(cell) for cell in cells] for cells in block.sets)
                lines += [table_row(head), table_row(["---", *["---:"] * (len(head) - 1)]), *map(table_row, rows), ""]
        return "\n".join([*lines, f"![score against parameters]({NAME}.svg)", ""])

    def csv(self) -> str:
        """Return one line a row, the teachers' among them, with the numbers as they are; empty where there is none."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        for block in self.all_blocks:
            place = {"task": block.title, "metric": block.metric}
            teacher = {"score": block.teacher_score, "parameters_inference": block.teacher_parameters}
            writer.writerow({**place, "name": "teacher", **teacher})
            for row in block.rows:
                writer.writerow(
                    {
                        **place,
                        "name": row.label,
                        "method": row.entry.method,
                        "overparam": str(row.entry.recipe.overparam is not None).lower(),
                        "form": row.entry.form,
                        "seeds": len(row.scores),
                        "score": row.summary.mean if row.summary else None,
                        "std": row.summary.std if row.summary else None,
                        **_fields("difference", row.difference),
                        "variant_of": row.entry.plain,
                        **_fields("to_plain", row.to_plain),
                        "retention": row.retention,
                        "parameters_training": row.trained,
                        "parameters_inference": row.parameters,
                        "seconds": row.seconds,
                        "recipe": row.entry.file,
                    }
                )
        return text.getvalue()

    def write(self, folder: Path, figures: dict[str, bytes]) -> None:
        """Write `comparison.md`, `.csv`, `.json`, and the figures {suffix: content}, each atomically."""
        remove_leftovers(folder, below=False)
        # First what tells that the others are a comparison's.
        write_json(folder / f"{NAME}.json", self.to_json())
        for suffix, content in figures.items():
            write_bytes(folder / f"{NAME}.{suffix}", content)
        write_text(folder / f"{NAME}.csv", self.csv())
        write_text(folder / f"{NAME}.md", self.markdown())


def make_report(plan: ComparisonPlan, results: Results) -> Report:
    """Return the report of what was run."""
    blocks = [block for task in plan.tasks for block in _blocks(plan, results, task)]
    unequal = list(plan.unequal)
    for task in plan.tasks:
        found = _teachers(plan, results, task)
        if len(set(found.values())) > 1:
            unequal.append(Inequality(task, "teacher (hash of its weights)", found))
    return Report(
        seeds=plan.seeds,
        blocks=blocks,
        average=_average(blocks, plan.seeds),
        terms={task: _terms(plan.of(task), results, plan.seeds[0]) for task in plan.tasks},
        unequal=unequal,
        notes=[*plan.left_out, *_notes(results.records)],
        failures=results.failures,
    )


def _records(plan: ComparisonPlan, results: Results, entry: Entry) -> dict[int, FinishedRun]:
    names = {seed: Cell(entry, seed).name for seed in plan.seeds}
    return {seed: results.records[name] for seed, name in names.items() if name in results.records}


def _teachers(plan: ComparisonPlan, results: Results, task: str) -> dict[str, str | None]:
    cells = [cell for cell in plan.cells if cell.entry.task == task and cell.name in results.records]
    return {cell.name: results.records[cell.name].hashes.teacher for cell in cells}


@dataclass(frozen=True)
class _Scores:
    """What a run's student scored on a task, and its teacher, if it was scored. sets: as a row's."""

    metric: str
    student: float
    teacher: float | None
    sets: dict[str, float]
    teacher_sets: dict[str, float]


def _scores(record: FinishedRun) -> dict[str, _Scores]:
    """Return the scores of a run by task; of one on plain text of what was fine-tuned."""
    name, result = record.task.name, record.result
    if result.student.score is not None:
        student, teacher, metric = result.student, result.teacher, result.primary
        score, sets = (teacher.score, teacher.metrics) if teacher is not None else (None, {})
        each = (_sets([metrics], metric) for metrics in (student.metrics, sets))
        return {name: _Scores(metric, result.student.score, score, *each)}
    return {
        f"{name}, then {tuned.task}": _Scores(
            tuned.metric,
            tuned.mean["student"],
            tuned.mean.get("teacher"),
            *(_sets(tuned.metrics.get(model, []), tuned.metric) for model in ("student", "teacher")),
        )
        for tuned in result.finetune
    }


def _sets(runs: Sequence[Metrics], metric: str) -> dict[str, float]:
    """Return the scores on several sets, each the mean over runs; none where there is one set."""
    return _means([{name: values[metric] for name, values in run.items()} for run in runs if len(run) > 1])


def _means(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(run[name] for run in runs) for name in runs[0]} if runs else {}


def _blocks(plan: ComparisonPlan, results: Results, task: str) -> list[Block]:
    entries = plan.of(task)
    runs = {entry.label: _records(plan, results, entry) for entry in entries}
    scores = {label: {seed: _scores(record) for seed, record in mine.items()} for label, mine in runs.items()}
    teachers = [record.result.teacher for mine in runs.values() for record in mine.values()]
    titles = list(dict.fromkeys(title for mine in scores.values() for one in mine.values() for title in one))
    blocks = []
    for title in titles or [task]:
        found = [one[title] for mine in scores.values() for one in mine.values() if title in one]
        scored = [one.teacher for one in found if one.teacher is not None]
        rows = []
        for entry in entries:
            own = {seed: one[title] for seed, one in scores[entry.label].items() if title in one}
            mine = {seed: one.student for seed, one in own.items()}
            row = _row(entry, mine, runs[entry.label], results.root)
            rows.append(replace(row, sets=_means([one.sets for one in own.values() if one.sets])))
        blocks.append(
            Block(
                title=title,
                metric=found[0].metric if found else "",
                baseline=plan.baselines[task],
                teacher_score=statistics.fmean(scored) if scored else None,
                teacher_parameters=teachers[0].parameters if teachers and teachers[0] else None,
                rows=rows,
                teacher_sets=_means([one.teacher_sets for one in found if one.teacher_sets]),
            ).finish()
        )
    return blocks


def _row(entry: Entry, scores: dict[int, float], records: dict[int, FinishedRun], root: Path) -> Row:
    seconds = [
        record.seconds.train + record.seconds.assistant_train for record in records.values() if not record.interrupted
    ]
    return Row(
        label=entry.label,
        entry=entry,
        scores=scores,
        trained=max(map(_trained, records.values()), default=None),
        parameters=max((record.result.student.parameters for record in records.values()), default=None),
        seconds=statistics.fmean(seconds) if seconds else None,
        runs=[str(root / Cell(entry, seed).name) for seed in records],
    )


def _trained(record: FinishedRun) -> int:
    """Return how many parameters the optimizer moved: chains instead of matrices, and a method's own bridges."""
    counts = [stage.parameters for stage in record.training if stage.parameters is not None]
    chain = record.overparam
    return max(counts, default=chain.parameters_after if chain else record.result.student.parameters)


def _average(blocks: list[Block], seeds: list[int]) -> Block | None:
    """Return the average over tasks, seed by seed, of the rows that every task has; None without the baseline's."""
    common = set.intersection(*({row.label for row in block.rows} for block in blocks))
    labels = [row.label for row in blocks[0].rows if row.label in common]
    if len(blocks) < 2 or blocks[0].baseline not in common or len({block.baseline for block in blocks}) > 1:
        return None
    if any(is_error(block.metric) for block in blocks):
        # Numbers of different units have no mean.
        return None
    rows = []
    for label in labels:
        parts = [next(row for row in block.rows if row.label == label) for block in blocks]
        whole = [seed for seed in seeds if all(seed in part.scores for part in parts)]
        rows.append(
            Row(
                label=label,
                entry=parts[0].entry,
                scores={seed: statistics.fmean(part.scores[seed] for part in parts) for seed in whole},
                trained=_mean([part.trained for part in parts], round),
                parameters=_mean([part.parameters for part in parts], round),
                seconds=_mean([part.seconds for part in parts]),
                runs=[run for part in parts for run in part.runs],
            )
        )
    return Block(
        title=AVERAGE,
        metric=", ".join(dict.fromkeys(block.metric for block in blocks)),
        baseline=blocks[0].baseline,
        teacher_score=_mean([block.teacher_score for block in blocks]),
        teacher_parameters=_mean([block.teacher_parameters for block in blocks], round),
        rows=rows,
    ).finish()


def _mean(values: Iterable[float | None], finish: Callable[[float], Any] = float) -> Any:
    numbers = list(values)
    known = [number for number in numbers if number is not None]
    return finish(statistics.fmean(known)) if len(known) == len(numbers) else None


def _terms(entries: list[Entry], results: Results, seed: int) -> str:
    """Return the terms that all recipes of a task share, in words."""
    terms = entries[0].terms
    names = [Cell(entry, seed).name for entry in entries]
    record = next((results.records[name] for name in names if name in results.records), None)
    parts = [f"teacher {terms['teacher.model'] or 'from scratch'}"]
    if record is not None:
        parts.append(f"{record.task.trained_on} training examples")
    parts += [
        f"{counted(terms['train.batch_size'], 'example')} a step",
        f"{counted(terms[STEPS], 'step')}",
        terms["train.precision"],
        f"protocol {terms['evaluate.protocol']}",
        f"data {entries[0].fingerprint}",
    ]
    if record is not None:
        parts.append(f"on {record.versions['device']} with torch {record.versions['torch']}")
    return ", ".join(parts)


def _notes(records: dict[str, FinishedRun]) -> list[str]:
    """Say what differs between the machines that the runs were made on."""
    notes = []
    for key in dict.fromkeys(key for record in records.values() for key in record.versions):
        found = sorted({str(record.versions.get(key)) for record in records.values()})
        if len(found) > 1:
            notes.append(f"the runs were made with different {key}: {', '.join(found)}")
    stopped = [name for name, record in records.items() if record.interrupted]
    if stopped:
        notes.append(f"stopped once and resumed, so not in the seconds: {', '.join(stopped)}")
    return notes


def heading_of(block: Block) -> str:
    return f"{block.title} ({block.metric})" if block.metric else block.title


def _fields(name: str, difference: Difference | None) -> dict[str, float | None]:
    """Return a difference as fields of the CSV file."""
    if difference is None:
        return {}
    return {name: difference.mean, f"{name}_low": difference.low, f"{name}_high": difference.high}


def _cells(block: Block, seeds: int) -> Iterable[dict[str, str]]:
    """Yield {column: text} of each row, the teacher first; what is left out is empty."""
    metric = block.metric
    score = shown(metric, block.teacher_score) if block.teacher_score is not None else ""
    kept = "100.0%" if block.teacher_score is not None and block.teacher_score > 0 else ""
    yield {"": "teacher", "score": score, "kept": kept, "at inference": _count(block.teacher_parameters)}
    for row in block.rows:
        yield {
            "": row.label,
            "score": _score(metric, row.summary, seeds),
            "difference": difference_text(metric, row.difference) if row.label != block.baseline else "baseline",
            TO_PLAIN: difference_text(metric, row.to_plain),
            "kept": f"{row.retention:.1%}" if row.retention is not None else "",
            "parameters in training": _count(row.trained),
            "at inference": _count(row.parameters),
            "seconds": f"{row.seconds:,.1f}" if row.seconds is not None else "",
        }


def _score(metric: str, summary: Summary | None, seeds: int) -> str:
    if summary is None:
        return "no result"
    spread = f" ± {shown(metric, summary.std)}" if summary.std is not None else ""
    return f"{shown(metric, summary.mean)}{spread}" + (
        f" ({summary.count} of {seeds})" if summary.count < seeds else ""
    )


def difference_text(metric: str, difference: Difference | None) -> str:
    """Return a mean difference as the metric is shown, with its 95 % interval; nothing where there is none."""
    if difference is None:
        return ""
    mean, *interval = (
        shown(metric, value) if value < 0 else f"+{shown(metric, value)}"
        for value in (difference.mean, difference.low, difference.high)
        if value is not None
    )
    return f"{mean} [{', '.join(interval)}]" if interval else mean


def _unit(blocks: Iterable[Block]) -> str:
    """Return the unit of the scores, in words."""
    errors = [name for name in dict.fromkeys(block.metric for block in blocks) if is_error(name)]
    return "in hundredths" + (f" ({', '.join(errors)}: as it is, less is better)" if errors else "")


def _count(number: int | None) -> str:
    return f"{number:,}" if number is not None else ""
