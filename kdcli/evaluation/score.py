"""Scores and sizes of a model."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kdcli.data.rows import array_of
from kdcli.evaluation.result import Side
from kdcli.models.counts import count_parameters
from kdcli.models.save import stored_type
from kdcli.tasks.base import Task
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.metrics import compute_metrics
from kdcli.tasks.predict import predict


def evaluate_model(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    batch_size: int = 64,
    max_length: int = 128,
    ask: Callable[..., Any] = predict,
    owner: str = "the model",
    device: str = "auto",
) -> dict[str, dict[str, float]]:
    """Return {report set: {metric: value}} of a PyTorch model or an `OnnxModel`; its classes in the task's order.

    ask: called as `predict` is, and returns what it does; the way to answers that are there already. owner, device: as
    in `predict`.
    Raises NotFiniteError when its logits contain NaN or inf.
    """
    collator = Collator(tokenizer)
    scores = {}
    for name, rows in task.report.items():
        encoded = encode(rows, tokenizer, max_length)
        logits = np.asarray(ask(model, encoded, collator, batch_size=batch_size, owner=owner, device=device))
        scores[name] = compute_metrics(task.metrics, logits, array_of(rows, "label"))
    return scores


def primary_score(scores: dict[str, dict[str, float]], primary: str) -> float:
    """Return the first metric, mean over report sets (MNLI: matched and mismatched)."""
    return float(np.mean([values[primary] for values in scores.values()]))


def describe_model(model: Any, task: Task | None = None, metrics: dict[str, dict[str, float]] | None = None) -> Side:
    """Return a model's sizes and, where it was scored on a task, its scores."""
    parameters = count_parameters(model)
    megabytes = round(parameters * stored_type(model).itemsize / 1e6, 3)
    if task is None or metrics is None:
        return Side(parameters, megabytes, {}, None)
    return Side(parameters, megabytes, metrics, primary_score(metrics, task.primary))
