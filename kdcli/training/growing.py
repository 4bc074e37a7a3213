"""Chains that take the places of matrices while a student trains: first where they matter most (OPF, dynamic)."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.models.importance import most_important
from kdcli.models.overparam import add_chains, candidates, chain_rows, count_chained, lengths_of
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import MatrixKey
from kdcli.tensors.mpo import central_index
from kdcli.tensors.parametrization import chains_of
from kdcli.terminal import tell
from kdcli.training.groups import parameter_groups, regroup
from kdcli.training.settings import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def steps_between(section: OverparamSection, missing: int, steps: int) -> int:
    """Return the steps between two choices in a stage of `steps`, at whose start `missing` chains are still to come.

    Unless `select_every` says otherwise, all are chosen within the first third of it.
    """
    turns = max(1, math.ceil(missing / section.select_count))
    return section.select_every or max(1, steps // (3 * turns))


def check_turns(section: OverparamSection, stages: Sequence[int]) -> None:
    """Raise InputError when the stages end before all chains are chosen. stages: the steps of each, in order."""
    assert section.matrices is not None
    made = 0
    for steps in stages:
        missing = section.matrices - made
        if missing > 0:
            made += section.select_count * (steps // steps_between(section, missing, steps))
    if made >= section.matrices:
        return
    total, turns = sum(stages), math.ceil(section.matrices / section.select_count)
    message = f"{section.matrices} matrices should become chains, and {total} steps of training are enough for {made}"
    # The greatest number of steps between two choices that leaves enough of them.
    most = bisect_right(range(1, max(stages) + 1), -turns, key=lambda every: -sum(n // every for n in stages))
    if most:
        raise InputError(
            f"{message} with select_every = {section.select_every} and select_count = {section.select_count}",
            where="overparam.select_every",
            hint=f"use up to {most}, or leave it out",
        )
    raise InputError(
        f"{message}, {section.select_count} after a step",
        where="overparam.matrices",
        hint=f"use up to {section.select_count * total}, or set select_count to {math.ceil(section.matrices / total)} "
        "or more",
    )


class GrowingChains:
    """Every so many steps, the `select_count` most important matrices that are plain become chains, up to `matrices`.

    A matrix's importance is sum |dL/dW W| over its entries, summed over all steps so far: how much the loss would
    change without it, to first order. The student's function is the same before and after; the new tensors start with
    moments of zero, as at a training's beginning. Source: OPF (Gao et al., ACL 2023), section 3.3, where what is summed
    is left open.
    """

    def __init__(self, student: "PreTrainedModel", section: OverparamSection, *, steps: int, console: Console) -> None:
        """steps: of the training. student: with the chains of the stages before."""
        assert section.matrices is not None
        self.student = student
        self.section = section
        self.console = console
        self.lengths = lengths_of(student, section)
        self.importance: dict[MatrixKey, Tensor] = {}
        self._look()
        self.every = steps_between(section, section.matrices - self.chained, steps)

    def _look(self) -> None:
        self._plain = candidates(self.student, self.section)
        self.chained = count_chained(chain_rows(self.student))
        if self.section.train == "auxiliary":
            # Chains that a checkpoint brought train in all tensors.
            for _, chain in chains_of(self.student):
                chain[central_index(len(chain))].requires_grad_(False)

    @property
    def is_complete(self) -> bool:
        """True when all chains are there."""
        assert self.section.matrices is not None
        return self.chained >= self.section.matrices

    @torch.no_grad()
    def measure(self) -> None:
        """Add what a step's gradients say of the matrices that are plain; nothing leaves the device."""
        if self.is_complete:
            return
        for key, weights in self._plain.items():
            for weight in weights:
                if weight.grad is not None:
                    known = self.importance.get(key)
                    change = (weight.grad * weight).abs().sum()
                    self.importance[key] = change if known is None else known + change

    def grow(self, step: int, distiller: nn.Module, optimizer: torch.optim.Optimizer, loop: LoopSettings) -> None:
        """Put chains in the next places when `step` optimizer steps call for it."""
        if self.is_complete or step % self.every:
            return
        assert self.section.matrices is not None
        count = min(self.section.select_count, self.section.matrices - self.chained)
        importance = {key: float(self.importance.get(key, 0.0)) for key in self._plain}
        chosen = most_important(importance, count)
        add_chains(self.student, self.section, chosen)
        regroup(optimizer, parameter_groups(distiller, loop, self.lengths))
        self._look()
        names = ", ".join(f"{layer}.{name}" for layer, name in chosen)
        tell(
            self.console,
            f"overparam: chains for {names} from step {step} on ({self.chained} of {self.section.matrices})",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beside the chains themselves."""
        return {f"{layer}.{name}": value.cpu() for (layer, name), value in self.importance.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, once the student has the chains that it had then."""
        self._look()
        device = next(self.student.parameters()).device
        self.importance = {
            (int(layer), name): value.to(device)
            for (layer, _, name), value in ((key.partition("."), value) for key, value in state.items())
        }
