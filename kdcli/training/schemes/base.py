"""How a training step runs: the standard way, and what a method may do differently."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor

from kdcli.tasks.encode import longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.recipe.schema import OverparamSection
    from kdcli.signals import MatrixKey
    from kdcli.tasks.base import Task
    from kdcli.training.settings import LoopSettings
    from kdcli.training.teacher_cache import KnownOutputs


@dataclass(frozen=True)
class Setting:
    """What a scheme may know of a stage: both models, the data, and the loop.

    `teacher` is None for a black box without a model here. `train` holds the encoded rows; `base` is the folder
    that relative paths start from. `overparam` is set where the student's matrices are chains; `pairs` are (student
    block, teacher block), from 1. `start` is what the teacher was before its fine-tuning, where a method starts from
    that.
    """

    student: "PreTrainedModel"
    teacher: "PreTrainedModel | None"
    processor: Any
    task: "Task"
    train: Dataset
    collator: Any
    loop: "LoopSettings"
    base: Path
    cache: bool
    console: Console
    overparam: "OverparamSection | None" = None
    pairs: tuple[tuple[int, int], ...] = ()
    start: "PreTrainedModel | None" = None

    @property
    def max_length(self) -> int:
        """The most tokens of a row."""
        return longest_input(self.processor, self.task.description.get("max_length", 128))


class Scheme:
    """How a training step runs. This one is the standard: both models once forward, the student once backward.

    A published method that changes the loop itself overrides the parts that it changes. `check` is called when the
    recipe is planned, `begin` before the optimizer is made, `batches` before every optimizer step, `before_step` before
    every forward pass of the student in training, and `end` when the stage is over. What `state_dict` returns is kept
    in every checkpoint.
    """

    teacher_is_fixed = True
    """False when the teacher learns: none of its outputs may be cached."""
    runs_teacher = True
    """False when no teacher runs beside the student, so that there is nothing for other terms to compare it with."""
    unkept: str | None = None
    """Why the states inside its teacher cannot be kept; None where they can."""
    changes_batches = False
    """True when `batches` gives others: nothing the teacher says about the training rows may be cached."""
    steps_are_alike = True
    """False when it changes from step to step which of the student's parameters get a gradient."""

    works_sharded = False
    """True where it looks at no weights of the student, and leaves which blocks run as it is."""
    keeps_parameters = False
    """True when it remembers which parameters the student has: these must stay the same until it ends."""

    def check(
        self,
        loop: "LoopSettings",
        student: "PreTrainedModel",
        teacher: "PreTrainedModel | None",
        examples: int,
    ) -> None:
        """Raise InputError for what this scheme cannot work with: a loop, the models' shapes, too few `examples`."""

    def notes(self, features: Callable[[], Dataset], max_length: int) -> list[str]:
        """Return what a plan says of this scheme. features: gives the encoded training rows, of at most max_length."""
        return []

    def begin(self, setting: Setting) -> Dataset:
        """Get ready, and return the rows to train on. Raises InputError where `check` does."""
        self.check(setting.loop, setting.student, setting.teacher, len(setting.train))
        self.setting = setting
        if setting.teacher is not None and self.teacher_is_fixed:
            setting.teacher.eval().requires_grad_(False)
        return setting.train

    def teacher(self) -> "PreTrainedModel | None":
        """Return the model that the objectives compare the student with."""
        return self.setting.teacher

    def teacher_outputs(self) -> "KnownOutputs | None":
        """Return the teacher's outputs for all rows, when they do not come from its forward pass."""
        return None

    def teacher_tensors(self) -> "dict[MatrixKey, tuple[Tensor, ...]]":
        """Return the chains of a teacher that learns, by the student's matrices, in place of the given teacher's."""
        return {}

    def place(self, device: torch.device) -> None:
        """Move what the scheme holds to the device that trains."""

    def batches(self, step: int, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return this process's micro-batches of optimizer step `step` (from 0), in place of those of the data set."""
        return batches

    def before_step(self, step: int, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Do what comes before optimizer step `step` (from 0) on `batch`."""

    def end(self) -> None:
        """Leave both models as plain models."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights; tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
