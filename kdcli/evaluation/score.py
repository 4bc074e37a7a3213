"""Scores and sizes of a model."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.data.rows import array_of
from kdcli.evaluation.result import Side
from kdcli.models.counts import count_parameters
from kdcli.models.save import stored_type
from kdcli.tasks.base import Task
from kdcli.tasks.by_class import ByClass, ClassScores
from kdcli.tasks.parts import pairs_of
from kdcli.tasks.predict import predict

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console


def evaluate_model(
    model: Any,
    processor: Any,
    task: Task,
    *,
    batch_size: int = 64,
    max_length: int = 128,
    ask: Callable[..., Any] = predict,
    owner: str = "the model",
    device: str = "auto",
    generate: Callable[..., list[list[int]]] | None = None,
    console: "Console | None" = None,
    by_class: ByClass | None = None,
) -> dict[str, dict[str, float]]:
    """Return {report set: {metric: value}} of a PyTorch model or an `OnnxModel`, its outputs in the task's order.

    ask: called as `predict` is, and returns what it does; the way to outputs that are there already. owner, device: as
    in `predict`. generate: the same for texts that a model writes, as in `TaskKind.evaluate`.
    console: is told of progress, where answers take long. by_class: takes the scores of each class, if it has any.
    Raises NotFiniteError when its outputs contain NaN or inf.
    """
    found = {}
    for name, rows in task.report.items():
        each: dict[str, ClassScores] = {}
        found[name] = task.kind.evaluate(
            model,
            rows,
            processor,
            task.label_names,
            task.metrics,
            max_length=max_length,
            ask=ask,
            batch_size=batch_size,
            owner=owner,
            device=device,
            generate=generate,
            console=console,
            by_class=each,
        )
        if each and by_class is not None:
            by_class[name] = each
    return found


def calibrate(model: Any, processor: Any, task: Task, *, owner: str, **options: Any) -> dict[str, Any]:
    """Decide on training rows set aside what a kind of task decides about a trained model, such as thresholds.

    The settings are put into the model's configuration, and returned. options: max_length, batch_size and device, as
    in `evaluate_model`.
    """
    if task.calibration is None:
        return {}
    settings = task.kind.calibrate(model, task.calibration, processor, ask=predict, owner=owner, **options)
    model.config.update(settings)
    return settings


def scorer(task: Task, features: "Dataset") -> Callable[[dict[str, np.ndarray]], dict[str, float]]:
    """Return the function from a model's outputs for the selection rows to the task's metrics: of parts, their mean.

    features: those rows, encoded. Where each token has a row of its own, the outputs are padded to one length.
    """
    lengths = array_of(features, "length")
    parts = list(pairs_of(features, task.selection))

    def score(outputs: dict[str, np.ndarray]) -> dict[str, float]:
        found: Any = outputs
        if task.kind.head.per_token:
            found = {
                name: [row[:length] for row, length in zip(rows, lengths, strict=True)]
                for name, rows in outputs.items()
            }
        scores = []
        for places, own, rows in parts:
            outputs_of_part = {name: _taken(values, places) for name, values in found.items()}
            answers = task.kind.decode(outputs_of_part, own, rows)
            scores.append(task.kind.score(answers, rows, task.label_names, task.metrics))
        # A kind may give more beside one of them.
        return {name: float(np.mean([values[name] for values in scores])) for name in task.metrics}

    return score


def _taken(values: Any, places: np.ndarray) -> Any:
    return [values[place] for place in places] if isinstance(values, list) else values[places]


def primary_score(scores: dict[str, dict[str, float]], primary: str) -> float:
    """Return the first metric, mean over report sets (MNLI: matched and mismatched)."""
    return float(np.mean([values[primary] for values in scores.values()]))


def describe_model(
    model: Any,
    task: Task | None = None,
    metrics: dict[str, dict[str, float]] | None = None,
    by_class: ByClass | None = None,
) -> Side:
    """Return a model's sizes and, where it was scored on a task, its scores."""
    parameters = count_parameters(model)
    megabytes = round(parameters * stored_type(model).itemsize / 1e6, 3)
    if task is None or metrics is None:
        return Side(parameters, megabytes, {}, None)
    return Side(parameters, megabytes, metrics, primary_score(metrics, task.primary), by_class or {})
