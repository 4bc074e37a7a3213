"""One training step as a module: student, teacher and the terms that compare them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcli.models.capture import Capture
from kdcli.models.inputs import main_input, mask_of, model_inputs
from kdcli.models.placement import place
from kdcli.models.shape import shape_of
from kdcli.models.tokens import shared_tokens
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Term
from kdcli.objectives.total import total_loss
from kdcli.signals import MatrixKey, Request, Signals, part_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.tasks.kind import TaskKind
    from kdcli.training.teacher_cache import KnownOutputs
    from kdcli.training.teacher_states import KeptStates
    from kdcli.training.teacher_tokens import KnownTokens


class Distiller(nn.Module):
    """Computes the loss of one batch: one forward pass of each model, whatever the number of terms.

    The student and the terms' own parameters (bridges) are registered; the teacher is not, so that it is
    neither trained, saved, counted nor wrapped. Only what some term asks for is captured. When all that is
    asked of the teacher is known already (`teacher_outputs`, `teacher_states`), the teacher does not run, and with
    known outputs it runs only as far as something inside is asked for.
    """

    def __init__(
        self,
        student: "PreTrainedModel",
        terms: Sequence[Term],
        *,
        kind: "TaskKind",
        teacher: "PreTrainedModel | None" = None,
        teacher_outputs: "KnownOutputs | KnownTokens | None" = None,
        held_outputs: "KnownOutputs | None" = None,
        teacher_states: "KeptStates | None" = None,
        teacher_factors: Mapping[MatrixKey, tuple[Tensor, ...]] | None = None,
    ) -> None:
        """kind: of the task. teacher_outputs: what a fixed teacher gives for each example; held_outputs: the same of
        the held-out rows, where these have a loss. teacher_states: what is kept of its inside; batches then come from
        a `StatesCollator`.

        Raises ValueError when two terms have one name: their values could not be told apart.
        """
        super().__init__()
        self.student = student
        self.kind = kind
        active = [term for term in terms if term.weight > 0]
        names = ["loss", *(term.name for term in active)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"a method gives more than one term the name {twice[0]!r}")
        self.objectives = nn.ModuleDict({term.name: term.objective for term in active})
        self.weights = {term.name: float(term.weight) for term in active}
        self.by_gold, self.by_outputs = (
            any(isinstance(term.objective, one) for term in active) for one in (GoldObjective, OutputObjective)
        )
        """Whether gold answers, and the teacher's predictions, teach the student."""
        student_request, self.teacher_request = Request(), Request()
        for term in active:
            student_request |= term.objective.student_request()
            self.teacher_request |= term.objective.teacher_request()
        self.student_capture = Capture(student, student_request, kind)
        self.teacher_capture: Capture | None = None
        # A plain dict hides the teacher from nn.Module's registration.
        self._fixed: dict[str, PreTrainedModel] = {}
        self.teacher_outputs = None if self.teacher_request.gradients else teacher_outputs
        self.held_outputs = None if self.teacher_request.gradients else held_outputs
        self.teacher_states = None if self.teacher_request.gradients else teacher_states
        self.teacher_factors = dict(teacher_factors or {})
        if teacher is not None and self._teacher_must_run():
            teacher.eval()
            self._fixed["teacher"] = teacher
            known = self.teacher_outputs is not None
            request = replace(self.teacher_request, logits=False) if known else self.teacher_request
            self.teacher_capture = Capture(teacher, request, kind)
        inside = self.teacher_capture is not None and self.teacher_request.inside
        shapes = [shape_of(model.config) for model in (student, teacher) if inside and model is not None]
        self.tokens = shared_tokens(*shapes) if inside else None

    def _teacher_must_run(self) -> bool:
        request = self.teacher_request
        inside = request.inside and self.teacher_states is None
        return inside or (request.logits and self.teacher_outputs is None)

    def place(self, device: torch.device) -> None:
        """Move what is not registered (the teacher and its cached outputs) to `device`."""
        for model in self._fixed.values():
            place(model, device)
        for known in (self.teacher_outputs, self.held_outputs):
            if known is not None:
                known.to(device)
        self.teacher_factors = {
            key: tuple(factor.to(device) for factor in chain) for key, chain in self.teacher_factors.items()
        }

    def close(self) -> None:
        """Remove all hooks from both models."""
        self.student_capture.close()
        if self.teacher_capture is not None:
            self.teacher_capture.close()

    def compared_factors(self) -> dict[MatrixKey, tuple[Tensor, ...]]:
        """Return the teacher's tensors beside the chains that the student has now."""
        own = self.student_capture.factors() if self.teacher_factors else {}
        return {key: chain for key, chain in self.teacher_factors.items() if key in own}

    def teacher_signals(self, batch: Mapping[str, Tensor]) -> Signals:
        """Return the teacher's signals on `batch`, without gradient of its weights."""
        if self.teacher_states is not None:
            signals = self.teacher_states.signals(batch)
        elif self.teacher_capture is None:
            signals = Signals(mask=mask_of(batch), heads=0)
        else:
            with torch.set_grad_enabled(self.teacher_request.gradients > 0), self.teacher_capture as capture:
                signals = capture.run(batch).on(main_input(batch).device)
        # Held-out rows have numbers of their own.
        known = self.teacher_outputs if self.training or self.held_outputs is None else self.held_outputs
        if known is not None:
            signals.predictions = self.kind.predictions(
                known.of(batch), batch, everywhere=self.teacher_request.all_positions
            )
        signals.factors = self.compared_factors()
        return signals

    def without_gradient(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the trainable parameters that the loss of `batch` does not depend on.

        Changes nothing: no dropout is drawn, no gradient is kept, objectives that adapt in training do not.
        """
        modes = {module: module.training for module in self.modules()}
        self.eval()
        # The loss itself is formed in training only.
        self.training = True
        try:
            named = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
            found = torch.autograd.grad(self(batch)["loss"], list(named.values()), allow_unused=True)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return [name for name, gradient in zip(named, found, strict=True) if gradient is None]

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return "loss" and each unweighted term by name; in eval mode the head's outputs, where these are scored."""
        if not self.training and not self.kind.chosen_by_loss:
            output = self.student(**model_inputs(self.student, batch))
            return {name: output[name] for name in self.kind.head.outputs}
        # A term that compares gradients needs graphs on held-out rows, too.
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.student_capture.request.gradients > 0):
            teacher = self.teacher_signals(batch)
            if self.tokens is not None:
                teacher = teacher.take(self.tokens[1])
            with self.student_capture as capture:
                student = capture.run(batch, teacher)
            if self.tokens is not None and self.student_capture.request.inside:
                student = student.take(self.tokens[0])
            part_heads(student.predictions, gold=self.by_gold, teacher=self.by_outputs)
            with torch.autocast(student.mask.device.type, enabled=False):
                total, values = total_loss(self.objectives, self.weights, student, teacher, batch)  # type: ignore[arg-type]
        if not self.training:
            total = total.detach()
        if self.student_capture.to_end and student.last is not None:
            # Each block of a sharded student gets its weights back for the backward pass when a gradient comes to it.
            total = total + 0.0 * student.last.sum()
        return {"loss": total, **values}
