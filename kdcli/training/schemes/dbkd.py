"""Learning from a teacher that only decides: its logits are worked out from decisions on noised copies (DBKD)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from kdcli.black_box.answers import Copies, ask, columns_asked, recorded
from kdcli.black_box.ask import BlackBox, LocalModel
from kdcli.black_box.estimate import logits_from_decisions
from kdcli.black_box.image_noise import ImageNoise
from kdcli.black_box.neighbours import EmbeddingNeighbours
from kdcli.black_box.noise import Noise
from kdcli.data.rows import array_of
from kdcli.errors import InputError
from kdcli.files import expanded
from kdcli.tasks.base import Task
from kdcli.training.distributed import agree, is_main, main_does
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.training.teacher_cache import KnownOutputs

DECISIONS = "method.black_box.decisions"
"""The field that names a file of recorded decisions."""

MakeBox = Callable[[Task, Path], BlackBox]


class DecisionScheme(Scheme):
    """Before the first step every training example is noised and asked about, and the logits that would explain the
    decisions take the teacher's place. From then on there is no teacher: only this table.

    make_box: from the task and the recipe's folder to the black box; None asks the local teacher. file: recorded
    decisions; nothing is asked then. noise_std: s of the noise in the model of a decision. scale: sigma of the loss.
    Source: Zhou et al. 2023 (DBKD).
    """

    runs_teacher = False
    unkept = "it learns from decisions alone, and asks for no states of a teacher"

    def __init__(
        self,
        *,
        copies: int = 10,
        ratio: float = 0.1,
        noise_seed: int = 0,
        synonyms: bool = False,
        noise_std: float = 1.0,
        scale: float = 1.0,
        make_box: MakeBox | None = None,
        file: str | None = None,
        queries_per_call: int = 1024,
    ) -> None:
        self.copies = copies
        self.ratio = ratio
        self.noise_seed = noise_seed
        self.synonyms = synonyms
        self.noise_std = noise_std
        self.scale = scale
        self.make_box = make_box
        self.file = file
        self.queries_per_call = queries_per_call
        self.counts: np.ndarray | None = None

    def begin(self, setting: Setting) -> Dataset:
        """Ask all questions, or read the recorded answers. Raises InputError for answers that are no labels."""
        rows = super().begin(setting)
        main_does(lambda: self._decide(setting))
        counts = agree(self.counts if is_main() else None)
        assert counts is not None
        self.counts = counts
        asked = np.unique(array_of(rows, "index"))
        logits = np.zeros_like(counts)
        logits[asked] = logits_from_decisions(counts[asked], sigma=self.noise_std)
        self.table = torch.from_numpy(logits).float() * self.scale
        return rows

    def _decide(self, setting: Setting) -> None:
        task = setting.task
        if self.file is not None:
            self.counts = recorded(setting.base / expanded(self.file, "method.black_box.decisions"), task, DECISIONS)
            return
        noise, identity = self._noise(setting)
        self.counts = ask(
            self._box(setting),
            task.train,
            noise,
            columns=columns_asked(task),
            copies=self.copies,
            names=task.label_names,
            queries_per_call=self.queries_per_call,
            use_cache=setting.cache,
            console=setting.console,
            noise_identity=identity,
        )

    def _noise(self, setting: Setting) -> tuple[Copies, Any]:
        """Return what makes noised copies of the task's examples, and what tells it from others of its kind."""
        if "images" in setting.task.kind.provides:
            on_pixels = ImageNoise.for_processor(setting.processor, self.ratio, self.noise_seed)
            return on_pixels, on_pixels.identity
        neighbours = EmbeddingNeighbours(setting.student, setting.processor) if self.synonyms else None
        return Noise(self.ratio, self.noise_seed, neighbours), neighbours.identity if neighbours is not None else None

    def _box(self, setting: Setting) -> BlackBox:
        if self.make_box is not None:
            return self.make_box(setting.task, setting.base)
        if setting.teacher is None:
            raise InputError(
                "there is no teacher model to ask",
                where="method.black_box",
                hint="name a callable, a command, or a file of recorded decisions",
            )
        return LocalModel(
            setting.task.kind,
            setting.teacher,
            setting.processor,
            max_length=setting.max_length,
            batch_size=setting.loop.eval_batch_size,
            device=setting.loop.device,
        )

    def teacher(self) -> None:
        """Return None: after the queries no model runs beside the student."""

    def teacher_outputs(self) -> KnownOutputs:
        """Return the logits behind the decisions, centred and scaled."""
        return KnownOutputs({"logits": self.table})
