"""What the training loop needs to know."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdcli.errors import InputError
from kdcli.machine import gpu_count
from kdcli.recipe.schema import FinetuneSection, Recipe, TrainSection
from kdcli.words import counted

SCALE = {"sharding", "gradient_checkpointing"}
"""Fields of `[train]` that say how a model of any size is trained, a teacher as well as a student."""


@dataclass(frozen=True)
class LoopSettings:
    """Everything the loop needs to know. What is None depends on the number of steps, which `fit` finds out.

    `batch_size` counts the examples of one optimizer step over all processes and accumulation steps, so that
    a recipe gives the same result on any number of devices. parts, mixing_temperature: those of the task.
    """

    batch_size: int
    precision: str
    device: str
    group_by_length: bool
    workers: int
    select: str
    seed: int
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 5e-5
    scheduler: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    betas: Sequence[float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1
    eval_every: int | None = None
    patience: int | None = None
    log_every: int | None = None
    metric: str = ""
    eval_batch_size: int = 64
    parts: Sequence[str] = ()
    mixing_temperature: float = 1.0
    chain_learning_rate: float | Literal["matched", "by-length"] = "by-length"
    sharding: str | None = None
    gradient_checkpointing: bool = False

    @property
    def adam(self) -> dict[str, Any]:
        """Return what AdamW takes for all parameters alike."""
        return {"betas": tuple(self.betas), "eps": self.epsilon}

    @classmethod
    def from_train(cls, recipe: Recipe, defaults: Mapping[str, Any]) -> "LoopSettings":
        """Return the loop of a recipe's `[train]`. defaults: the method's, for what the recipe leaves out."""
        given = {**defaults, **recipe.train.model_dump(exclude_none=True, exclude={"keep_checkpoints"})}
        if recipe.overparam is not None:
            given["chain_learning_rate"] = recipe.overparam.learning_rate
        return cls(**given, seed=recipe.seed, eval_batch_size=recipe.evaluate.batch_size)

    @classmethod
    def from_finetune(cls, section: FinetuneSection, train: TrainSection, *, seed: int) -> "LoopSettings":
        """Return the loop of a fine-tuning: where and how precisely as for the student, all else as `section` says.

        Its last weights are kept: a teacher is not chosen on the data that the student is scored on.
        """
        place = train.model_dump(include={"precision", "device", "group_by_length", "log_every", "workers"} | SCALE)
        own = section.model_dump(include=set(FinetuneSection.model_fields))
        return cls(**place, **own, select="last", seed=seed)

    def steps(self, examples: int) -> int:
        """Return the number of optimizer steps over `examples` training examples."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * math.ceil(examples / self.batch_size)))

    def chain_rate(self, length: int) -> float:
        """Return the learning rate of the tensors of a chain with `length` middle tensors.

        By length: one step on all of them moves the weight about 1.5 + 0.8 length times as far as a step on the
        weight itself. Matched: as the weight's, since every step is scaled afterwards.
        """
        if self.chain_learning_rate == "matched":
            return self.learning_rate
        if self.chain_learning_rate == "by-length":
            return self.learning_rate / (1.5 + 0.8 * length)
        return self.chain_learning_rate

    def log_interval(self, steps: int) -> int:
        """Return every how many steps of `steps` the loss terms are logged: 20 to 200 times, at best every 50."""
        return self.log_every or max(1, steps // 200, min(50, steps // 20))


def check_device(device: str) -> None:
    """Raise InputError for a device that is not there."""
    if device == "cuda" and not gpu_count():
        raise InputError(
            'train.device is "cuda" but PyTorch sees no GPU', where="train.device", hint='use device = "auto"'
        )


def check_batch(batch_size: int, parts: int, processes: int, where: str) -> int:
    """Return how many examples of a step each process takes at once, of `parts` a step.

    Raises InputError, at the field `where`, when the examples cannot be split evenly.
    """
    share, rest = divmod(batch_size, processes * parts)
    if rest or not share:
        raise InputError(
            f"{counted(batch_size, 'example')} cannot be split over {counted(processes, 'process', 'processes')} x "
            f"{counted(parts, 'accumulation step')}",
            where=where,
            hint=f"use a multiple of {processes * parts}",
        )
    return share
