"""The nine GLUE tasks: columns, labels, metrics and sets, as the hub's `nyu-mll/glue` has them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task. `report` maps a set's name in our reports to its name in the data."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    report: tuple[tuple[str, str], ...] = (("validation", "validation"),)


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = (("matched", "validation_matched"), ("mismatched", "validation_mismatched"))

GLUE = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("mcc",)),
        GlueTask("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        GlueTask("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        GlueTask("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            _MNLI,
        ),
        GlueTask("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
        GlueTask("rte", ("sentence1", "sentence2"), _ENTAILMENT, ("accuracy",)),
        GlueTask("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
    )
}

HUB = "nyu-mll/glue"
