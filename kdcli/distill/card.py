"""The model card that a run writes beside its student."""

from typing import Any

import yaml

from kdcli.evaluation.comparison import described_set
from kdcli.markdown import code, escaped, table_row
from kdcli.tasks.metrics import shown
from kdcli.words import counted


def model_card(record: dict[str, Any]) -> str:
    """Return README.md of a student: where it comes from, what it scores, how to load it."""
    if record["task"]["kind"] == "text":
        return _general_card(record)
    method, task, student, teacher = record["method"], record["task"], record["student"], record["teacher"]
    plain = record["student_form"] in ("depth", "width", "checkpoint")
    sides = {"teacher": teacher, "student": student} if teacher is not None else {"student": student}
    sets = {name: described_set(name, record.get("rows", {}).get(name)) for name in student["metrics"]}
    cells = [(f"{m} ({sets[name]})", name, m) for name, metrics in student["metrics"].items() for m in metrics]
    rows = "\n".join(
        [
            table_row(["", *sides]),
            table_row(["---", *["---:"] * len(sides)]),
            *(
                table_row([escaped(label), *(shown(m, side["metrics"][n][m]) for side in sides.values())])
                for label, n, m in cells
            ),
            table_row(["parameters", *(f"{side['parameters']:,}" for side in sides.values())]),
            table_row(["megabytes", *(f"{side['megabytes']:.1f}" for side in sides.values())]),
        ]
    )
    over = "\n- over-parameterised while training (OPDF), contracted afterwards" if record["overparam"] else ""
    augment = task.get("augment")
    copies = f" and {counted(augment['added'], 'copy', 'copies')} with other words" if augment else ""
    protocol = code(task["protocol"])
    loading = _loading("AutoModelForSequenceClassification", plain=plain)
    retention = record["retention"]
    kept = (
        f"\nThe student keeps {retention:.1%} of the teacher's {record['primary']}.\n" if retention is not None else ""
    )
    return f"""{_front_matter(method["name"], "text-classification", plain=plain)}
# {escaped(record.get("name", "student"))}

A smaller transformer for the task {code(task["name"])}, distilled with kdcli {record["versions"]["kdcli"]}.

- teacher: {escaped(record["teacher_origin"])}
- method: {escaped(method["name"])}, {escaped(method["title"])}
- student form: {record["student_form"]}{over}
- data: {escaped(task["source"])}, {task["sizes"]["train"]:,} training examples{copies}, protocol {protocol}

{rows}
{kept}

## Loading

```python
{loading}
```

## Limits

Scores hold for data like the task's own. The student inherits the teacher's biases, and seed {record["seed"]}
is one sample of the training's randomness.

## Source

{escaped(method["paper"])}
"""


def _front_matter(method: str, pipeline: str, *, plain: bool) -> str:
    """Return what the hub reads of a card, between its two lines of dashes."""
    fields = {
        "library_name": "transformers" if plain else "kdcli",
        "pipeline_tag": pipeline,
        "tags": ["knowledge-distillation", method],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _loading(auto: str, *, plain: bool) -> str:
    needed = "" if plain else "import kdcli  # the weights are low-rank factors: pip install kdcli\n"
    return (
        f"{needed}from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )


def _general_card(record: dict[str, Any]) -> str:
    method, task, student, teacher = record["method"], record["task"], record["student"], record["teacher"]
    plain = record["student_form"] in ("depth", "width", "checkpoint")
    before, after = record["loss"]["before"], record["loss"]["after"]
    fell = f"\n- held-out loss of the distillation: {before:.4f} before, {after:.4f} after" if before else ""
    tuned = "".join(
        table_row(
            [
                f"{scores['metric']} ({escaped(scores['task'])})",
                name,
                f"{100 * value:.2f}",
                str(len(scores["scores"][name])),
            ]
        )
        + "\n"
        for scores in record["finetune"]
        for name, value in scores["mean"].items()
    )
    table = f"\n| fine-tuned on | model | mean | seeds |\n| --- | --- | ---: | ---: |\n{tuned}" if tuned else ""
    masked = record["student_head"] == "masked-lm"
    auto = "AutoModelForMaskedLM" if masked else "AutoModel"
    return f"""{_front_matter(method["name"], "fill-mask" if masked else "feature-extraction", plain=plain)}
# {escaped(record.get("name", "student"))}

A smaller general transformer, distilled on plain text with kdcli {record["versions"]["kdcli"]}, to be fine-tuned.

- teacher: {escaped(record["teacher_origin"])}, {teacher["parameters"]:,} parameters
- student: {record["student_form"]}, {student["parameters"]:,} parameters
- method: {escaped(method["name"])}, {escaped(method["title"])}
- text: {escaped(task["source"])}, {task["sizes"]["train"]:,} documents{fell}
{table}
## Loading

```python
{_loading(auto, plain=plain)}
```

## Limits

The student inherits the teacher's biases and those of the text. Seed {record["seed"]} is one sample of the training's
randomness.

## Source

{escaped(method["paper"])}
"""
