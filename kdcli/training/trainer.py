"""The training loop: the Hugging Face Trainer around a `Distiller`."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdcli.errors import RunError
from kdcli.faults import writing
from kdcli.files import write_json
from kdcli.interrupts import finishing
from kdcli.machine import computing_device, resolve_precision
from kdcli.manifest import MANIFEST, check_manifest, is_sealed, require, write_manifest
from kdcli.models.counts import count_parameters
from kdcli.models.finite import first_not_finite
from kdcli.models.overparam import overparam_state, set_chains
from kdcli.models.sharding import Shards, has_shards, shard, units_of
from kdcli.tasks.parts import sets_of
from kdcli.tensors.parametrization import is_overparameterised
from kdcli.tensors.sharded import whole
from kdcli.terminal import tell, warn
from kdcli.training.auxiliary import AUXILIARY, auxiliary_share
from kdcli.training.callbacks import EvaluateAtEnd, GrowChains, LogAtCheckpoints, Patience, TellEpochs
from kdcli.training.distributed import agree, main_does, rng_file, shards, wait_for_all
from kdcli.training.groups import MatchedSteps, parameter_groups
from kdcli.training.growing import GrowingChains
from kdcli.training.progress import ProgressDisplay
from kdcli.training.sampler import EpochSampler, sampler_of
from kdcli.training.schemes.base import Scheme
from kdcli.training.settings import LoopSettings, check_batch, check_device
from kdcli.training.shard_files import load_parts, optimizer_state_in_parts, whole_optimizer_state, whole_tensors
from kdcli.training.step import Distiller
from kdcli.training.token_weights import counts_of, scaled, weigh_equally
from kdcli.training.workers import WorkerCollator, raise_fault

WEIGHTS = "model.safetensors"


CHAINS = "chains.json"
"""Which matrices were chains when the weights beside it were written."""


SCHEME = "scheme.pt"


GROWTH = "growth.pt"


PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"


KEPT = 2
"""Checkpoints that stay: the newest, the best so far where it is needed, and else the one before the newest."""


class DistillationTrainer(Trainer):
    """The Trainer with our batches, our parameter groups, our checkpoints; the loop itself is untouched."""

    model: Distiller

    def __init__(
        self,
        *args: Any,
        settings: LoopSettings,
        scheme: Scheme,
        log_dir: Path | None,
        display: ProgressDisplay,
        identity: Any,
        growing: GrowingChains | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = settings
        self.growing = growing
        super().__init__(*args, **kwargs)
        self.identity = identity
        self.scheme = scheme
        self.remove_callback(PrinterCallback)
        self.add_callback(EvaluateAtEnd)
        self.add_callback(LogAtCheckpoints)
        self.add_callback(TellEpochs(self.model, self.data_collator))
        self.add_callback(display)
        if log_dir is not None and self.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            self.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(log_dir))))
        # Scores need no gold answers from the batch: the rows have them.
        self.label_names = ["index"]
        self._term_sums: dict[str, Tensor] = {}
        self._term_count = 0
        self._held_tokens: Tensor | None = None
        self._held_shares: list[np.ndarray] = []
        self._held_losses: list[Tensor] = []
        self._auxiliary: Tensor | None = None
        # The scheme comes first: a distiller may hold tensors of a teacher that learns, and must not get copies.
        self.scheme.place(self.args.device)
        self.model.place(self.args.device)
        self.shards: Shards | None = None
        if shards(settings.sharding):
            # The library's word for a model that is sharded already: it neither places it nor wraps it.
            self.is_distributed_loading_by_transformers = True
            self.model.student_capture.to_end = True
            # A chain loses too much in half precision.
            half = self.args.bf16 and not is_overparameterised(self.model.student)
            self.shards = shard(self.model, units_of(self.model.student), self.args.device, half=half)
        elif self.args.world_size > 1:
            # Several processes must know whose gradients to wait for; looking for those that will not come costs time
            # in every step.
            leaves_out = not scheme.steps_are_alike or bool(self._without_gradient())
            self.accelerator.ddp_handler.find_unused_parameters = leaves_out  # type: ignore[union-attr]

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # What is to be sharded may be larger than the device.
        if not shards(self.settings.sharding):
            super()._move_model_to_device(model, device)

    def _without_gradient(self) -> list[str]:
        """Return the parameters that get no gradient, as two rows of the training data show: the same in every step."""
        rows = [self.train_dataset[place] for place in range(min(2, len(self.train_dataset)))]  # type: ignore[arg-type, index]
        return self.model.without_gradient(self._prepare_inputs(self.data_collator(rows)))

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return sampler_of(dataset, self.settings)  # type: ignore[arg-type]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.settings, self.growing.lengths if self.growing else ())
            rate = self.settings.learning_rate
            self.optimizer = torch.optim.AdamW(groups, lr=rate, fused=True, **self.settings.adam)
            if self.settings.chain_learning_rate == "matched":
                MatchedSteps(self.model).attach(self.optimizer)
            if self.growing is not None:
                self.add_callback(GrowChains(self.growing, self.model, self.optimizer, self.settings))
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            raise_fault(batch)
        batches = self.scheme.batches(self.state.global_step, batches)
        if self.model.kind.tokens_weigh_equally:
            batches = weigh_equally([self._prepare_inputs(each) for each in batches], self._total, self.args.world_size)
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        raise_fault(inputs)
        return super()._prepare_inputs(inputs)

    def _total(self, counts: Tensor) -> Tensor:
        """Return the sum of `counts` over all processes."""
        return self.accelerator.reduce(counts, "sum")  # type: ignore[no-any-return, union-attr]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        assert self.optimizer is not None
        self.scheme.before_step(self.state.global_step, inputs, self.optimizer)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # type: ignore[union-attr]
            # All gradients of the step are there, and not clipped yet.
            if self._logs_next():
                self._auxiliary = auxiliary_share(self.model)
            if self.growing is not None:
                self.growing.measure()
        return loss

    def _logs_next(self) -> bool:
        """True when the step that is being made will be logged."""
        step, state = self.state.global_step + 1, self.state
        return step in (1, state.max_steps) or any(step % n == 0 for n in (state.logging_steps, state.save_steps))

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return whole(super()._clip_grad_norm(model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(inputs)
        for name, value in outputs.items():
            if name != "loss":
                self._term_sums[name] = self._term_sums.get(name, 0.0) + value  # type: ignore[operator]
        self._term_count += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        if self._held_tokens is not None:
            shares = torch.from_numpy(self._held_shares[len(self._held_losses)]).to(self.args.device)
            inputs = scaled(inputs, counts_of(inputs) * self._held_tokens, shares)
        with torch.no_grad():
            outputs = model(inputs)
        if "loss" in outputs:
            self._held_losses.append(outputs["loss"])
            return outputs["loss"], None, None
        return None, {name: output.float() for name, output in outputs.items()}, inputs["index"]  # type: ignore[return-value]

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: Any, *, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Return what the library does; where the loss is the score, that of each part of a task, and their mean."""
        evaluate: Any = self._evaluate_by_tokens if self.model.kind.tokens_weigh_equally else super().evaluation_loop
        evaluate = partial(evaluate, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.compute_metrics is not None or not self.settings.parts:
            return evaluate(dataloader)
        loss = f"{metric_key_prefix}_loss"
        found = [evaluate(self.get_eval_dataloader(part)) for part in sets_of(dataloader.dataset)]
        losses = [output.metrics[loss] for output in found]
        names = (f"{metric_key_prefix}_{name}_loss" for name in self.settings.parts)
        metrics = {**found[0].metrics, loss: mean(losses), **dict(zip(names, losses, strict=True))}
        return found[0]._replace(metrics=metrics, num_samples=sum(output.num_samples for output in found))

    def _evaluate_by_tokens(self, dataloader: Any, *, metric_key_prefix: str, **kwargs: Any) -> Any:
        """Return what the library does, with the loss as the mean over all tokens, not over batches."""
        batches = list(dataloader.batch_sampler)
        tokens, places = self.model.kind.token_counts(dataloader.dataset), np.concatenate(batches)
        # Rows that complete the last batches of several processes are there more than once.
        own = np.bincount(places, minlength=len(tokens)).astype(np.float64)
        times = self._total(torch.from_numpy(own).to(self.args.device)).cpu().numpy()
        self._held_shares = [1.0 / times[batch] for batch in batches]
        # The mean over all batches of all processes is then one over all tokens.
        total = torch.tensor(tokens.sum(0), dtype=torch.float64, device=self.args.device)
        self._held_tokens = len(batches) * self.args.world_size / total.clamp(min=1.0)
        self._held_losses = []
        try:
            output = super().evaluation_loop(dataloader, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._held_tokens = None
        loss = self._total(torch.stack(self._held_losses).mean()) / self.args.world_size
        assert output.metrics is not None
        return output._replace(metrics={**output.metrics, f"{metric_key_prefix}_loss": loss.item()})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The mean of the last steps, and at the end that of all.
        for name in ("loss", "train_loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise _diverged(f"the loss is {logs[name]} by step {self.state.global_step}")
        if "loss" in logs and self._term_sums:
            # The only place where the terms' values leave the device: once per logging interval.
            sums = torch.stack([total.float() for total in self._term_sums.values()])
            means = (self.accelerator.reduce(sums, "mean") / self._term_count).tolist()  # type: ignore[union-attr]
            logs.update(zip(self._term_sums, means, strict=True))
            self._term_sums, self._term_count = {}, 0
        if "loss" in logs and self._auxiliary is not None:
            logs[AUXILIARY], self._auxiliary = float(self._auxiliary), None
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        tensors = None if self.shards is None else whole_tensors(self.model, keep=self.args.should_save)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(self.model, folder, tensors)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.shards is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(optimizer_state_in_parts(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.checkpoint(self.state.global_step)
        with finishing(), writing(folder):
            main_does(lambda: remove_checkpoint(folder))
            super()._save_checkpoint(model, trial)
            if self.args.should_save and (state := self.scheme.state_dict()):
                torch.save(state, folder / SCHEME)
            if self.args.should_save and self.growing is not None:
                torch.save(self.growing.state_dict(), folder / GROWTH)
            # Every process has written its random state.
            wait_for_all()
            main_does(lambda: self._seal(folder))

    def _seal(self, folder: Path) -> None:
        write_manifest(folder, self.identity)
        # The library would remove old checkpoints before this one is whole.
        needed = {self.state.global_step}
        if self.args.load_best_model_at_end and self.state.best_global_step:
            needed.add(self.state.best_global_step)
        older = [step for step in reversed(steps_of_checkpoints(folder.parent)) if step not in needed]
        for step in older[max(0, KEPT - len(needed)) :]:
            remove_checkpoint(self.checkpoint(step))

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return Path(self.args.output_dir or ".") / f"{PREFIX}{step}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_weights(self.model, folder)
        if (folder / SCHEME).exists():
            self.scheme.load_state_dict(torch.load(folder / SCHEME, map_location=self.args.device, weights_only=True))
        if self.growing is not None:
            self.growing.load_state_dict(torch.load(folder / GROWTH, weights_only=True))

    def was_finished(self, checkpoint: Path) -> bool:
        """Return whether `checkpoint` was the last of its training, and take over how that ended if so.

        The library would make one step more.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        patience = [callback for callback in self.callback_handler.callbacks if isinstance(callback, Patience)]
        if state.global_step < self.args.max_steps and not any(one.is_over(self.args, state) for one in patience):
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end and state.best_global_step:
            self._load_best_model()
        return True

    def _load_best_model(self) -> None:
        assert self.state.best_global_step is not None
        folder = self.checkpoint(self.state.best_global_step)
        require(folder, self.identity, hint="go on with --resume: it trains from what is whole")
        load_weights(self.model, folder)


def _diverged(seen: str) -> RunError:
    return RunError(f"training has diverged: {seen}", hint='lower the learning rate, or set train.precision = "fp32"')


def save_weights(distiller: Distiller, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write what `load_weights` reads: all weights, and which matrices of the student are chains.

    tensors: the whole ones of a sharded distiller.
    """
    if tensors is None:
        safetensors.torch.save_model(distiller, str(folder / WEIGHTS))
    else:
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
    write_json(folder / CHAINS, overparam_state(distiller.student))


def load_weights(distiller: Distiller, folder: Path) -> None:
    """Load the weights of a folder into `distiller`, every key or none; its student gets the chains that it had."""
    if has_shards(distiller):
        load_parts(distiller, folder / WEIGHTS)
        return
    if (path := folder / CHAINS).exists():
        set_chains(distiller.student, json.loads(path.read_text(encoding="utf-8")))
    device = next(distiller.parameters()).device
    safetensors.torch.load_model(distiller, folder / WEIGHTS, strict=True, device=str(device))


def steps_of_checkpoints(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in `folder`, whole or not, in their order."""
    numbers = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdecimal())


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; one that is killed on the way leaves a folder that is no checkpoint."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def last_usable_checkpoint(folder: Path, identity: Any, console: Console, *, needs_best: bool = False) -> Path | None:
    """Return the newest checkpoint of the training `identity` that is whole, and remove all newer and incomplete ones.

    What a killed process left is removed silently; of what was damaged later, or belongs to another training, the
    console is told. needs_best: the best checkpoint that it refers to must be whole, too.
    """
    told = False
    for step in steps_of_checkpoints(folder):
        if not is_sealed(folder / f"{PREFIX}{step}"):
            remove_checkpoint(folder / f"{PREFIX}{step}")
    for step in reversed(steps_of_checkpoints(folder)):
        path = folder / f"{PREFIX}{step}"
        problem = check_manifest(path, identity)
        if problem is None and needs_best:
            best = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME)).best_global_step
            beside = folder / f"{PREFIX}{best}"
            if best and best != step and (wrong := check_manifest(beside, identity)) is not None:
                problem = f"its best checkpoint, {beside.name}, is not whole: {wrong}"
        if problem is None:
            if told:
                tell(console, f"going on from {path}")
            return path
        warn(console, f"{path} cannot be used: {problem}")
        told = True
        remove_checkpoint(path)
    if told:
        tell(console, f"no usable checkpoint in {folder}: this training starts again")
    return None


def fit(
    distiller: Distiller,
    *,
    train: Dataset,
    selection: Dataset | None,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    metrics: Callable[[dict[str, np.ndarray]], dict[str, float]] | None,
    settings: LoopSettings,
    folder: Path,
    log_dir: Path | None,
    title: str,
    console: Console,
    identity: Any = None,
    scheme: Scheme | None = None,
    growing: GrowingChains | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train `distiller` in place and return what happened: steps, seconds, history, best score.

    train, selection: encoded data sets. metrics: from the outputs for `selection` to named scores; None scores by the
    loss on it. Checkpoints go to `folder`; with `resume`, training goes on from the newest one that is whole and was
    written under the same `identity` (plain values that say which training this is); else old ones are removed.
    scheme: begun already. growing: puts chains in place of the student's matrices as it trains, in one process only.
    Raises InputError when the batch cannot be split over the processes, and RunError when training diverges.
    """
    arguments = _arguments(settings, folder, len(train), evaluates=selection is not None, by_loss=metrics is None)
    display = ProgressDisplay(console, title, settings.batch_size)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        assert metrics is not None
        outputs: Any = prediction.predictions
        if not all(np.isfinite(output).all() for output in outputs.values()):
            raise _diverged("the student's logits contain NaN or inf")
        return metrics(outputs)

    trainer = DistillationTrainer(
        model=distiller,
        args=arguments,
        train_dataset=train,
        eval_dataset=selection,
        data_collator=WorkerCollator(collator) if settings.workers else collator,
        compute_metrics=compute_metrics if metrics is not None else None,
        settings=settings,
        scheme=scheme or Scheme(),
        log_dir=log_dir,
        display=display,
        identity=identity,
        growing=growing,
    )
    if settings.patience is not None and selection is not None:
        trainer.add_callback(Patience(settings.patience))
    found: list[Path | None] = []

    def prepare() -> None:
        if not resume:
            for step in steps_of_checkpoints(folder):
                remove_checkpoint(folder / f"{PREFIX}{step}")
        needs_best = bool(arguments.load_best_model_at_end)
        found.append(last_usable_checkpoint(folder, identity, console, needs_best=needs_best))

    main_does(prepare)
    checkpoint = agree(found[0] if found else None)
    if checkpoint is not None:
        # Its history begins with that already.
        trainer.args.eval_on_start = False
    if checkpoint is not None and not (checkpoint / rng_file()).exists():
        warn(console, f"{checkpoint} was written by another number of processes: random numbers (dropout) differ")
    distiller.student.train()
    if settings.gradient_checkpointing:
        distiller.student.gradient_checkpointing_enable({"use_reentrant": False})
    if process := trainer.args.process_index:
        # The library seeds all processes alike: rows in the same place of two shares would get the same dropout.
        torch.manual_seed(settings.seed + 1_000_003 * process)
    seconds = 0.0
    try:
        if checkpoint is None or not trainer.was_finished(checkpoint):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            seconds = float(outcome.metrics.get("train_runtime", 0.0))
        if trainer.shards is not None:
            trainer.shards.end(gather=True)
    except BaseException:
        if trainer.shards is not None:
            trainer.shards.end(gather=False)
        raise
    finally:
        display.close()
        distiller.close()
        if settings.gradient_checkpointing:
            distiller.student.gradient_checkpointing_disable()
    if (name := first_not_finite(distiller)) is not None:
        raise _diverged(f"{name} contains NaN or inf after the last step")
    history = [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "total_flos"))}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "best": trainer.state.best_metric,
        "best_step": trainer.state.best_global_step,
        "precision": resolve_precision(settings.precision, settings.device),
        "parameters": count_parameters(distiller, trainable_only=True),
        "history": history,
    }


def _arguments(
    settings: LoopSettings, folder: Path, examples: int, *, evaluates: bool, by_loss: bool
) -> TrainingArguments:
    check_device(settings.device)
    use_cpu = computing_device(settings.device) == "cpu"
    steps = settings.steps(examples)
    every = settings.eval_every or max(1, math.ceil(examples / settings.batch_size))
    every = min(every, steps)
    strategy = "steps" if evaluates else "no"
    world = TrainingArguments(output_dir=str(folder), use_cpu=use_cpu).world_size
    share = check_batch(settings.batch_size, settings.gradient_accumulation, world, "train.batch_size")
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=use_cpu,
        max_steps=steps,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler if settings.scheduler != "constant" else "constant_with_warmup",
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=resolve_precision(settings.precision, settings.device) == "bf16",
        eval_strategy=strategy,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=evaluates and settings.select == "best",
        metric_for_best_model=("loss" if by_loss else settings.metric) if evaluates else None,
        greater_is_better=not by_loss,
        # What a loss fell to says little without what it fell from.
        eval_on_start=evaluates and by_loss,
        logging_steps=settings.log_interval(steps),
        logging_first_step=True,
        # The filter looks at every step's loss on the host: a synchronisation a step.
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=settings.workers,
        dataloader_pin_memory=not use_cpu,
        # From pinned memory, so that a batch's copy to a GPU does not hold up the host.
        accelerator_config={"non_blocking": not use_cpu},
        seed=settings.seed,
        log_level="error",
        label_names=["index"],
    )
    # One process trains on one GPU: with more of them in sight the library would split (and multiply) the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
