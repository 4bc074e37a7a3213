"""The model card that a run writes beside its student."""

from typing import Any


def model_card(record: dict[str, Any]) -> str:
    """Return README.md of a student: where it comes from, what it scores, how to load it."""
    method, task, student, teacher = record["method"], record["task"], record["student"], record["teacher"]
    plain = record["student_form"] in ("depth", "width", "checkpoint")
    rows = "\n".join(
        f"| {metric} ({name}) | {100 * value:.2f} | {100 * student['metrics'][name][metric]:.2f} |"
        for name, metrics in teacher["metrics"].items()
        for metric, value in metrics.items()
    )
    over = "\n- over-parameterised while training (OPDF), contracted afterwards" if record["overparam"] else ""
    loading = (
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        'model = AutoModelForSequenceClassification.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
        if plain
        else "import kdcli\nfrom transformers import PreTrainedTokenizerFast\n\n"
        'model = kdcli.load_model("FOLDER")  # low-rank weights: a plain loader refuses this folder\n'
        'tokenizer = PreTrainedTokenizerFast.from_pretrained("FOLDER")'
    )
    retention = f"{record['retention']:.1%}" if record["retention"] is not None else "not defined"
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
- data: {task["source"]}, {task["sizes"]["train"]:,} training examples, protocol `{task["protocol"]}`

| | teacher | student |
| --- | ---: | ---: |
{rows}
| parameters | {teacher["parameters"]:,} | {student["parameters"]:,} |
| megabytes | {teacher["megabytes"]:.1f} | {student["megabytes"]:.1f} |

The student keeps {retention} of the teacher's {record["primary"]}.

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
