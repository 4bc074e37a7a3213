"""Learning from text that the teacher writes (sequence-level distillation)."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
from datasets import Dataset

from kdcli.data.rows import stored
from kdcli.errors import InputError, RunError
from kdcli.models.generation import Sampling
from kdcli.tasks.responses import with_response
from kdcli.terminal import tell
from kdcli.training.responses import Writing, prompt_lengths, responses_to
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcli.training.settings import LoopSettings


class TeacherTextScheme(Scheme):
    """Before the first step the teacher answers the prompt of every training row; its responses are trained on.

    A response keeps the teacher's own tokens, the one that ends it among them; one that reaches a limit before has
    none. Rows whose response has no text are left out. Source: Kim and Rush 2016, section 3.2, with samples in place of
    the most probable sequence, as in Gu et al. 2024 (MiniLLM), section 3.1.
    """

    works_sharded = True
    unkept = "the teacher writes the rows that its student is trained on, and their lengths are not known before"

    def __init__(self, sampling: Sampling, *, max_new_tokens: int | None, seed: int = 0) -> None:
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.seed = seed

    def check(
        self, loop: "LoopSettings", student: "PreTrainedModel", teacher: "PreTrainedModel | None", examples: int
    ) -> None:
        """Raise InputError without a teacher model."""
        if teacher is None:
            raise InputError("seqkd's teacher writes text, so it needs the model", where="teacher.model")

    def notes(self, features: "Callable[[], Dataset]", max_length: int) -> list[str]:
        """Say how much the teacher writes."""
        rows = features()
        most = sum(
            max(0, min(self.max_new_tokens or max_length, max_length - prompt)) for prompt in prompt_lengths(rows)
        )
        return [f"the teacher writes {counted(len(rows), 'response')}, at most {counted(most, 'token')} together"]

    def begin(self, setting: Setting) -> Dataset:
        """Let the teacher write, or read what it has written. Raises RunError where it writes no text at all."""
        rows = super().begin(setting)
        assert setting.teacher is not None
        written = stored(self._written(setting, setting.teacher, rows))
        if not len(written):
            raise RunError(
                "the teacher ends every response before its first word",
                hint="is it trained on such prompts? Compare task.template with the one of its training",
            )
        return written

    def _written(self, setting: Setting, teacher: "PreTrainedModel", rows: Dataset) -> Iterator[pa.RecordBatch]:
        processor, kind = setting.processor, setting.task.kind
        end = frozenset(kind.end_tokens(processor, teacher.config))  # type: ignore[attr-defined]
        writing = Writing(
            self.sampling,
            self.max_new_tokens or setting.max_length,
            setting.max_length,
            self.seed,
            end,
            processor.pad_token_id,
        )
        total = tokens = empty = unended = 0
        schema = rows.features.arrow_schema
        for part, prompts, responses in responses_to(
            rows,
            teacher,
            writing,
            batch_size=setting.loop.eval_batch_size,
            device=setting.loop.device,
            use_cache=setting.cache,
            console=setting.console,
        ):
            found = []
            for row, prompt, response in zip(part, prompts, responses, strict=True):
                total, tokens = total + 1, tokens + len(response)
                ended = bool(response) and response[-1] in end
                if not processor.decode(response[:-1] if ended else response, skip_special_tokens=True).strip():
                    empty += 1
                    continue
                unended += not ended
                found.append(with_response(row, prompt, response))
            yield pa.RecordBatch.from_pylist(found, schema)
        message = f"the teacher has written {counted(total, 'response')}, {counted(tokens, 'token')}"
        if empty:
            message += f"; {empty:,} without text are left out"
        if unended:
            message += f"; {unended:,} reach a limit before their end"
        tell(setting.console, message)
