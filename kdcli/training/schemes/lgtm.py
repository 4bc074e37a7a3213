"""A teacher that learns to teach: it follows its influence on what the student has not seen (LGTM)."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adamw import adamw

from kdcli.data.rows import array_of
from kdcli.errors import InputError
from kdcli.machine import resolve_precision
from kdcli.models.classes import classifier_names, classifiers
from kdcli.models.inputs import model_inputs
from kdcli.models.overparam import linears_of, overparameterise
from kdcli.objectives.gold import gold_loss
from kdcli.objectives.output import output_loss
from kdcli.signals import MatrixKey, Prediction, part_heads
from kdcli.tensors.parametrization import chain_of, tensors_of
from kdcli.terminal import tell
from kdcli.training.distributed import state
from kdcli.training.groups import MatchedSteps, parameter_groups
from kdcli.training.sampler import sampler_of
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind
    from kdcli.training.settings import LoopSettings

REACH = 0.01
"""How far the student's weights are moved to and fro for a finite difference, as a Euclidean length."""


@dataclass(frozen=True)
class Learning:
    """What the student and the teacher learn, and how.

    kind: of the task. alpha_student, alpha_teacher: the share of the other model's prediction in each one's loss,
    the rest is the gold label's. learning_rate: the teacher's, at its highest. influence: False for a teacher
    that follows labels and student only (ProKT). held_out: the share of the training rows to measure it on.
    zero_classifiers: start both models with logits of zero.
    """

    kind: "TaskKind"
    alpha_student: float = 1.0
    alpha_teacher: float = 0.4
    temperature: float = 1.0
    learning_rate: float = 3e-5
    influence: bool = True
    held_out: float = 0.05
    zero_classifiers: bool = False

    def agreement(self, own: list[Prediction], other: list[Prediction]) -> Tensor:
        """Return the divergence from the other's predictions at the temperature, without T^2."""
        return output_loss(own, other, self.kind.distribution, self.temperature, scale=False)

    def gold(self, own: list[Prediction]) -> Tensor:
        """Return the loss of the gold labels."""
        return gold_loss(own, self.kind.distribution)

    def loss(self, own: list[Prediction], other: list[Prediction], alpha: float) -> Tensor:
        """Return alpha times the agreement with the other's predictions, and 1 - alpha times the gold labels' loss."""
        return alpha * self.agreement(own, other) + (1.0 - alpha) * self.gold(own)

    def student_loss(self, own: list[Prediction], other: list[Prediction]) -> Tensor:
        """Return the loss of the student's step: where it has two heads, each learns as it does there."""
        part_heads(own, gold=self.alpha_student < 1.0, teacher=self.alpha_student > 0.0)
        return self.loss(own, other, self.alpha_student)


class LGTMScheme(Scheme):
    """Before each step of the student, the teacher makes one: towards labels, student, and being useful.

    Its gradient on a batch x, with a batch h of held-out training rows, is g_T - eta_T I (Ren et al. 2023, eq. 5):
    g_T is that of its own loss; I = alpha_T d/d theta_T of (d KL(student || teacher) / d theta_S) v, by a finite
    difference on x; v is the gradient of the task's loss on h for the student as it would be after its next
    optimizer step. A teacher that moves along I pulls the student's next gradient towards v.

    What trains is a copy: the given teacher stays what is reported, saved and cached. It starts as given, or from
    what that was before its fine-tuning (`Setting.start`), as the paper's does, with zero classifiers. Under
    OPDF the copy trains as chains, too, and the auxiliary loss follows them as they move; that loss
    has no part in the look ahead. Source: Ren et al. 2023, algorithm 1; released code draws h from the
    validation set, this takes it from the training set, which gets smaller by it.
    """

    teacher_is_fixed = False
    keeps_parameters = True
    unkept = "its teacher learns, so that its states change from step to step"

    def __init__(self, learning: Learning) -> None:
        self.learning = learning
        self._teacher: PreTrainedModel | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.held: HeldOut | None = None
        self._trained: dict[str, nn.Parameter] | None = None

    def check(
        self,
        loop: "LoopSettings",
        student: "PreTrainedModel",
        teacher: "PreTrainedModel | None",
        examples: int,
    ) -> None:
        """Raise InputError without a teacher model, with gradient accumulation, or where no row can be held out."""
        if teacher is None:
            raise InputError("lgtm trains the teacher, so it needs the model", where="teacher.model")
        if loop.gradient_accumulation != 1:
            raise InputError(
                "lgtm looks one whole optimizer step ahead, so a step cannot be made of several parts",
                where="train.gradient_accumulation",
                hint="use 1, with a smaller train.batch_size if memory is short",
            )
        if self.learning.zero_classifiers:
            for model in (student, teacher):
                if not classifier_names(model):
                    raise InputError(
                        f"{type(model).__name__} has no linear classifier at its end",
                        where="method.zero_classifiers",
                        hint="leave it out",
                    )
        if self.learning.influence and examples < 2:
            raise InputError(
                f"of {counted(examples, 'training row')} none can be held out",
                where="task.train_samples",
                hint="use 2 or more",
            )

    def begin(self, setting: Setting) -> Dataset:
        """Copy the teacher, and return the rows without those that are held out.

        Raises InputError where `check` does.
        """
        rows = super().begin(setting)
        assert setting.teacher is not None
        self.steps = setting.loop.steps(len(rows))
        start = setting.teacher if setting.start is None else setting.start
        self._teacher = copy.deepcopy(start).eval().requires_grad_(True)
        if self.learning.zero_classifiers:
            for model in (setting.student, self._teacher):
                for classifier in classifiers(model):
                    for parameter in classifier.parameters():
                        nn.init.zeros_(parameter)
        self._trained = None
        if setting.overparam is not None:
            # Every block of the teacher can be some student block's pattern, whichever of these are chains. What the
            # student freezes, the teacher does not.
            every = {"layers": None, "train": "all", "select": "all", "matrices": None}
            overparameterise(self._teacher, setting.overparam.model_copy(update=every))
        if not self.learning.influence:
            return rows
        kept, held = split(rows, self.learning.held_out, seed=setting.loop.seed)
        self.held = HeldOut(held, setting)
        tell(
            setting.console,
            f"lgtm: {len(held):,} of {len(rows):,} training rows are held out to measure the teacher on",
        )
        return kept

    def teacher(self) -> "PreTrainedModel":
        """Return the teacher that learns; the given one once the stage is over."""
        return self._teacher or self.setting.teacher  # type: ignore[return-value]

    def teacher_tensors(self) -> dict[MatrixKey, tuple[Tensor, ...]]:
        """Return the tensors of the teacher's chains beside the student's of the same kind; they move as it learns."""
        blocks, theirs = dict(self.setting.pairs), dict(linears_of(self.teacher()))
        found: dict[MatrixKey, tuple[Tensor, ...]] = {}
        for (layer, name), linear in linears_of(self.setting.student):
            own, matched = chain_of(linear), theirs.get((blocks.get(layer, 0), name))
            other = chain_of(matched) if matched is not None else None
            if own is not None and other is not None and own.shape == other.shape:
                assert matched is not None
                found[(layer, name)] = tensors_of(matched)
        return found

    def place(self, device: torch.device) -> None:
        """Move the teacher to the device that trains, and make its optimizer there."""
        loop = self.setting.loop
        teacher = self.teacher().to(device)  # type: ignore[arg-type]
        rate = self.learning.learning_rate
        # As in the student: one step moves the weight behind a chain further than a weight itself.
        groups = parameter_groups(teacher, loop)
        for group in groups:
            group["scale"] = group.get("lr", loop.learning_rate) / loop.learning_rate
            group["weight_decay"] = 0.0
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0, fused=True, **loop.adam)
        if loop.chain_learning_rate == "matched":
            MatchedSteps(teacher).attach(self.optimizer)
        self._device = device
        self._half = resolve_precision(loop.precision, loop.device) == "bf16"

    def teacher_rate(self, step: int) -> float:
        """Return the teacher's learning rate in optimizer step `step` (from 0): up over the warm-up, then down to 0."""
        warmup = int(self.setting.loop.warmup * self.steps)
        share = step / warmup if step < warmup else (self.steps - step) / max(1, self.steps - warmup)
        return self.learning.learning_rate * max(0.0, share)

    def before_step(self, step: int, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Make the teacher's step on `batch`; the student and its optimizer stay as they are, bit by bit."""
        assert self.optimizer is not None
        student, teacher, learning = self.setting.student, self.teacher(), self.learning
        rate = self.teacher_rate(step)
        # Only what the student learns from, which the look ahead needs, is formed with dropout.
        student.train(learning.influence)
        teacher.train()
        with self._autocast():
            taught = learning.kind.predictions(teacher(**model_inputs(teacher, batch)), batch)
            with torch.set_grad_enabled(learning.influence):
                learned = learning.kind.predictions(student(**model_inputs(student, batch)), batch)
        learning.loss(taught, learned, learning.alpha_teacher).backward()
        if learning.influence:
            direction = self.direction(learning.student_loss(learned, taught), step, optimizer)
            self.add_influence(batch, self.trained(optimizer), direction, -rate)
        parameters = [parameter for parameter in teacher.parameters() if parameter.grad is not None]
        average([parameter.grad for parameter in parameters])
        nn.utils.clip_grad_norm_(parameters, self.setting.loop.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        teacher.eval()
        student.train()

    def trained(self, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
        """Return the student's parameters that the optimizer trains, by name: for a chain, its tensors."""
        if self._trained is None:
            ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            named = self.setting.student.named_parameters()
            self._trained = {name: parameter for name, parameter in named if id(parameter) in ours}
        return self._trained

    def direction(self, loss: Tensor, step: int, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return v: the gradient of the held-out loss where a step with the gradient of `loss` would lead.

        One tensor for each of the trained parameters, the same in every process. In eval mode: what counts is the
        student as it will be used.
        """
        assert self.held is not None
        student, trained = self.setting.student, self.trained(optimizer)
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        average([gradient for gradient in gradients if gradient is not None])
        limit = self.setting.loop.max_grad_norm
        moved = look_ahead(optimizer, list(trained.values()), gradients, max_grad_norm=limit)
        if self.setting.loop.chain_learning_rate == "matched":
            MatchedSteps(student).match(dict(zip(trained.values(), moved, strict=True)))
        ahead = dict(zip(trained, (tensor.requires_grad_() for tensor in moved), strict=True))
        held = self.held.batch(step, self._device)
        student.eval()
        with self._autocast():
            output = functional_call(student, ahead, kwargs=model_inputs(student, held))
        held_loss = self.learning.gold(self.learning.kind.predictions(output, held))
        found = list(torch.autograd.grad(held_loss, list(ahead.values()), allow_unused=True, materialize_grads=True))
        average(found)
        return found

    def add_influence(
        self,
        batch: Mapping[str, Tensor],
        trained: Mapping[str, nn.Parameter],
        direction: Sequence[Tensor],
        weight: float,
    ) -> None:
        """Add `weight` times I, along `direction`, to the teacher's gradients; both models answer in eval mode.

        I = (g+ - g-) / 2 eps, with g+- the teacher's gradient while the student is at theta_S +- eps v and
        eps = 0.01 / |v|. Since the teacher does not move in between, both differ in their gradient at its logits
        only: one backward pass carries the difference. The gold labels' part cancels, so it is left out. The
        student answers in fp32: half precision would round moves as small as these away.
        """
        student, teacher, learning = self.setting.student, self.teacher(), self.learning
        norm = nn.utils.get_total_norm(list(direction))
        # A vanishing direction moves nothing, and must not divide by nothing.
        scale = REACH / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        student.eval()
        teacher.eval()
        answers = []
        with torch.no_grad():
            moves = [scale * v for v in direction]
            for sign in (1, -1):
                moved = {
                    name: parameter + sign * move
                    for (name, parameter), move in zip(trained.items(), moves, strict=True)
                }
                output = functional_call(student, moved, kwargs=model_inputs(student, batch))
                answers.append(learning.kind.predictions(output, batch))
        with self._autocast():
            own = learning.kind.predictions(teacher(**model_inputs(teacher, batch)), batch)
        leaves = [replace(table, logits=table.logits.detach().float().requires_grad_()) for table in own]
        logits = [table.table for table in leaves]
        above, below = (torch.autograd.grad(learning.agreement(leaves, answer), logits) for answer in answers)
        scale = learning.alpha_teacher * norm / (2 * REACH)
        slopes = [(up - down) * scale for up, down in zip(above, below, strict=True)]
        terms = [(table.logits.float() * slope * weight).sum() for table, slope in zip(own, slopes, strict=True)]
        sum(terms[1:], terms[0]).backward()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self._half:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def end(self) -> None:
        """Let go of the teacher that learned."""
        self._teacher, self.optimizer, self.held, self._trained = None, None, None, None

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's weights and its optimizer; which rows are held out follows from the step alone."""
        assert self.optimizer is not None
        return {"teacher": self.teacher().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        assert self.optimizer is not None
        self.teacher().load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])


def split(rows: Dataset, share: float, *, seed: int) -> tuple[Dataset, Dataset]:
    """Return (features to train on, features held out) of two or more, drawn by the seed, each in the old order.

    Neither is empty. Features of one row (the column `row`, where a row gives several) stay together, unless there is
    but one row.
    """
    owners = array_of(rows, "row") if "row" in rows.column_names else np.arange(len(rows))
    units, unit = np.unique(owners, return_inverse=True)
    if len(units) == 1:
        units = unit = np.arange(len(rows))
    count = min(max(1, round(share * len(units))), len(units) - 1)
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).numpy()
    held = np.isin(unit, order[:count])
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


class HeldOut:
    """Batches of the held-out rows without end, shuffled in every pass; this process's share of each."""

    def __init__(self, rows: Dataset, setting: Setting) -> None:
        loop, processes = setting.loop, state()
        self.rows = rows
        self.collator = setting.collator
        self.size = loop.batch_size
        self.sampler = sampler_of(rows, loop)
        share = self.size // processes.num_processes
        self.part = slice(processes.process_index * share, (processes.process_index + 1) * share)
        self._pass: int | None = None
        self._order = np.zeros(0, np.int64)

    def batch(self, step: int, device: torch.device) -> dict[str, Tensor]:
        """Return the batch for optimizer step `step`, whatever was asked for before."""
        number, place = divmod(step, len(self.sampler) // self.size)
        if number != self._pass:
            self.sampler.set_epoch(number)
            self._pass, self._order = number, self.sampler.order()
        chosen = self._order[place * self.size : (place + 1) * self.size][self.part]
        batch = self.collator([self.rows[int(i)] for i in chosen])
        if device.type == "cuda":
            # From pinned memory the copy does not hold up the host.
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def look_ahead(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    *,
    max_grad_norm: float | None = None,
) -> list[Tensor]:
    """Return what AdamW's next step with `gradients` would make of `parameters`, and change nothing.

    Every parameter goes by its group's settings and its own moments; before the first step these are zero. One
    without a gradient stays. The gradients are clipped together to `max_grad_norm`, as the trainer does.
    """
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for ahead, gradient in zip(copies, gradients, strict=True):
        ahead.grad = None if gradient is None else gradient.clone()
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(copies, max_grad_norm)
    of = {id(parameter): ahead for parameter, ahead in zip(parameters, copies, strict=True) if ahead.grad is not None}
    with torch.no_grad():
        for group in optimizer.param_groups:
            chosen = [parameter for parameter in group["params"] if id(parameter) in of]
            moments = [_moments(optimizer, parameter, group) for parameter in chosen]
            adamw(
                [of[id(parameter)] for parameter in chosen],
                [of[id(parameter)].grad for parameter in chosen],  # type: ignore[misc]
                [state["exp_avg"] for state in moments],
                [state["exp_avg_sq"] for state in moments],
                [state["max_exp_avg_sq"] for state in moments if group["amsgrad"]],
                [state["step"] for state in moments],
                foreach=group["foreach"],
                capturable=group["capturable"],
                fused=group["fused"],
                amsgrad=group["amsgrad"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
    return [ahead.detach() for ahead in copies]


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return a copy of AdamW's memory of a parameter, or a blank one."""
    if known := optimizer.state.get(parameter):
        return {name: value.clone() for name, value in known.items()}
    on_device = group["fused"] or group["capturable"]
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
    blank = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    return {**blank, "step": step}


def average(tensors: Sequence[Tensor | None]) -> None:
    """Replace each tensor by its mean over all processes, in place and in one exchange."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    present = [tensor for tensor in tensors if tensor is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in present])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, mean in zip(present, flat.split([tensor.numel() for tensor in present]), strict=True):
        tensor.copy_(mean.view_as(tensor))
