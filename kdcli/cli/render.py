"""Results as tables for people: one function a kind of result, each a pure function of what it shows."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from kdcli.recipe.fields import show
from kdcli.words import counted

if TYPE_CHECKING:
    from kdcli.compare.plan import ComparisonPlan
    from kdcli.compare.report import Report
    from kdcli.distill.memory import Memory
    from kdcli.distill.plan import Plan
    from kdcli.evaluation.result import Loss, Result
    from kdcli.export.export import ExportResult
    from kdcli.export.latency import LatencyReport
    from kdcli.models.overparam import ContractReport, OverparamReport
    from kdcli.recipe.fields import Entry
    from kdcli.tasks.by_class import ByClass


def scores(result: "Result") -> Table:
    """Return the table of a run's result: teacher beside student, or what was fine-tuned from a general student."""
    return _teacher_beside_student(result) if result.loss is None else _after_finetuning(result, result.loss)


def _teacher_beside_student(result: "Result") -> Table:
    from kdcli.tasks.metrics import names_of, shown, shown_of

    sides = {"teacher": result.teacher, "student": result.student}
    known = {name: side for name, side in sides.items() if side is not None}
    table = Table()
    table.add_column("")
    for name in (*known, *(["student / teacher"] if len(known) == 2 else [])):
        table.add_column(name, justify="right", overflow="fold")

    def row(label: str, style: Callable[[float], str], values: Sequence[float], cells: Sequence[str] = ()) -> None:
        cells = [*(cells or map(style, values))]
        if len(values) == 2:
            cells.append(f"{values[1] / values[0]:.1%}" if values[0] > 0 else "")
        table.add_row(label, *cells)

    for name, metrics in result.student.metrics.items():
        for metric in names_of(metrics):
            found = [side.metrics[name] for side in known.values()]
            cells = [shown_of(each, metric) for each in found]
            row(result.label(metric, name), partial(shown, metric), [each[metric] for each in found], cells)
    for metric in result.student.mean:
        values = [side.mean[metric] for side in known.values()]
        row(f"{metric} (mean of {len(result.student.metrics)} sets)", partial(shown, metric), values)
    row("parameters", "{:,}".format, [side.parameters for side in known.values()])
    row("megabytes", "{:.1f}".format, [side.megabytes for side in known.values()])
    return table


def by_class(sides: "Mapping[str, ByClass]") -> list[Table]:
    """Return a table of the classes of each report set. sides: each model's scores, by what it is called."""
    from kdcli.evaluation.result import tables_by_class

    tables = []
    for name, (head, *rows) in tables_by_class(sides).items():
        table = Table(title=name, title_style="", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for place, column in enumerate(head):
            table.add_column(column, justify="right" if place else "left", overflow="fold")
        for cells in rows:
            table.add_row(*map(Text, cells))
        tables.append(table)
    return tables


def _after_finetuning(result: "Result", loss: "Loss") -> Table:
    table = Table()
    names = list(dict.fromkeys(["teacher", "student", *(n for s in result.finetune for n in s.scores)]))
    table.add_column("")
    for name in names:
        table.add_column("from scratch" if name == "scratch" else name, justify="right")
    for tuned in result.finetune:
        cells = [_mean_score(tuned.metric, tuned.scores.get(name, [])) for name in names]
        table.add_row(f"{tuned.metric} ({tuned.task})", *cells)
    empty = [""] * (len(names) - 2)
    sides = [side for side in (result.teacher, result.student) if side is not None]
    table.add_row("parameters", *(f"{side.parameters:,}" for side in sides), *empty)
    table.add_row("megabytes", *(f"{side.megabytes:.1f}" for side in sides), *empty)
    if loss.before is not None and loss.after is not None:
        for name, (before, after) in loss.parts.items():
            table.add_row(f"held-out loss ({name})", "", f"{before:.4f} to {after:.4f}", *empty)
        table.add_row("held-out loss", "", f"{loss.before:.4f} to {loss.after:.4f}", *empty)
    return table


def _mean_score(metric: str, values: list[float]) -> str:
    from kdcli.tasks.metrics import shown

    if not values:
        return ""
    return shown(metric, mean(values)) + (f" +- {shown(metric, stdev(values))}" if len(values) > 1 else "")


def plan(plan: "Plan") -> Table:
    """Return the table of a dry run: what a recipe would do."""
    table = Table(title=f"plan: {plan.name}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    task, teacher, assistant, student = plan.task, plan.teacher, plan.assistant, plan.student
    table.add_row("task", f"{task.name} ({task.kind}): {_sizes(task.sizes)}")
    for part in task.parts:
        table.add_row(f"part {part.name}", f"{next(iter(task.sizes))} {part.examples:,}, {part.share:.1%} of each step")
    if task.classes is not None:
        table.add_row("classes", f"{task.classes.number:,}; fewest training rows: {_sizes(task.classes.rarest)}")
    for note in task.notes:
        table.add_row("", f"note: {note}")
    table.add_row("method", f"{plan.method.name}: {plan.method.title}")
    for note in plan.method.notes:
        table.add_row("", f"note: {note}")
    share = ""
    if teacher.parameters is None:
        table.add_row("teacher", f"{teacher.origin}: only its answers are known")
    else:
        table.add_row("teacher", f"{teacher.origin}, {teacher.parameters:,} parameters ({teacher.preparation})")
        share = f" ({student.parameters / teacher.parameters:.1%} of the teacher)"
    if assistant is not None:
        table.add_row("assistant", f"{assistant.form}, {assistant.parameters:,} parameters")
        for note in assistant.notes:
            table.add_row("", note)
    table.add_row("student", f"{student.form}, {student.parameters:,} parameters{share}")
    for note in student.notes:
        table.add_row("", note)
    if (words := plan.vocabulary) is not None:
        pieces, sizes = (" -> ".join(f"{one:,}" for one in both) for both in (words.pieces, words.megabytes))
        table.add_row("vocabulary", f"{pieces} pieces, {sizes} MB")
    if (chains := plan.overparam) is not None:
        table.add_row(
            "overparam",
            f"{counted(chains.matrices, 'matrix', 'matrices')} as chains of {chains.tensors} tensors: "
            f"{chains.parameters:,} parameters while training",
        )
        table.add_row("", f"matched with teacher matrices: {chains.matched}, not matched: {chains.unmatched}")
    trained = [("assistant's stage", assistant.stages)] if assistant is not None else []
    for title, stages in [*trained, ("stage", plan.stages)]:
        for stage in stages:
            terms = ", ".join(f"{name} x {weight:g}" for name, weight in stage.terms.items())
            steps = f"{counted(stage.steps, 'step')} at {stage.learning_rate:g}"
            table.add_row(f"{title} {stage.name}", f"{steps}: {terms}")
    if plan.pairs:
        table.add_row("matched blocks", ", ".join(f"{s}<-{t}" for s, t in plan.pairs) + " (student<-teacher)")
    batch = counted(plan.train.batch_size, "example")
    table.add_row("training", f"{batch} a step, {plan.train.precision}, seed {plan.seed}")
    for tuned in plan.finetune:
        beside = f", beside {' and '.join(tuned.against)}" if tuned.against else ""
        table.add_row("fine-tuning", f"{tuned.task} ({_sizes(tuned.sizes)}) x {tuned.seeds}{beside}")
    for states in plan.states:
        about = "" if states.exact else "about "
        size = f"{about}{states.bytes / 1e9:,.2f} GB on disk while the {states.student} trains ({states.dtype})"
        table.add_row("teacher's states", size)
    for name, said in _memory(plan.memory):
        table.add_row(name, said)
    return table


def _memory(memory: "Memory") -> list[tuple[str, str]]:
    """Return the rows of a table that say what a training step needs."""
    each = "" if memory.processes == 1 else f" in each of {memory.processes:,} processes"
    how = "" if memory.processes == 1 else ", sharded (FSDP2)" if memory.sharded else ", a whole student each (DDP)"
    rows = [("memory", f"about {_megabytes(memory.total)} for a step of {memory.tokens:,} {memory.unit}{each}{how}")]
    rows += [(f"  {name}", _megabytes(size)) for name, size in memory.parts.items()]
    if memory.spread:
        rows.append(
            ("  teacher's blocks", f"{_megabytes(memory.spread)} not counted: where teacher.device_map puts them")
        )
    return rows + ([("  whole student, CPU", _megabytes(memory.host))] if memory.host else [])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {rows:,}" for name, rows in sizes.items())


def exported(result: "ExportResult") -> RenderableType:
    """Return the tables of an export: the graph, its parity with PyTorch, and its latency if it was measured."""
    from kdcli.export.session import MODEL

    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("graph", f"{result.folder / MODEL} ({result.megabytes:.1f} MB)")
    if result.parity.agreement is not None:
        table.add_row("made by", f"{result.maker}, {result.precision}")
    table.add_row("parity", _parity(result))
    return Group(table, *(latencies(result.latency) if result.latency is not None else []))


def _parity(result: "ExportResult") -> str:
    if result.parity.agreement is None:
        return f"outputs within {result.difference:.1e} of PyTorch's on {result.inputs}"
    return (
        f"logits within {result.difference:.1e} of PyTorch's, the same most probable token at "
        f"{result.parity.agreement:.1%} of the places, on {result.inputs}"
    )


def latencies(report: "LatencyReport") -> list[Table]:
    """Return the tables of a latency grid: one for each thing that was timed."""
    return [
        latency(replace(report, rows=[row for row in report.rows if row["what"] == what]))
        for what in dict.fromkeys(row["what"] for row in report.rows)
    ]


def latency(report: "LatencyReport") -> Table:
    """Return the table of a latency grid of one thing, milliseconds, a row a contestant and cell."""
    from kdcli.export.latency import FEW, FIRST, NEXT, WIDE

    counts = sorted({row["runs"] for row in report.rows})
    runs = (f"{counts[0]} to " if len(counts) > 1 else "") + counted(counts[-1], "run")
    what = report.rows[0]["what"]
    timed = {FIRST: "ms to the first token", NEXT: "ms for each next token"}.get(what, "latency in ms")
    unit = "tokens" if timed.startswith("latency") else "tokens of the prompt"
    unit = "pixels of a side" if report.of_images else unit
    title = (
        f"{timed}, {counted(report.threads, 'thread')}, {runs} each, in turn\n"
        f"size: batch x {unit}; "
        "speed: against PyTorch eager"
    )
    if not all(row["steady"] for row in report.rows):
        title += f"\n*: unsteady (a quarter of the runs above {WIDE} x the fastest, or fewer than {FEW} runs)"
    # Eight columns fit into 80 characters without frames and paddings.
    table = Table(title=title, title_style="", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    throughput = "tokens/s" if what == NEXT else "examples/s"
    for name in ("model", "size", "backend", "p50", "p95", "p99", throughput, "speed"):
        table.add_column(name, justify="right" if name not in ("model", "backend") else "left", no_wrap=True)

    def mark(*rows: dict[str, Any]) -> str:
        return "" if all(row["steady"] for row in rows) else "*"

    for row in report.rows:
        eager = report.of(row["model"], "PyTorch", row["batch"], row[report.axis])
        table.add_row(
            row["model"],
            f"{row['batch']} x {row[report.axis]}",
            row["backend"],
            f"{row['p50']:.2f}{mark(row)}",
            *(f"{row[key]:.2f}" for key in ("p95", "p99")),
            f"{row['throughput']:,.0f}",
            f"{eager['p50'] / row['p50']:.2f}x{mark(row, eager)}",
        )
    return table


def chains(report: "OverparamReport") -> Table:
    """Return the table of an over-parameterised model, a row a matrix."""
    table = _table_of_matrices(report.before, report.after, "block", "dense", "chain", "scale")
    for row in report.rows:
        sizes = (row.shape, row.out_factors, row.in_factors, row.bonds)
        table.add_row(
            str(row.block),
            row.matrix,
            *_factors(*sizes),
            f"{row.dense:,}",
            f"{row.chain:,}",
            f"{row.chain / row.dense:.4f}",
        )
    return table


def contraction(report: "ContractReport") -> Table:
    """Return the table of a contracted model, a row a matrix."""
    table = _table_of_matrices(report.before, report.after, None, "chain", "dense")
    for row in report.matrices:
        sizes = (row["shape"], row["out_factors"], row["in_factors"], row["bonds"])
        table.add_row(row["name"], *_factors(*sizes), f"{row['chain']:,}", f"{row['dense']:,}")
    return table


def _table_of_matrices(before: int, after: int, first: str | None, *last: str) -> Table:
    # Nine columns: without frames and paddings numbers stay on one line at 100 characters.
    title = f"{before:,} -> {after:,} parameters"
    table = Table(title=title, title_style="", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ([first] if first else []) + ["matrix", "shape", "out factors", "in factors", "bonds", *last]:
        table.add_column(name, justify="left" if name in ("matrix", "shape") else "right", overflow="fold")
    return table


def _factors(*sizes: Sequence[int]) -> list[str]:
    *shapes, bonds = sizes
    return ["x".join(map(str, shape)) for shape in shapes] + [",".join(map(str, bonds))]


def comparison_plan(plan: "ComparisonPlan", root: Path) -> Table:
    """Return the table of what `compare` would run under `root`, a row a recipe and task."""
    from kdcli.compare.plan import PARAMETERS, STEPS, is_done, said_seeds
    from kdcli.runs import Run

    rows, runs = counted(len(plan.entries), "row"), counted(len(plan.cells), "run")
    table = Table(title=f"plan: {rows} x {said_seeds(plan.seeds)}, {runs}")
    for column in ("task", "name", "method", "student", "parameters", "steps", "done before"):
        justify: JustifyMethod = "right" if column in ("parameters", "steps", "done before") else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for task in plan.tasks:
        for entry in plan.of(task):
            done = sum(is_done(cell, Run(root / cell.name)) for cell in plan.cells if cell.entry is entry)
            table.add_row(
                task,
                f"{entry.label} (baseline)" if entry.label == plan.baselines[task] else entry.label,
                entry.method + (" + overparam" if entry.recipe.overparam is not None else ""),
                entry.form,
                f"{entry.terms[PARAMETERS]:,}",
                f"{entry.terms[STEPS]:,}",
                f"{done} of {len(plan.seeds)}",
            )
    return table


def comparison(report: "Report") -> Group:
    """Return the table of a finished comparison, a section a task; and of each task with several sets one of these."""
    from kdcli.compare.plan import said_seeds
    from kdcli.compare.report import heading_of

    table = Table(title=f"{said_seeds(report.seeds)}: mean and standard deviation; 95 % interval of the difference")
    for column in report.columns:
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for block in report.all_blocks:
        table.add_section()
        table.add_row(Text(heading_of(block), style="bold"))
        for cells in report.cells_of(block):
            table.add_row(*map(Text, cells))
    sets = []
    for block in report.blocks:
        if block.sets:
            each = Table(*block.sets[0], title=f"{heading_of(block)}, set by set")
            for cells in block.sets[1:]:
                each.add_row(*map(Text, cells))
            sets.append(each)
    return Group(table, *sets)


def columns(rows: Iterable[Sequence[str]], head: Sequence[str] | None = None) -> Table:
    """Return rows of cells in columns without lines; the last column is folded where the width ends."""
    table = Table(box=None, show_header=head is not None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in head or ():
        table.add_column(name, overflow="fold")
    for row in rows:
        # As plain text: a formula's square brackets are no markup.
        table.add_row(*map(Text, row))
    for column in table.columns[:-1]:
        column.no_wrap = True
    return table


def reference(entries: "Sequence[Entry]") -> Group:
    """Return every table of a recipe with its fields, their defaults and meanings, each table once."""
    places: dict[type, list[Entry]] = {}
    for entry in entries:
        if entry.table is not None:
            places.setdefault(entry.table, []).append(entry)
    parts: list[RenderableType] = [_fields([entry for entry in entries if len(entry.path) == 1], entries)]
    for kind, owners in places.items():
        heads = ", ".join(f"[[{owner.name}]]" if owner.many else f"[{owner.name}]" for owner in owners)
        inside = [entry for entry in entries if entry.path[:-1] == owners[0].path]
        # The header stands above already.
        about = re.sub(r"^`\[.*?: ", "", inspect.cleandoc(kind.__doc__ or ""))
        parts += ["", Text(heads, style="bold"), Text(about), _fields(inside, entries)]
    return Group(*parts)


def fields(rows: Sequence[Mapping[str, Any]], inside: "Sequence[Entry]") -> Group:
    """Return what there is to know of a field, a row for each of its meanings; of a table also its fields."""
    parts: list[RenderableType] = []
    for row in rows:
        default = "required" if row["required"] else "" if row["default"] is None else show(row["default"])
        lines = {
            "field": row["field"],
            "only with": _of_kinds(row["kinds"]),
            "type": row["allowed"],
            "default": default,
            "of the method": show(row["default_of_method"]) if "default_of_method" in row else "",
            "meaning": row["description"],
        }
        parts += [columns((key, value) for key, value in lines.items() if value), ""]
    return Group(*parts, _fields(inside, inside)) if inside else Group(*parts[:-1])


def kind(document: Mapping[str, Any], inside: "Sequence[Entry]") -> Group:
    """Return a kind of task: what it is, and its own fields of `[task]`."""
    lines = {key: ", ".join(value) if key in ("metrics", "methods") else value for key, value in document.items()}
    about = columns((key, value) for key, value in lines.items() if key != "fields")
    # A field of a table within `[task]` has that table's name before its own.
    named = [replace(entry, path=(entry.path[0], ".".join(entry.path[1:]))) for entry in inside]
    return Group(about, "", _fields(named, named)) if inside else Group(about)


def family(document: Mapping[str, Any]) -> Group:
    """Return a family of models: what its blocks are like, where their matrices are, and what does not work."""
    lines = [
        (key.replace("_", "-"), document[key])
        for key in ("name", "title", "reads", "attention", "direction", "feed_forward", "blocks")
    ]
    limits = [("limits" if number == 0 else "", text) for number, text in enumerate(document["limits_in_full"])]
    matrices = columns(document["matrices"].items(), ("matrix", "module in a block"))
    about = columns([*lines, *(limits or [("limits", "none")])])
    return Group(about, "", matrices) if document["matrices"] else Group(about)


def _of_kinds(kinds: Sequence[str]) -> str:
    return f"type = {' or '.join(map(show, kinds))}" if kinds else ""


def _fields(some: "Sequence[Entry]", aligned: "Sequence[Entry]") -> Table:
    """Return fields of one table with default and meaning, in columns as wide as `aligned` needs them."""

    def meaning(entry: "Entry") -> str:
        only = f"(With {_of_kinds(entry.kinds)}.)" if entry.kinds else ""
        return f"{entry.description} {only}".strip()

    table = columns((entry.path[-1], entry.shown_default, meaning(entry)) for entry in some)
    sides = ([entry.path[-1] for entry in aligned], [entry.shown_default for entry in aligned])
    for column, cells in zip(table.columns, sides, strict=False):
        column.min_width = max(map(len, cells))
    return table
