"""What the weights of a student start from: a pass of the teacher over some training rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdcli.data.rows import array_of
from kdcli.distill.job import Job
from kdcli.files import cache_dir, fingerprint
from kdcli.methods.base import Context
from kdcli.models.factoriser import Factoriser
from kdcli.models.hashing import hash_of_model, hash_of_tensors
from kdcli.models.inputs import main_input
from kdcli.models.projections import moments_of, project
from kdcli.models.shape import shape_of, token_counts
from kdcli.models.statistics import Batch, Statistics, collect_statistics, from_tensors, to_tensors
from kdcli.models.student import StudentBuild
from kdcli.recipe.schema import StudentSection
from kdcli.signals import MatrixKey
from kdcli.tasks.base import Task
from kdcli.tasks.predict import placed
from kdcli.tensor_file import keep_tensors, kept_tensors
from kdcli.training.distributed import main_does
from kdcli.training.step import Distiller

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 1024
"""Of long rows fewer are looked at at a time: what a pass keeps for its gradients takes memory."""


def factoriser_of(
    job: Job,
    task: Task,
    model: "PreTrainedModel",
    processor: Any,
    section: StudentSection,
    context: Context,
    folder: str,
) -> Factoriser | None:
    """Return what chooses the factors of a low-rank student of `model`; None for other forms, and for the plain SVD.

    task: its training rows are looked at. Their statistics are kept in the cache. folder: of its checkpoints.
    """
    inputs, gradients = section.init in ("activations", "both"), section.init in ("gradients", "both")
    if section.form != "low-rank" or not (inputs or gradients or section.ranks == "spread"):
        return None
    batches = sample_batches(task, processor, model, section.init_samples, job)
    vocab = shape_of(model.config).vocab
    counts = _token_counts(batches, vocab) if vocab is not None and (inputs or gradients) else None
    if section.budget == 1.0:
        return Factoriser(inputs, gradients, counts=counts)
    needs_loss = gradients or section.ranks == "spread"

    def collect(model: "PreTrainedModel", loss: Any = None, layer: int | None = None) -> dict[MatrixKey, Statistics]:
        with placed(model, job.resolved.loop.device) as place:
            moved = ({name: tensor.to(place) for name, tensor in batch.items()} for batch in batches)
            return collect_statistics(model, moved, loss, layer=layer)

    tensors = [hash_of_tensors(batch) for batch in batches]
    of = {
        "model": hash_of_model(model),
        "inputs": tensors,
        "kind": task.kind.name,
        "loss": needs_loss,
        "format": 1,
    }
    name = fingerprint(of)
    path = cache_dir() / "statistics" / f"{name}.safetensors"
    kept = kept_tensors(path, None, of=name, console=job.console)
    if kept is not None:
        statistics = from_tensors(kept)
    else:
        with task_loss(model, task, context) if needs_loss else nullcontext() as loss:
            statistics = collect(model, loss)
    main_does(lambda: keep_tensors(path, to_tensors(statistics), of=name) if kept is None else None)
    again = (lambda student, layer: collect(student, layer=layer)) if section.sequential else None
    settle = lambda ranks: _settled(job, folder, ranks)  # noqa: E731
    return Factoriser(inputs, gradients, statistics, again, settle, counts)


def _token_counts(batches: list[Batch], vocabulary: int) -> Tensor:
    """Return how often batches have each token, (vocabulary,)."""
    real = [batch["input_ids"][batch["attention_mask"].bool()] for batch in batches]
    return torch.bincount(torch.cat(real), minlength=vocabulary)


def _settled(job: Job, folder: str, ranks: dict[MatrixKey, int | None]) -> dict[MatrixKey, int | None]:
    """Return the ranks that all processes take; a resumed run those of its beginning."""
    path = job.run.checkpoints / folder / "ranks.json"
    agreed = job.settled(path, lambda: [[layer, name, rank] for (layer, name), rank in ranks.items()])
    return {(layer, name): rank for layer, name, rank in agreed}


def start_projections(
    job: Job, task: Task, model: "PreTrainedModel", processor: Any, build: StudentBuild, section: StudentSection
) -> None:
    """Make a student's weights projections of `model`'s, in place.

    task: its training rows are looked at.
    """
    assert build.teacher_layers is not None
    batches = sample_batches(task, processor, model, section.init_samples, job)
    with placed(model, job.resolved.loop.device) as place:
        moved = ({name: tensor.to(place) for name, tensor in batch.items()} for batch in batches)
        moments = moments_of(model, moved)
    project(model, build.model, build.teacher_layers, moments)


def sample_batches(
    task: Task, processor: Any, model: "PreTrainedModel", samples: int, job: Job, *, tokens: int | None = None
) -> list[Batch]:
    """Return some training rows as batches; the same for every run of one seed.

    model: that is to read them. tokens: at most so many in all.
    """
    seed = job.resolved.loop.seed
    chosen = np.random.default_rng(seed).permutation(len(task.train))[:samples]
    rows = task.train.select(np.sort(chosen))
    encoded = task.kind.prepare_sample(
        replace(task, train=rows, selection=rows), processor, job.recipe.task.max_length, seed=seed
    )
    features = encoded.train
    # Of text many blocks may come from one document.
    order = np.random.default_rng(seed).permutation(len(features))[:samples]
    lengths = token_counts(model.config, array_of(features, "length"))
    if tokens is not None:
        order = order[: max(1, np.searchsorted(np.cumsum(lengths[order]), tokens, "right"))]
    order = order[np.argsort(lengths[order], kind="stable")]
    return [encoded.collator(features.__getitems__(part)) for part in _parts(order.tolist(), lengths)]


def _parts(order: list[int], lengths: np.ndarray) -> list[list[int]]:
    """Return rows of rising length in parts of at most `ROWS_AT_ONCE`, of at most `TOKENS_AT_ONCE` where they can."""
    parts: list[list[int]] = []
    for row in order:
        full = not parts or len(parts[-1]) == ROWS_AT_ONCE
        if full or (len(parts[-1]) + 1) * lengths[row] > TOKENS_AT_ONCE:
            parts.append([])
        parts[-1].append(row)
    return parts


@contextmanager
def task_loss(model: "PreTrainedModel", task: Task, context: Context) -> Iterator[Callable[[Batch], Tensor]]:
    """Yield the loss of the gold answers as a function of a batch: the mean over its rows.

    Where tokens weigh equally, a row's loss is the sum over its tokens, as they have no mean of their own.
    """
    distiller = Distiller(model, [context.gold_term()], kind=task.kind)

    def loss(batch: Batch) -> Tensor:
        distiller.eval()
        # The loss itself is formed in training only; the model stays in eval mode.
        distiller.training = True
        rows = len(main_input(batch))
        tokens = batch["targets"].numel() / rows if task.kind.tokens_weigh_equally else 1.0
        return distiller(batch)["loss"] * tokens

    try:
        yield loss
    finally:
        distiller.close()
