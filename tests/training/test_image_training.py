"""Training on images: the same steps whatever prepares the batches, and whatever interrupts them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from image_rows import encoded, pictures, put_images, rows_of, task_of
from rich.console import Console
from stages import LOOP, TWO_PROCESSES, Killed, distill, kill_after
from tiny_recipes import changed, write_recipe
from torch import Tensor
from transformers import ViTImageProcessor

from kdcli.errors import InputError, RunError
from kdcli.faults import explain
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Term
from kdcli.tasks.base import Task
from kdcli.training.step import Distiller
from kdcli.training.trainer import fit

SIZE = {"height": 16, "width": 16}
EVERYTHING = {"flip": True, "crop": 2, "rand_augment": True, "mixup": 0.3}


def train(
    task: Task, folder: Path, *, resume: bool = False, collate: Any = None, **loop: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train a tiny ViT from another one, 3 steps an epoch, and return the history and the weights."""
    settings = replace(LOOP, max_steps=7, eval_every=2, eval_batch_size=4, **loop)
    prepared = task.kind.prepare(task, ViTImageProcessor(size=SIZE), 128, seed=settings.seed)
    student, teacher = tiny("vit", labels=3, layers=1), tiny("vit", labels=3, seed=1)
    terms = [
        Term("output", OutputObjective(task.kind.distribution), 0.5),
        Term("task", GoldObjective(task.kind.distribution), 0.5),
    ]
    record = fit(
        Distiller(student, terms, kind=task.kind, teacher=teacher),
        train=prepared.train,
        selection=prepared.selection,
        collator=collate or prepared.collator,
        metrics=lambda outputs: {"accuracy": float((outputs["logits"].argmax(-1) == 1).mean())},
        settings=settings,
        folder=folder,
        log_dir=None,
        title="test",
        console=Console(quiet=True),
        resume=resume,
    )
    return record["history"], student.state_dict()


def task(**fields: Any) -> Task:
    return task_of(rows_of(pictures(24)), rows_of(pictures(6, seed=1)), **fields)


def test_workers_resuming_and_kept_pixels_change_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    history, weights = train(task(**EVERYTHING), tmp_path / "alone")
    others = [train(task(**EVERYTHING, cache_pixels=True), tmp_path / "workers", workers=2)]
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train(task(**EVERYTHING), tmp_path / "killed", workers=1)
    others.append(train(task(**EVERYTHING), tmp_path / "killed", workers=1, resume=True))
    for other_history, other in others:
        assert other_history == history
        assert all(torch.equal(other[name], weights[name]) for name in weights)
    _, plain = train(task(), tmp_path / "plain")
    _, drawn_otherwise = train(task(**EVERYTHING), tmp_path / "seed", seed=2)
    assert not torch.equal(plain["classifier.weight"], weights["classifier.weight"])
    assert not torch.equal(drawn_otherwise["classifier.weight"], weights["classifier.weight"])


@pytest.mark.parametrize("place", ["train", pytest.param("selection", marks=pytest.mark.slow)])
def test_a_worker_that_meets_a_broken_image_ends_the_run_in_words(tmp_path: Path, place: str):
    good = [encoded(each) for each in pictures(24)]
    broken = [*good[:17], good[17][: len(good[17]) // 2], *good[18:]]
    rows = {"train": rows_of(good), "selection": rows_of(good), place: rows_of(broken)}
    with pytest.raises(InputError) as caught:
        train(task_of(**rows), tmp_path, workers=2)
    assert "row 18" in caught.value.message
    assert "Traceback" not in str(caught.value) and "Caught" not in str(caught.value)


def end_the_process(rows: Any) -> Any:
    os._exit(1)


def fail(rows: Any) -> Any:
    raise OSError(28, "No space left on device", "/somewhere")


@pytest.mark.slow
def test_a_worker_that_is_ended_or_fails_is_told(tmp_path: Path):
    with pytest.raises(RuntimeError) as caught:
        train(task(), tmp_path, workers=1, collate=end_the_process)
    told = explain(caught.value)
    assert isinstance(told, RunError) and "train.workers" in (told.hint or "")
    with pytest.raises(RunError, match="the disk is full"):
        train(task(), tmp_path, workers=1, collate=fail)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path):
    fields = {"flip": True, "crop": 2, "rand_augment": True, "cache_pixels": True}
    recipe = changed(put_images(tmp_path), task=fields, train={"max_steps": 4, "workers": 1, "learning_rate": 1e-4})
    write_recipe(tmp_path / "recipe.toml", recipe)
    alone, weights = distill(tmp_path, "one")
    both, other = distill(tmp_path, "two", *TWO_PROCESSES)
    losses = [
        [entry["loss"] for entry in document["training"][0]["history"] if "loss" in entry] for document in (alone, both)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)
