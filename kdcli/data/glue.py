"""The nine GLUE tasks: columns, labels, metrics and sets, as the hub's `nyu-mll/glue` has them."""

from collections.abc import Mapping
from functools import partial

from kdcli.data.sets import VALIDATION, NamedSet, read_set

HUB = "nyu-mll/glue"


def _row(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    report: Mapping[str, str] = VALIDATION,
) -> NamedSet:
    kind = "classification" if labels else "regression"
    fields = {"text": list(columns), **({"labels": list(labels)} if labels else {})}
    read = partial(read_set, name, f"glue/{name}", HUB, name, report)
    return NamedSet(name, kind, fields, metrics, f"GLUE {name}", read)


_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_MNLI = {"matched": "validation_matched", "mismatched": "validation_mismatched"}

GLUE = {
    row.name: row
    for row in (
        _row("cola", ("sentence",), ("unacceptable", "acceptable"), ("mcc",)),
        _row("sst2", ("sentence",), ("negative", "positive")),
        _row("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        _row("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        _row("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        _row("mnli", ("premise", "hypothesis"), _NLI, report=_MNLI),
        _row("qnli", ("question", "sentence"), _ENTAILMENT),
        _row("rte", ("sentence1", "sentence2"), _ENTAILMENT),
        _row("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
    )
}
