"""What a user sees while a model trains: a live bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdcli.terminal import tell

_HIDDEN = {"epoch", "grad_norm", "learning_rate", "step", "total_flos", "train_loss", "train_runtime"}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class ProgressDisplay(TrainerCallback):
    """Shows loss terms, examples per second and the time left, on stderr."""

    def __init__(self, console: Console, title: str, batch_size: int) -> None:
        self.console = console
        self.title = title
        self.batch_size = batch_size
        self.bar: Progress | None = None
        self.begun = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun, self.first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[terms]}", markup=False),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, terms="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = {k: v for k, v in logs.items() if k not in _HIDDEN and isinstance(v, int | float)}
        evaluated = {
            k.removeprefix("eval_"): v
            for k, v in shown.items()
            if k.startswith("eval_") and not k.endswith(("_runtime", "_per_second"))
        }
        done = state.global_step - self.first_step
        elapsed = time.perf_counter() - self.begun
        speed = done * self.batch_size / elapsed if elapsed > 0 else 0.0
        left = (state.max_steps - state.global_step) * elapsed / done if done else 0.0
        if evaluated:
            text = "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items())
            tell(self.console, f"{self.title}  step {state.global_step}  evaluated: {text}")
        elif "loss" in shown:
            terms = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            if self.bar is not None:
                self.bar.update(self.task, terms=f"{terms}  {speed:.0f} ex/s")
            else:
                tell(
                    self.console,
                    f"{self.title}  step {state.global_step}/{state.max_steps}  {terms}  "
                    f"{speed:.0f} examples/s  {_clock(left)} left",
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away, and give the cursor back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
