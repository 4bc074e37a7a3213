"""Chains in place of a student's matrices: which of them, and the teacher's tensors to compare them with."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from kdcli.distill.job import Job
from kdcli.distill.prepare import Follower, hides_teacher, shape_only
from kdcli.distill.start import sample_batches, task_loss
from kdcli.distill.teacher import Teacher
from kdcli.models.counts import count_parameters
from kdcli.models.factoriser import Factoriser
from kdcli.models.importance import most_important, zeroing_importance
from kdcli.models.inputs import main_input
from kdcli.models.overparam import (
    OverparamReport,
    candidates,
    chain_rows,
    count_chained,
    overparameterise,
    teacher_factors,
)
from kdcli.models.student import StudentBuild
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import MatrixKey
from kdcli.tasks.base import Task
from kdcli.tasks.predict import placed
from kdcli.terminal import warn
from kdcli.training.growing import GrowingChains
from kdcli.training.settings import LoopSettings
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED = 128
"""Training rows that the importance of matrices is measured on: each matrix takes a pass over them."""
MEASURED_TOKENS = 2**14
"""Of long rows fewer are taken."""


@dataclass
class Chain:
    """The over-parameterised student: what was done, and the teacher's tensors to compare with."""

    report: OverparamReport
    teacher: dict[Any, tuple[Tensor, ...]]
    section: OverparamSection

    def complete(self, model: "PreTrainedModel", console: Console) -> None:
        """Report all chains of a model that has been trained: some may have come meanwhile, or fewer than asked for."""
        self.report.rows = chain_rows(model)
        self.report.after = count_parameters(model)
        made, wanted = count_chained(self.report.rows), self.section.matrices
        if self.section.select == "dynamic" and wanted is not None and made < wanted:
            warn(
                console,
                f"overparam: {made} of {wanted} matrices had become chains in the weights that are kept; "
                'train.select = "last" without train.patience keeps all',
            )


def over_parameterise(
    job: Job,
    task: Task,
    teacher: Teacher,
    follower: Follower,
    build: StudentBuild,
    factoriser: Factoriser | None,
    *,
    folder: str,
) -> Chain | None:
    """Put chains in place of a student's matrices; None where the recipe has no `[overparam]` for it.

    factoriser: what its low-rank factors come from, so that the teacher's can come from the same. folder: of its
    checkpoints.
    """
    if (section := follower.overparam) is None:
        return None
    factors: dict[Any, tuple[Tensor, ...]] = {}
    compared = build.model
    if section.select == "dynamic":
        # None yet, but any of them may come.
        compared = shape_only(build.model)
        overparameterise(compared, section)
        count = count_parameters(build.model)
        report = OverparamReport([], count, count)
    else:
        static = section.select == "static"
        chosen = _chosen(job, task, teacher, follower, section, build, folder) if static else None
        report = overparameterise(build.model, section, chosen)
    if report.skipped:
        few = "; ".join(report.skipped[:3]) + ("; ..." if len(report.skipped) > 3 else "")
        job.tell(f"overparam: {counted(len(report.skipped), 'matrix', 'matrices')} without chains: {few}")
    if section.aux_weight > 0:
        source = teacher.base if hides_teacher(job.resolved) else teacher.model
        assert source is not None
        factors, skipped = teacher_factors(source, compared, follower.tensor_pairs, section, factoriser)
        if skipped:
            few = ", ".join(map(str, skipped[:6])) + (" ..." if len(skipped) > 6 else "")
            job.tell(f"overparam: no teacher tensors for {counted(len(skipped), 'matrix', 'matrices')}: {few}")
    return Chain(report, factors, section)


def growing_chains(
    chain: Chain | None, build: StudentBuild, loop: LoopSettings, console: Console
) -> GrowingChains | None:
    """Return what chooses matrices while a stage trains; None where none are chosen so. loop: of the stage."""
    if chain is None or chain.section.select != "dynamic":
        return None
    assert loop.max_steps is not None
    return GrowingChains(build.model, chain.section, steps=loop.max_steps, console=console)


def _chosen(
    job: Job,
    task: Task,
    teacher: Teacher,
    follower: Follower,
    section: OverparamSection,
    build: StudentBuild,
    folder: str,
) -> Collection[MatrixKey]:
    """Return the matrices that become chains; a resumed run takes those that were chosen when it began."""

    def choose() -> list[MatrixKey]:
        importance = _importance(job, task, teacher, follower, section, build)
        assert section.matrices is not None
        chosen = most_important(importance, section.matrices)
        listed = ", ".join(f"{layer}.{name} {importance[(layer, name)]:.3g}" for layer, name in chosen[:6])
        more = ", ..." if len(chosen) > 6 else ""
        job.tell(f"overparam: chains for {len(chosen)} of {len(importance)} matrices, by importance: {listed}{more}")
        return chosen

    path = job.run.checkpoints / folder / "matrices.json"
    return [(layer, name) for layer, name in job.settled(path, choose)]


def _importance(
    job: Job, task: Task, teacher: Teacher, follower: Follower, section: OverparamSection, build: StudentBuild
) -> dict[MatrixKey, float]:
    """Return how much the loss of the gold answers of some training rows changes without each matrix."""
    batches = sample_batches(task, teacher.processor, build.model, MEASURED, job, tokens=MEASURED_TOKENS)
    total = sum(len(main_input(batch)) for batch in batches)
    of_model = task_loss(build.model, task, follower.context)
    with placed(build.model, job.resolved.loop.device) as device, of_model as of_batch:
        moved = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

        def loss() -> Tensor:
            return torch.stack([of_batch(batch) * (len(main_input(batch)) / total) for batch in moved]).sum()

        return zeroing_importance(candidates(build.model, section), loss)
