"""The model card that a run writes beside its student."""

from collections.abc import Mapping

import yaml

from kdcli.distill.record import FinishedRun, TaskRecord
from kdcli.evaluation.result import Loss, Side, tables_by_class
from kdcli.markdown import code, escaped, table_row
from kdcli.models.heads import Head
from kdcli.tasks.heads import head_named
from kdcli.tasks.metrics import is_error, names_of, shown, shown_of
from kdcli.words import counted

MOST_CLASSES = 50
"""Classes that a card shows one by one."""


def model_card(record: FinishedRun) -> str:
    """Return README.md of a student: where it comes from, what it scores, how to load it."""
    loss = record.result.loss
    return _general_card(record, loss) if loss is not None and record.is_general else _scored_card(record)


def _scored_card(record: FinishedRun) -> str:
    method, task, result = record.method, record.task, record.result
    known = {"teacher": result.teacher, "student": result.student}
    sides = {name: side for name, side in known.items() if side is not None}
    every = result.student.metrics.items()
    cells = [(result.label(m, name), name, m) for name, metrics in every for m in names_of(metrics)]
    sets = f"mean of {len(result.student.metrics)} sets"
    rows = "\n".join(
        [
            table_row(["", *sides]),
            table_row(["---", *["---:"] * len(sides)]),
            *(
                table_row([escaped(label), *(shown_of(side.metrics[n], m) for side in sides.values())])
                for label, n, m in cells
            ),
            *(
                table_row([f"{m} ({sets})", *(shown(m, side.mean[m]) for side in sides.values())])
                for m in result.student.mean
            ),
            table_row(["parameters", *(f"{side.parameters:,}" for side in sides.values())]),
            table_row(["megabytes", *(f"{side.megabytes:.1f}" for side in sides.values())]),
        ]
    )
    over = "\n- over-parameterised while training (OPDF), contracted afterwards" if record.overparam else ""
    copies = f" and {counted(task.augment.added, 'copy', 'copies')} with other words" if task.augment else ""
    protocol = code(task.protocol)
    head = head_named(record.student_head)
    loading = _loading(head, plain=record.is_plain)
    holding = "Scores hold for data like the task's own. " if every else ""
    retention = result.retention
    kept = ""
    if retention is not None and is_error(result.primary):
        kept = f"\nThe student's {result.primary} is {1 / retention:.1%} of the teacher's; less is better.\n"
    elif retention is not None:
        kept = f"\nThe student keeps {retention:.1%} of the teacher's {result.primary}.\n"
    return f"""{_front_matter(method.name, head, plain=record.is_plain)}
# {escaped(record.name)}

A smaller transformer for the task {code(task.name)}, distilled with kdcli {record.versions["kdcli"]}.

- teacher: {escaped(record.teacher_origin)}
- method: {escaped(method.name)}, {escaped(method.title)}
- student form: {record.student_form}{over}{_vocabulary(record)}
- data: {escaped(task.source)}, {task.trained_on} training examples{copies}, protocol {protocol}{_parts(task)}\
{_fell(result.loss)}

{rows}
{kept}{_by_class(sides)}
## Loading

```python
{loading}
```

## Limits

{holding}The student inherits the teacher's biases, and seed {record.seed}
is one sample of the training's randomness.

## Source

{escaped(method.paper)}
"""


def _by_class(sides: Mapping[str, Side]) -> str:
    """Return the section with the scores of each class; nothing where a task has no classes."""
    found = {name: side.by_class for name, side in sides.items() if side.by_class}
    if not found:
        return ""
    lines = ["", "## By class", ""]
    for name, (head, *rows) in tables_by_class(found, most=MOST_CLASSES).items():
        every = max(len(side[name]) for side in found.values())
        left_out = f": the {len(rows)} of {every:,} classes with the lowest F1" if len(rows) < every else ""
        lines += [f"{escaped(name)}{left_out}", "", table_row(head), table_row(["---", *["---:"] * (len(head) - 1)])]
        lines += [*(table_row([escaped(cells[0]), *cells[1:]]) for cells in rows), ""]
    return "\n".join(lines)


def _parts(task: TaskRecord) -> str:
    """Return the line about the parts of a task; nothing where it is one."""
    if not task.parts:
        return ""
    return f"\n- parts: {escaped(', '.join(task.parts))}, mixed with temperature {task.mixing_temperature:g}"


def _fell(loss: Loss | None) -> str:
    """Return the line about the loss on held-out rows; nothing where it is no result, or was not measured."""
    if loss is None or loss.before is None or loss.after is None:
        return ""
    each = (f"{escaped(name)} {before:.4f}, {after:.4f}" for name, (before, after) in loss.parts.items())
    parts = f", the mean of {'; '.join(each)}" if loss.parts else ""
    return f"\n- held-out loss of the distillation: {loss.before:.4f} before, {loss.after:.4f} after{parts}"


def _front_matter(method: str, head: Head, *, plain: bool) -> str:
    """Return what the hub reads of a card, between its two lines of dashes."""
    fields = {
        "library_name": head.library if plain else "kdcli",
        "pipeline_tag": head.pipeline_tag,
        "tags": [*([head.library] if head.library != "transformers" else []), "knowledge-distillation", method],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _vocabulary(record: FinishedRun) -> str:
    if (words := record.vocabulary) is None:
        return ""
    return (
        f"\n- vocabulary: {words.pieces[1]:,} of the teacher's {words.pieces[0]:,} pieces, those that text uses; "
        f"{words.megabytes[1]:.1f} of {words.megabytes[0]:.1f} megabytes"
    )


def _loading(head: Head, *, plain: bool) -> str:
    needed = "" if plain else "import kdcli  # the weights are low-rank factors: pip install kdcli\n"
    if head.library == "sentence-transformers":
        return (
            f"{needed}from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("FOLDER")\n'
            'embeddings = model.encode(["a text", "another one"])'
        )
    reader, auto = ("processor", "AutoImageProcessor") if head.reads == "images" else ("tokenizer", "AutoTokenizer")
    return (
        f"{needed}from transformers import {head.auto}, {auto}\n\n"
        f'model = {head.auto}.from_pretrained("FOLDER")\n'
        f'{reader} = {auto}.from_pretrained("FOLDER")'
    )


def _general_card(record: FinishedRun, loss: Loss) -> str:
    method, task, result = record.method, record.task, record.result
    tuned = "".join(
        table_row(
            [
                f"{scores.metric} ({escaped(scores.task)})",
                name,
                shown(scores.metric, value),
                str(len(scores.scores[name])),
            ]
        )
        + "\n"
        for scores in result.finetune
        for name, value in scores.mean.items()
    )
    table = f"\n| fine-tuned on | model | mean | seeds |\n| --- | --- | ---: | ---: |\n{tuned}" if tuned else ""
    taught = f", {result.teacher.parameters:,} parameters" if result.teacher is not None else ""
    head = head_named(record.student_head)
    return f"""{_front_matter(method.name, head, plain=record.is_plain)}
# {escaped(record.name)}

A smaller general transformer, distilled on plain text with kdcli {record.versions["kdcli"]}, to be fine-tuned.

- teacher: {escaped(record.teacher_origin)}{taught}
- student: {record.student_form}, {result.student.parameters:,} parameters{_vocabulary(record)}
- method: {escaped(method.name)}, {escaped(method.title)}
- text: {escaped(task.source)}, {task.sizes["train"]:,} documents{_parts(task)}{_fell(loss)}
{table}
## Loading

```python
{_loading(head, plain=record.is_plain)}
```

## Limits

The student inherits the teacher's biases and those of the text. Seed {record.seed} is one sample of the training's
randomness.

## Source

{escaped(method.paper)}
"""
