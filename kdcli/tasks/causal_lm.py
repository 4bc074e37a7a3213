"""Causal language modelling: plain text, of which a model predicts each next token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdcli.recipe.schema import TaskSection
from kdcli.tasks.generated import GeneratingKind
from kdcli.tasks.plain_text import PlainText, PlainTextFields

if TYPE_CHECKING:
    from datasets import Dataset

    from kdcli.tasks.base import Task


class CausalFields(PlainTextFields):
    """The column of text."""

    def check(self, task: TaskSection) -> None:
        if task.test is not None:
            raise ValueError("plain text has no test file; held-out text is scored: give it as validation")


class CausalLM(GeneratingKind, PlainText):
    """Plain text in blocks, with the end-of-text token between documents; every next token is predicted."""

    name = "causal-lm"
    title = "plain text, continued token by token"
    fields = CausalFields
    provides = frozenset({"labels", "vocabulary"})
    metrics = usual_metrics = ("perplexity", "accuracy")
    closed = False
    answer = "continuation"

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.tasks.templates import end_of_text

        end_of_text(processor)
        super().check(task, processor, max_length)

    def claims(self, processor: Any) -> bool:
        return not getattr(processor, "chat_template", None)

    def prompts(self, rows: "Dataset", processor: Any, max_length: int) -> list[list[int]]:
        """Return the tokens of the beginning of each text, at most half of `max_length`."""
        from kdcli.data.rows import values_of
        from kdcli.tasks.packing import frame_of

        before, texts = frame_of(processor)[0], list(values_of(rows, "text"))
        encoded = processor(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [[*before, *ids][: max(1, max_length // 2)] for ids in encoded["input_ids"]]

    def end_tokens(self, processor: Any, config: Any) -> set[int]:
        """Return the tokens that end a text."""
        from kdcli.tasks.next_tokens import ends_of

        return ends_of(processor, config)

    def answers(self, model: Any, rows: "Dataset", processor: Any, *, max_length: int, ask: Any, **options: Any) -> Any:
        """Return the losses of each block of all rows."""
        from kdcli.tasks.next_tokens import losses_of

        features = self.encode(rows, processor, max_length)
        return losses_of(model, features, self.collator(processor), ask=ask, **options)

    def score(self, answers: Any, rows: "Dataset", labels: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
        from kdcli.tasks.next_tokens import scores_of

        found = scores_of(answers)
        return {name: found[name] for name in metrics}

    # Texts that are continued

    written = "tokenizer.decode(ids).removeprefix(tokenizer.decode(prompt))"

    def layout(self, processor: Any) -> tuple[list[int], str, str]:
        from kdcli.tasks.packing import frame_of

        return frame_of(processor)[0], "", ""

    def prompts_of(self, rows: "Dataset", processor: Any, room: int) -> list[list[int]]:
        """Return the tokens of each text; of one that is too long the last ones."""
        from kdcli.data.rows import values_of
        from kdcli.tasks.packing import frame_of

        before, texts = frame_of(processor)[0], list(values_of(rows, "text"))
        encoded = processor(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [[*before, *ids[-max(1, room - len(before)) :]] for ids in encoded["input_ids"]]

    def text_of(self, prompt: list[int], ids: list[int], processor: Any) -> str:
        """Return the continuation of a text with the white space between them."""
        before, whole = (processor.decode(each, skip_special_tokens=True) for each in (prompt, prompt + ids))
        return whole.removeprefix(before)


KIND = CausalLM()
