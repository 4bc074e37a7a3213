"""Fine-tuning a model on a task's gold labels, or on masked tokens."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdcli.models.blocks import body_of
from kdcli.models.heads import head_parameters
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
    head_only: bool = False,
) -> dict[str, Any]:
    """Train `model` on the gold answers (labels, or masked tokens) of `task`, in place, and return the loop's record.

    identity: says which training its checkpoints belong to.
    train: where and how precisely, as for the student; batch size, rate and the like come from `settings`.
    log: a folder for TensorBoard. head_only: the weights of the body stay as they are, and nothing in it is dropped
    out.
    """
    from kdcli.training.trainer import fit

    encoded = task.kind.prepare(task, processor, max_length, seed=seed)
    with _frozen_body(model) if head_only else nullcontext():
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


@contextmanager
def _frozen_body(model: "PreTrainedModel") -> Iterator[None]:
    """Within this block only the head of `model` has gradients, and its body stays in eval mode."""
    body, head = body_of(model), {id(parameter) for parameter in head_parameters(model)}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in head]
    for parameter in frozen:
        parameter.requires_grad_(False)
    body.eval()
    # Whoever trains the whole says so to each of its parts.
    body.train = lambda mode=True: body  # type: ignore[assignment, method-assign, misc]
    try:
        yield
    finally:
        del body.train
        for parameter in frozen:
            parameter.requires_grad_(True)
