"""Fine-tuning a model on a task's gold labels, or on masked tokens."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.term import Term
from kdcli.recipe.schema import FinetuneSection, TrainSection
from kdcli.tasks.base import Task
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finetune(
    model: "PreTrainedModel",
    processor: Any,
    task: Task,
    settings: FinetuneSection,
    train: TrainSection,
    *,
    max_length: int,
    seed: int,
    work: Path,
    console: Console,
    resume: bool,
    title: str,
    identity: Any,
    log: Path | None = None,
) -> dict[str, Any]:
    """Train `model` on the gold answers (labels, or masked tokens) of `task`, in place, and return the loop's record.

    identity: says which training its checkpoints belong to.
    train: where and how precisely, as for the student; batch size, rate and the like come from `settings`.
    log: a folder for TensorBoard.
    """
    from kdcli.training.trainer import fit

    encoded = task.kind.prepare(task, processor, max_length, seed=seed)
    return fit(
        Distiller(model, [Term("task", GoldObjective(task.kind.distribution))], kind=task.kind),
        train=encoded.train,
        selection=None,
        collator=encoded.collator,
        metrics=None,
        settings=replace(
            LoopSettings.from_finetune(settings, train, seed=seed),
            metric=task.primary,
            mixing_temperature=task.mixing_temperature,
        ),
        folder=work,
        log_dir=log,
        title=title,
        console=console,
        identity=identity,
        resume=resume,
    )
