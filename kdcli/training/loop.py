"""What the training loop needs to know."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LoopSettings:
    """Everything the loop needs to know, resolved: no None stands for a default any more.

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
    log_every: int
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
