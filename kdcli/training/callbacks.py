"""What the training loop does between its steps."""

import math
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kdcli.training.growing import GrowingChains
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller


class EvaluateAtEnd(TrainerCallback):
    """Evaluates the last step, too, when it falls between two evaluations."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class LogAtCheckpoints(TrainerCallback):
    """Logs wherever a checkpoint is written, the last step among them.

    A checkpoint holds nothing of the steps since the last log line: this way a resumed run logs what it would have
    logged in one go.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True


class GrowChains(TrainerCallback):
    """Puts the next chains in place after a step, before anything is logged, scored or written."""

    def __init__(
        self, growing: GrowingChains, distiller: Distiller, optimizer: torch.optim.Optimizer, loop: LoopSettings
    ) -> None:
        self.growing = growing
        self.distiller = distiller
        self.optimizer = optimizer
        self.loop = loop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.growing.grow(state.global_step, self.distiller, self.optimizer, self.loop)


class Patience(TrainerCallback):
    """Ends a training when so many evaluations in a row were no better than the best one before them.

    It counts in the history, which checkpoints keep: a resumed run ends where it would have ended in one go.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def is_over(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Return whether so many evaluations in the history of `state` brought nothing better."""
        metric, sign = f"eval_{args.metric_for_best_model}", 1 if args.greater_is_better else -1
        # Untrained weights do not count.
        scores = {e["step"]: sign * e[metric] for e in state.log_history if metric in e and e["step"] > 0}
        values = list(scores.values())
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_over(args, state):
            control.should_training_stop = True


class TellEpochs(TrainerCallback):
    """Tells the objectives, and a collator that cares, which epoch begins."""

    def __init__(self, distiller: Distiller, collator: Any) -> None:
        self.distiller = distiller
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run begins in the middle of an epoch.
        epoch = int((state.epoch or 0.0) + 1e-6)
        for objective in self.distiller.objectives.values():
            objective.begin_epoch(epoch, math.ceil(state.num_train_epochs))  # type: ignore[operator]
        if hasattr(self.collator, "begin_epoch"):
            self.collator.begin_epoch(epoch)
