"""What the training loop needs to know."""

import math
from dataclasses import dataclass

from kdcli.errors import InputError
from kdcli.machine import gpu_count
from kdcli.words import counted


@dataclass(frozen=True)
class LoopSettings:
    """Everything the loop needs to know. What is None depends on the number of steps, which `fit` finds out.

    `batch_size` counts the examples of one optimizer step over all processes and accumulation steps, so that
    a recipe gives the same result on any number of devices.
    """

    epochs: float
    max_steps: int | None
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    scheduler: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    precision: str
    device: str
    group_by_length: bool
    eval_every: int | None
    patience: int | None
    select: str
    log_every: int | None
    workers: int
    seed: int
    metric: str
    eval_batch_size: int = 64
    chain_learning_rate: float | None = None

    def steps(self, examples: int) -> int:
        """Return the number of optimizer steps over `examples` training examples."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * math.ceil(examples / self.batch_size)))

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
