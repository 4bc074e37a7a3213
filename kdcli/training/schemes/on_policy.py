"""Learning from text that the student itself writes, as it is at each step (on-policy distillation)."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from kdcli.errors import InputError
from kdcli.machine import resolve_precision
from kdcli.models.generation import Mixture, Sampling, generate
from kdcli.tasks.responses import prompt_of, with_response
from kdcli.training.schemes.base import Scheme, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.training.settings import LoopSettings

STEPS = 2
"""Beside the seed: the number of a stream of draws that decide which steps are on-policy."""


class OnPolicyScheme(Scheme):
    """In a share of the steps the responses of the batch give way to the student's own to the same prompts.

    Which steps, and what is written, follows from the seed, the step and the row alone: a resumed run and one of
    another number of processes or micro-batches draw the same. No gradient passes through the sampling, which runs
    without dropout. teacher_share: of the teacher's distribution at each token that is drawn.
    Sources: Agarwal et al. 2024 (GKD, arXiv 2306.13649), algorithm 1; teacher_share: Gu et al. 2024 (MiniLLM, arXiv
    2306.08543), section 2.2.
    """

    changes_batches = True
    unkept = "its student writes the responses that both models read, step by step"

    def __init__(
        self, name: str, share: float, sampling: Sampling, *, max_new_tokens: int | None, teacher_share: float = 0.0
    ) -> None:
        """name: of the method, for messages. share: of the steps."""
        self.name = name
        self.share = share
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.teacher_share = teacher_share

    def check(
        self, loop: "LoopSettings", student: "PreTrainedModel", teacher: "PreTrainedModel | None", examples: int
    ) -> None:
        """Raise InputError without a teacher model."""
        if teacher is None:
            raise InputError(f"{self.name} runs the teacher on its student's text", where="teacher.model")

    def begin(self, setting: Setting) -> Dataset:
        rows = super().begin(setting)
        processor = setting.processor
        self.ends = frozenset(setting.task.kind.end_tokens(processor, setting.student.config))  # type: ignore[attr-defined]
        self.half = resolve_precision(setting.loop.precision, setting.loop.device) == "bf16"
        return rows

    def is_on_policy(self, step: int) -> bool:
        """Return whether the student's own responses are trained on in a step; the same in every process."""
        return bool(np.random.default_rng([self.setting.loop.seed, step, STEPS]).random() < self.share)

    def batches(self, step: int, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        if not self.is_on_policy(step):
            return batches
        rows = [_rows_of(batch) for batch in batches]
        answered = iter(self._answered(step, [row for each in rows for row in each], max(map(len, rows))))
        return [
            self._collated([next(answered) for _ in each], batch) for each, batch in zip(rows, batches, strict=True)
        ]

    def _answered(self, step: int, rows: list[dict[str, Any]], least: int) -> list[dict[str, Any]]:
        """Return rows of the same prompts with the student's responses. least: rows that are run together anyway."""
        setting, prompts = self.setting, [prompt_of(row["input_ids"], row["labels"]) for row in rows]
        teacher = self.teacher() if self.teacher_share > 0 else None
        with torch.autocast(setting.student.device.type, torch.bfloat16, enabled=self.half):
            responses = generate(
                setting.student,
                prompts,
                max_new_tokens=self.max_new_tokens or setting.max_length,
                max_length=setting.max_length,
                end=self.ends,
                pad=setting.processor.pad_token_id,
                sampling=self.sampling,
                mixture=Mixture(teacher, self.teacher_share) if teacher is not None else None,
                seed=(setting.loop.seed, step),
                numbers=[row["index"] for row in rows],
                batch_size=max(least, setting.loop.eval_batch_size),
                owner="the student",
            )
        return [
            # A prompt may leave no room at all.
            with_response(row, prompt, response) if response else row
            for row, prompt, response in zip(rows, prompts, responses, strict=True)
        ]

    def _collated(self, rows: list[dict[str, Any]], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return rows as a batch, on the device of the one whose place it takes."""
        place = batch["input_ids"].device
        return {name: values.to(place, non_blocking=True) for name, values in self.setting.collator(rows).items()}


def _rows_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the features of a batch, without padding."""
    names = ("index", "input_ids", "attention_mask", "labels")
    lengths = batch["attention_mask"].sum(1).tolist()
    found = []
    for index, *values, length in zip(*(batch[name].tolist() for name in names), lengths, strict=True):
        parts = zip(names[1:], values, strict=True)
        found.append({"index": index, **{name: row[:length] for name, row in parts}, "length": length})
    return found
