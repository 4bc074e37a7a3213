"""Chains that take the places of matrices while a student trains: first where they matter most (OPF, dynamic)."""

import math
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from kdcli.models.importance import most_important
from kdcli.models.overparam import add_chains, candidates, chain_rows, lengths_of
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import MatrixKey
from kdcli.tensors.mpo import central_index
from kdcli.tensors.parametrization import chains_of
from kdcli.terminal import tell
from kdcli.training.groups import parameter_groups, regroup
from kdcli.training.settings import LoopSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GrowingChains:
    """Every so many steps, the `select_count` most important matrices that are plain become chains, up to `matrices`.

    A matrix's importance is sum |dL/dW W| over its entries, summed over all steps so far: how much the loss would
    change without it, to first order. The student's function is the same before and after; the new tensors start with
    moments of zero, as at a training's beginning. Source: OPF (Gao et al., ACL 2023), section 3.3, where what is summed
    is left open.
    """

    def __init__(self, student: "PreTrainedModel", section: OverparamSection, *, steps: int, console: Console) -> None:
        """steps: of the training; unless `select_every` says otherwise, all are chosen within the first third of it."""
        assert section.matrices is not None
        self.student = student
        self.section = section
        self.console = console
        turns = math.ceil(section.matrices / section.select_count)
        self.every = section.select_every or max(1, steps // (3 * turns))
        self.lengths = lengths_of(student, section)
        self.importance: dict[MatrixKey, Tensor] = {}
        self._look()

    def _look(self) -> None:
        self._plain = candidates(self.student, self.section)
        self.chained = len({(row.block, row.matrix.partition(".")[0]) for row in chain_rows(self.student)})
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
