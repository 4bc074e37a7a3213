"""The model card that a run writes beside its student."""

from typing import Any

from kdcli.evaluation.comparison import described_set
from kdcli.tasks.metrics import shown


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
            "| | " + " | ".join(sides) + " |",
            "| --- |" + " ---: |" * len(sides),
            *(
                f"| {label} | " + " | ".join(shown(m, side["metrics"][n][m]) for side in sides.values()) + " |"
                for label, n, m in cells
            ),
            "| parameters | " + " | ".join(f"{side['parameters']:,}" for side in sides.values()) + " |",
            "| megabytes | " + " | ".join(f"{side['megabytes']:.1f}" for side in sides.values()) + " |",
        ]
    )
    over = "\n- over-parameterised while training (OPDF), contracted afterwards" if record["overparam"] else ""
    augment = task.get("augment")
    copies = f" and {augment['added']:,} copies of them with other words" if augment else ""
    loading = _loading("AutoModelForSequenceClassification", plain=plain)
    retention = record["retention"]
    kept = (
        f"\nThe student keeps {retention:.1%} of the teacher's {record['primary']}.\n" if retention is not None else ""
    )
    return f"""---
library_name: {"transformers" if plain else "kdcli"}
pipeline_tag: text-classification
tags: [knowledge-distillation, {method["name"]}]
---

# {record.get("name", "student")}

A smaller transformer for the task `{task["name"]}`, distilled with kdcli {record["versions"]["kdcli"]}.

- teacher: {record["teacher_origin"]}
- method: {method["name"]}, {method["title"]}
- student form: {record["student_form"]}{over}
- data: {task["source"]}, {task["sizes"]["train"]:,} training examples{copies}, protocol `{task["protocol"]}`

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

{method["paper"]}
"""


def _loading(auto: str, *, plain: bool) -> str:
    if plain:
        return (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f'model = {auto}.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        )
    task = {"AutoModel": ', task="base"', "AutoModelForMaskedLM": ', task="masked-lm"'}.get(auto, "")
    return (
        "import kdcli\nfrom transformers import PreTrainedTokenizerFast\n\n"
        f'model = kdcli.load_model("FOLDER"{task})  # low-rank weights: a plain loader refuses this folder\n'
        'tokenizer = PreTrainedTokenizerFast.from_pretrained("FOLDER")'
    )


def _general_card(record: dict[str, Any]) -> str:
    method, task, student, teacher = record["method"], record["task"], record["student"], record["teacher"]
    plain = record["student_form"] in ("depth", "width", "checkpoint")
    before, after = record["loss"]["before"], record["loss"]["after"]
    fell = f"\n- held-out loss of the distillation: {before:.4f} before, {after:.4f} after" if before else ""
    tuned = "".join(
        f"| {scores['metric']} ({scores['task']}) | {name} | {100 * value:.2f} | {len(scores['scores'][name])} |\n"
        for scores in record["finetune"]
        for name, value in scores["mean"].items()
    )
    table = f"\n| fine-tuned on | model | mean | seeds |\n| --- | --- | ---: | ---: |\n{tuned}" if tuned else ""
    auto = "AutoModelForMaskedLM" if record["student_head"] == "masked-lm" else "AutoModel"
    return f"""---
library_name: {"transformers" if plain else "kdcli"}
pipeline_tag: {"fill-mask" if auto == "AutoModelForMaskedLM" else "feature-extraction"}
tags: [knowledge-distillation, {method["name"]}]
---

# {record.get("name", "student")}

A smaller general transformer, distilled on plain text with kdcli {record["versions"]["kdcli"]}, to be fine-tuned.

- teacher: {record["teacher_origin"]}, {teacher["parameters"]:,} parameters
- student: {record["student_form"]}, {student["parameters"]:,} parameters
- method: {method["name"]}, {method["title"]}
- text: {task["source"]}, {task["sizes"]["train"]:,} documents{fell}
{table}
## Loading

```python
{_loading(auto, plain=plain)}
```

## Limits

The student inherits the teacher's biases and those of the text. Seed {record["seed"]} is one sample of the training's
randomness.

## Source

{method["paper"]}
"""
