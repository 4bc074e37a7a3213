"""A stage of training on a few random rows, as the pipeline sets it up, for tests of schemes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny, tokenizer
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import write_recipe
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from kdcli.data.reviews import LABELS, reviews
from kdcli.methods.base import Term
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer
from kdcli.tasks import registry
from kdcli.tasks.base import Task
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.encode import Collator
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller
from kdcli.training.trainer import fit

LOOP = LoopSettings(
    epochs=1.0,
    max_steps=6,
    batch_size=8,
    gradient_accumulation=1,
    learning_rate=1e-3,
    scheduler="linear",
    warmup=0.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    precision="fp32",
    device="cpu",
    group_by_length=True,
    eval_every=None,
    patience=None,
    select="last",
    log_every=2,
    workers=0,
    seed=1,
    metric="accuracy",
)


def rows(count: int = 40, *, seed: int = 0, regression: bool = False) -> Dataset:
    """Return encoded rows of 4 to 12 random tokens, with labels of two classes or from 0 to 5."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    labels = (torch.rand(count, generator=generator) * 5 if regression else torch.arange(count) % 2).tolist()
    return Dataset.from_dict(
        {
            "index": list(range(count)),
            "input_ids": [torch.randint(5, 200, (n,), generator=generator).tolist() for n in lengths],
            "attention_mask": [[1] * n for n in lengths],
            "labels": labels,
            "length": lengths,
        }
    )


def setting(student: PreTrainedModel, teacher: PreTrainedModel | None, train: Dataset, **loop: Any) -> Setting:
    """Return the setting of a stage. Its task has no rows: a scheme that looked at the validation set would fail."""
    words = tokenizer()
    nothing: Any = None
    task = Task("rows", registry.get("classification"), None, ("a", "b"), ("accuracy",), nothing, nothing, nothing)
    return Setting(
        student=student,
        teacher=teacher,
        processor=words,
        task=task,
        train=train,
        collator=Collator(words),
        loop=replace(LOOP, **loop),
        base=Path(),
        cache=True,
        console=Console(quiet=True),
    )


def batch_of(setting: Setting, count: int = 8, first: int = 0) -> dict[str, Tensor]:
    """Return a padded batch of training rows."""
    return setting.collator([setting.train[i] for i in range(first, first + count)])


def train(
    scheme: Scheme,
    setting: Setting,
    terms: list[Term],
    folder: Path,
    *,
    resume: bool = False,
    factors: dict[Any, tuple[Tensor, ...]] | None = None,
) -> dict[str, Any]:
    """Begin the scheme and train its stage to the end, checkpoints and all; `scheme.end` is for the caller."""
    kept = scheme.begin(setting)
    return fit(
        Distiller(setting.student, terms, teacher=scheme.teacher(), teacher_factors=factors, kind=CLASSIFICATION),
        train=kept,
        selection=setting.train if setting.loop.eval_every else None,
        collator=setting.collator,
        metrics=lambda outputs: {
            "accuracy": float((outputs["logits"].argmax(-1) == setting.train["labels"][:]).mean())
        },
        settings=setting.loop,
        folder=folder,
        log_dir=None,
        title="test",
        console=setting.console,
        scheme=scheme,
        resume=resume,
    )


class Killed(Exception):
    """What ends a training that `kill_after` stops."""


def kill_after(patch: pytest.MonkeyPatch, step: int, folder: str = "") -> None:
    """Let a training fail as soon as its checkpoint of `step` is there. folder: a part of its folder's path."""

    def saved(self: TrainerCallback, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == step and folder in str(args.output_dir):
            raise Killed

    patch.setattr(TrainerCallback, "on_save", saved)


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def folder_with_recipe(folder: Path, recipe: dict[str, Any], *, layers: int = 2, dropout: float = 0.0) -> Path:
    """Write `recipe.toml` and a `teacher` for the task `reviews`; without dropout, since processes draw their own."""
    words = train_tokenizer(reviews()["train"]["text"], 300)
    names = dict(enumerate(LABELS))
    teacher = tiny(
        "bert",
        layers=layers,
        vocab_size=len(words),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    (folder / "teacher").mkdir()
    save_model(teacher, folder / "teacher", words)
    write_recipe(folder / "recipe.toml", recipe)
    return folder


def distill(folder: Path, name: str, *launcher: str, extra: tuple[str, ...] = ()) -> tuple[Any, dict[str, Tensor]]:
    """Run the recipe under a name of its own, and return the run's record and the student's weights."""
    command = [sys.executable, *launcher, "-m", "kdcli", "distill", "recipe.toml", "--json", "--set", f"name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *extra], cwd=folder, capture_output=True, text=True, timeout=280, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # PyTorch says so where it looked for parameters without a gradient and there were none.
    assert "find_unused_parameters" not in result.stderr or "theseus" in (folder / "recipe.toml").read_text()
    return json.loads(result.stdout), load_file(folder / "runs" / name / "student" / "model.safetensors")
