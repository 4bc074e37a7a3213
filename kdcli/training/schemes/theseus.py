"""Progressive module replacement: teacher blocks give way to student blocks while these train (BERT-of-Theseus)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.models.blocks import blocks_of, module_at
from kdcli.models.families import family_of
from kdcli.terminal import tell
from kdcli.training.schemes.base import Scheme, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.training.settings import LoopSettings


@dataclass(frozen=True)
class Replacement:
    """The chance p that a successor takes its predecessors' place, step by step.

    linear: p = min(1, rate + k t), from step t = 0; constant: p = rate before step `until`, then 1. Without k, or
    until, p reaches 1 at the share `full_at` of all steps.
    """

    schedule: Literal["linear", "constant"] = "linear"
    rate: float = 0.3
    k: float | None = None
    until: int | None = None
    full_at: float = 2 / 3

    def probability(self, step: int, steps: int) -> float:
        """Return p for step `step` (from 0) of `steps`."""
        if self.schedule == "constant":
            until = self.until if self.until is not None else round(self.full_at * steps)
            return self.rate if step < until else 1.0
        k = self.k if self.k is not None else (1.0 - self.rate) / max(1.0, self.full_at * steps)
        return min(1.0, self.rate + k * step)


def draw(probability: float, units: int, *, seed: int, step: int) -> list[bool]:
    """Return for every unit whether its successor runs; the same in every process and after a resumption."""
    # A generator's first numbers for neighbouring seeds are unrelated.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return (torch.rand(units, generator=generator) < probability).tolist()


class Unit:
    """A student block and the c frozen teacher blocks whose work it learns to do.

    It stands in for the block's own `forward`, on that one module: the state dict, the module tree and hooks see
    the student as it always was. In evaluation the block itself runs, whatever was drawn.
    """

    def __init__(self, successor: nn.Module, predecessors: list[nn.Module], *, last: bool) -> None:
        self.successor = successor
        self.predecessors = predecessors
        self.last = last
        self.own = successor.forward
        self.replaced = True

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the successor, or its predecessors in a row with the same further arguments."""
        if self.replaced or not self.successor.training:
            return self.own(hidden, *args, **kwargs)
        output: Any = hidden
        for block in self.predecessors:
            output = block(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        if self.last and torch.is_grad_enabled() and not hidden.requires_grad:
            # No successor at all was drawn: the loss still needs something to be differentiated by.
            hidden = hidden.detach().requires_grad_()
            output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        return output


OTHERS = "use another method, such as kd, hs or minilmv2"


class TheseusScheme(Scheme):
    """Each student block stands for c = N / n teacher blocks, and takes their place with a rising chance p.

    Once per optimizer step every unit draws whether its successor runs, or its predecessors: frozen, but gradients
    pass through them to the successors below. Only blocks train: embeddings, pooler and classifier stay the
    teacher's. Predecessors keep their dropout (the released code's way) unless `predecessor_eval`. Source: Xu et
    al. 2020.
    """

    steps_are_alike = False
    unkept = "the teacher's blocks run between those of the student, which trains"

    def __init__(self, replacement: Replacement, *, predecessor_eval: bool = False) -> None:
        self.replacement = replacement
        self.predecessor_eval = predecessor_eval
        self.units: list[Unit] = []
        self._frozen: list[nn.Parameter] = []

    def check(
        self,
        loop: "LoopSettings",
        student: "PreTrainedModel",
        teacher: "PreTrainedModel | None",
        examples: int,
    ) -> None:
        """Raise InputError where the student's blocks have no units of the teacher's to stand for.

        That is without a teacher model, when its depth is no multiple of the student's, and when something else than
        blocks stands between two blocks of a unit.
        """
        if teacher is None:
            raise InputError("theseus runs the teacher's own blocks, so it needs the model", where="teacher.model")
        for model in (student, teacher):
            if (family := family_of(model.config)).repeated:
                raise InputError(
                    f"theseus replaces blocks one by one, and the blocks of {family.title} share one block's weights",
                    where="method.name",
                    hint=OTHERS,
                )
        successors, blocks = len(blocks_of(student)), len(blocks_of(teacher))
        share, rest = divmod(blocks, successors)
        if rest or not share:
            raise InputError(
                f"{successors} student blocks cannot stand for {blocks} teacher blocks in equal parts",
                where="student.layers",
                hint=f"use a number that divides {blocks}",
            )
        family = family_of(teacher.config)
        for name in family.sizes.by_block:
            ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
            if any(kind != ours[number // share] for number, kind in enumerate(theirs)):
                raise InputError(
                    f"theseus cannot replace {share} teacher blocks by one here: the blocks of {family.title} are of "
                    f"different kinds ({name}), and a student block runs in place of blocks of its own kind only",
                    where="student.layers",
                    hint=f"use student.layers = {blocks}, where each block stands for one; or {OTHERS}",
                )
        path = family.after_first
        if share > 1 and module_at(teacher, path) is not None:
            raise InputError(
                f"theseus cannot replace {share} teacher blocks by one here: the teacher has a module after its first "
                f"block ({path}), which runs between them",
                where="student.layers",
                hint=f"use student.layers = {blocks}, where each block stands for one; or {OTHERS}",
            )

    def begin(self, setting: Setting) -> Dataset:
        """Put the predecessors behind the student's blocks, and freeze everything but these.

        Raises InputError where `check` does.
        """
        rows = super().begin(setting)
        assert setting.teacher is not None
        successors, blocks = list(blocks_of(setting.student)), list(blocks_of(setting.teacher))
        share = len(blocks) // len(successors)
        self.steps = setting.loop.steps(len(rows))
        final = self.replacement.probability(self.steps - 1, self.steps)
        if final < 1.0:
            tell(
                setting.console,
                f"theseus: the chance of replacement ends at {final:.2f}, below 1: the student never trains alone",
            )
        ours = {id(parameter) for block in successors for parameter in block.parameters()}
        self._frozen = [p for p in setting.student.parameters() if id(p) not in ours and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        for number, successor in enumerate(successors):
            predecessors = blocks[number * share : (number + 1) * share]
            for block in predecessors:
                block.train(not self.predecessor_eval)
            unit = Unit(successor, predecessors, last=number == len(successors) - 1)
            successor.forward = unit  # type: ignore[assignment]
            self.units.append(unit)
        return rows

    def place(self, device: torch.device) -> None:
        """Move the predecessors to the device that trains; the rest of the teacher stays where it is."""
        for unit in self.units:
            for block in unit.predecessors:
                block.to(device)

    def before_step(self, step: int, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Draw for every unit who runs in this step."""
        chance = self.replacement.probability(step, self.steps)
        drawn = draw(chance, len(self.units), seed=self.setting.loop.seed, step=step)
        for unit, replaced in zip(self.units, drawn, strict=True):
            unit.replaced = replaced

    def end(self) -> None:
        """Give the blocks their own forward back, and every parameter its right to train."""
        for unit in self.units:
            del unit.successor.forward
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self.setting.teacher is not None:
            self.setting.teacher.eval()
        self.units, self._frozen = [], []
