"""Following instructions: prompts, and the responses that a causal language model is to write."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kdcli.data.columns import Column, Columns, is_missing
from kdcli.errors import InputError
from kdcli.recipe.schema import TaskSection, Tokens
from kdcli.tasks.conversations import Message, column_of_messages, messages_of, prompt_of, read_conversations
from kdcli.tasks.generated import GeneratingKind, GenerationFields
from kdcli.words import counted, joined

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from rich.console import Console

    from kdcli.tasks.base import Task
    from kdcli.tasks.fitting import Fitted

TEXT_METRICS = frozenset({"rouge_l", "exact_match"})
MARK = "<instruction>"
"""Where an instruction stands in a prompt whose layout is asked for."""

MOST_KEPT = 16
"""Encoded sets of rows that a kind remembers: those of a plan are those of its run."""


class InstructFields(GenerationFields):
    """The columns of conversations, how they are written as tokens, and what becomes of those that are too long."""

    columns_of_rows = frozenset({"instruction", "context", "response", "messages"})

    instruction: str | None = Field(
        default=None, description="The column of instructions. Left out, the one named instruction."
    )
    context: str | None = Field(
        default=None,
        description="The column of what an instruction is about; empty where there is nothing. Left out, the one named "
        "context, if there is one.",
    )
    response: str | None = Field(
        default=None,
        description="The column of responses: a text, or a list of texts that are all right, of which the first is "
        "trained on. Left out, the one named response.",
    )
    messages: str | None = Field(
        default=None,
        description="The column of conversations, lists of {role, content} with the roles system, user and assistant, "
        "in place of the three columns. Left out, the one named messages, where there is none named instruction.",
    )
    system: str | None = Field(
        default=None,
        description="The system prompt of conversations without one of their own. Left out, that of the chat template, "
        "or none.",
    )
    template: Literal["auto", "chat", "alpaca"] = Field(
        default="auto",
        description='How conversations are written: "chat" by the chat template of the tokenizer, "alpaca" in the '
        'layout of Stanford Alpaca; "auto" takes the chat template where there is one.',
    )
    turns: Literal["all", "last"] = Field(
        default="all", description="Which responses of a conversation of several turns are trained on."
    )
    too_long: Literal["cut", "drop"] = Field(
        default="cut",
        description='What becomes of a training or held-out row that is too long: "drop" leaves it out; "cut" cuts a '
        "response at max_length, and of a prompt the oldest turns, or the end of its context or instruction.",
    )
    max_prompt_length: Tokens | None = Field(
        default=None, description="Longest prompt in tokens, of max_length in all. Left out, half of max_length."
    )

    def check(self, task: TaskSection) -> None:
        super().check(task)
        columns = [name for name in ("instruction", "context", "response") if getattr(self, name) is not None]
        if self.messages is not None and columns:
            raise ValueError(f"give messages or {columns[0]}, not both: messages hold whole conversations")
        if self.max_prompt_length is not None and self.max_prompt_length >= task.max_length:
            raise ValueError(
                f"max_prompt_length = {self.max_prompt_length} leaves no token of max_length = {task.max_length} for a "
                "response"
            )


class Instruct(GeneratingKind):
    """A prompt, and the response to it. The loss is that of the response and its end token."""

    name = "instruct"
    title = "a response to an instruction, written token by token"
    fields = InstructFields
    provides = frozenset({"labels", "vocabulary", "prompts"})
    metrics = ("rouge_l", "exact_match", "perplexity", "accuracy")
    usual_metrics = ("rouge_l", "exact_match", "perplexity")
    answer = "response"

    def __init__(self, fields: InstructFields | None = None) -> None:
        """fields: of the task; None for their defaults."""
        self.own = fields or InstructFields()
        self._encoded: dict[Any, tuple[Any, Fitted]] = {}

    def with_fields(self, fields: Any) -> "Instruct":
        return type(self)(fields)

    # Rows

    def splits(self, section: TaskSection, fields: Any, base: Any, notes: list[str]) -> tuple[dict[str, Columns], str]:
        from kdcli.data.instructions import read_folder

        if not section.is_own and (found := read_folder(section.name)) is not None:
            return found, f"instruct/{section.name}"
        return super().splits(section, fields, base, notes)

    def read(
        self, columns: Columns, fields: Any, source: str, notes: list[str], labels: tuple[str, ...] | None = None
    ) -> "tuple[pa.Table, tuple[str, ...]]":
        """Return conversations that end with a response, and all right ones."""
        rows = read_conversations(columns, fields, source)
        if not len(rows):
            raise InputError(f"{source} has no rows", where="task")
        return rows, ()

    def read_for(self, config: Any, columns: Columns, fields: Any, source: str, notes: list[str], *_: Any) -> Any:
        return self.read(columns, fields, source, notes)

    def has_answers(self, columns: Columns, fields: Any) -> bool:
        if (name := column_of_messages(columns, fields)) is not None:
            return any(value and value[-1]["role"] == "assistant" for value in columns.get(name, Column()))
        return not all(map(is_missing, columns.get(fields.response or "response", Column())))

    def claims(self, processor: Any) -> bool:
        return bool(getattr(processor, "chat_template", None))

    # What a model reads

    def check(self, task: "Task", processor: Any, max_length: int) -> None:
        from kdcli.tasks.templates import template_of

        template = template_of(processor, self.own.template)
        assert template.ends
        by_loss, by_text = self._scored_by(task)
        sets = {"training": task.train, "held-out": task.selection} if task.trains else {}
        for name, rows in (sets | (task.report if by_loss else {})).items():
            with _named(name):
                self.fit(rows, processor, max_length)
        for name, rows in task.report.items() if by_text else ():
            with _named(name):
                self.prompts(rows, processor, max_length)

    def remarks(self, task: "Task", processor: Any, max_length: int) -> list[str]:
        """Return how many rows are cut or dropped, and how many texts are written for each score of a model."""
        found = []
        for name, rows in (("training", task.train), ("held-out", task.selection)):
            found += self.fit(rows, processor, max_length).notes(name)
        return found + self.remarks_on_report(task, processor, max_length)

    def remarks_on_report(self, task: "Task", processor: Any, max_length: int) -> list[str]:
        """Return how many rows are cut or dropped of each set, and how many texts are written for the scores."""
        by_loss, by_text = self._scored_by(task)
        found = []
        for name, rows in task.report.items():
            if by_loss:
                fit = self.fit(rows, processor, max_length)
                found += fit.notes(name)
                if by_text and (left := len(fit.features)) < fit.rows:
                    found.append(
                        f"{name}: {joined(by_loss)} of the {counted(left, 'row')} left, {joined(by_text)} of all "
                        f"{fit.rows:,}, whose prompts are cut"
                    )
            else:
                # Of a text only the prompt can be too long.
                fit = type(self)(self.own.model_copy(update={"too_long": "cut"})).fit(rows, processor, max_length)
                kept = Counter({key: count for key, count in fit.counts.items() if key == "cut prompt"})
                found += replace(fit, counts=kept).notes(name)
        texts = sum(map(len, task.report.values())) * len(self.own.writings)
        if texts and by_text:
            most = self.own.max_new_tokens or max_length
            found.append(f"scores: each model writes {counted(texts, 'text')} of at most {counted(most, 'token')}")
        return found

    def _scored_by(self, task: "Task") -> tuple[list[str], list[str]]:
        """Return the metrics of losses, which are of the rows that are left, and those of texts, which are of all."""
        return (
            [name for name in task.metrics if name not in TEXT_METRICS],
            [name for name in task.metrics if name in TEXT_METRICS],
        )

    def fit(self, rows: "Dataset", processor: Any, max_length: int) -> "Fitted":
        """Return rows as features, and how many had to be cut or dropped. What it returned last it remembers."""
        from kdcli.tasks.fitting import fitted

        key = (rows._fingerprint, id(processor), max_length)
        if key not in self._encoded:
            while len(self._encoded) >= MOST_KEPT:
                del self._encoded[next(iter(self._encoded))]
            # The tokenizer is held, so that its id stays its own.
            self._encoded[key] = processor, fitted(rows, processor, max_length, self.own)
        return self._encoded[key][1]

    def encode(self, rows: "Dataset", processor: Any, max_length: int) -> "Dataset":
        """Return conversations as tokens, with labels where a response is."""
        return self.fit(rows, processor, max_length).features

    def texts(self, rows: "Dataset") -> Iterator[str]:
        from kdcli.data.rows import values_of

        return (message.text for row in values_of(rows, "messages") for message in messages_of(row))

    def texts_read(self, rows: "Dataset", processor: Any) -> Iterator[str]:
        from kdcli.data.rows import values_of
        from kdcli.tasks.templates import template_of

        template = template_of(processor, self.own.template)
        return (text for row in values_of(rows, "messages") for text in template.texts(messages_of(row)))

    def examples(self, rows: "Dataset", processor: Any, max_length: int) -> int:
        return len(self.encode(rows, processor, max_length))

    def fewer(self, rows: "Dataset", processor: Any, max_length: int, metrics: Sequence[str]) -> dict[str, int]:
        """Return how many rows are left, of the metrics of losses, where some are dropped."""
        losses = [name for name in metrics if name not in TEXT_METRICS]
        left = self.examples(rows, processor, max_length) if losses else len(rows)
        return dict.fromkeys(losses, left) if left < len(rows) else {}

    def drawn(self, fields: Any) -> dict[str, Any]:
        return fields.model_dump(include={"template", "turns", "too_long", "max_prompt_length"})

    def prompts(self, rows: "Dataset", processor: Any, max_length: int) -> list[list[int]]:
        """Return the tokens of each row's last prompt, up to where the response begins; what is too long is cut."""
        from kdcli.data.rows import values_of
        from kdcli.tasks.fitting import prompts_within

        conversations = [prompt_of(messages_of(row)) for row in values_of(rows, "messages")]
        return prompts_within(conversations, processor, max_length, self.own)

    def prompts_of(self, rows: "Dataset", processor: Any, room: int) -> list[list[int]]:
        """Return the tokens of each conversation, up to where the response begins; what is too long is cut."""
        return type(self)(self.own.model_copy(update={"max_prompt_length": room})).prompts(rows, processor, room + 1)

    def end_tokens(self, processor: Any, config: Any) -> set[int]:
        """Return the tokens that end a response: those of the template, and of the model's configuration."""
        from kdcli.tasks.next_tokens import ends_of
        from kdcli.tasks.templates import template_of

        return template_of(processor, self.own.template).ends | ends_of(processor, config)

    # What a model writes

    def evaluate(
        self,
        model: Any,
        rows: "Dataset",
        processor: Any,
        labels: Sequence[str],
        metrics: Sequence[str],
        *,
        max_length: int,
        ask: Any,
        generate: "Callable[..., list[list[int]]] | None" = None,
        console: "Console | None" = None,
        by_class: Any = None,
        **options: Any,
    ) -> dict[str, float]:
        """Return the scores of the texts that a model writes, and those of its losses on the right responses.

        Texts are only written where some metric is of them.
        """
        from kdcli.data.rows import values_of
        from kdcli.tasks.generated import score_texts
        from kdcli.tasks.next_tokens import losses_of, scores_of

        found: dict[str, float] = {}
        if not TEXT_METRICS.isdisjoint(metrics):
            prompts = self.prompts(rows, processor, max_length)
            how = {"max_length": max_length, "generate": generate, "console": console, **options}
            texts = [
                [reply[self.answer] for reply in self.write(model, prompts, processor, writing, **how)]
                for writing in self.own.writings
            ]
            found |= score_texts(texts, list(values_of(rows, "references")))
        if not TEXT_METRICS.issuperset(metrics):
            features = self.encode(rows, processor, max_length)
            found |= scores_of(losses_of(model, features, self.collator(processor), ask=ask, **options))
        return {name: value for name, value in found.items() if name.partition("/")[0] in metrics}

    def doubt(self, score: float, sets: "Sequence[Dataset]", labels: Sequence[str], metric: str) -> str | None:
        """Return what may be wrong where no text has anything right; texts have no level of chance."""
        if metric not in TEXT_METRICS or score > 0:
            return None
        return (
            "as a model that cannot do the task. Is it trained on such prompts? Compare task.template and "
            "task.max_new_tokens with those of its training"
        )

    # Prompts without responses

    def layout(self, processor: Any) -> tuple[list[int], str, str] | None:
        from kdcli.tasks.templates import template_of

        system = [Message("system", self.own.system)] if self.own.system is not None else []
        first, text = template_of(processor, self.own.template).layout([*system, Message("user", MARK)])
        before, mark, after = text.partition(MARK)
        return (first, before, after) if mark and MARK not in after else None

    def inputs(self, fields: Any) -> dict[str, str]:
        if fields.messages is not None:
            return {"messages": fields.messages}
        return {name: getattr(fields, name) or name for name in ("instruction", "context")}

    def optional_inputs(self, fields: Any) -> frozenset[str]:
        return frozenset({"context"})

    def read_inputs(self, columns: Columns, fields: Any, source: str, notes: list[str]) -> "pa.Table":
        """Return conversations; a text in place of one is a user's turn."""
        if (name := fields.messages) is not None and name in columns:
            turns = ([{"role": "user", "content": each}] if isinstance(each, str) else each for each in columns[name])
            columns = {**columns, name: Column.of(turns)}
        return read_conversations(columns, fields, source, answered=False)

    def shown_inputs(self, rows: "pa.Table", fields: Any) -> list[dict[str, Any]]:
        """Return the instruction and what it is about; of a conversation with other turns all of them."""
        found: list[dict[str, Any]] = []
        for row in rows.column("messages").to_pylist():
            messages = [message for message in messages_of(row) if message.content != fields.system]
            if len(messages) == 1:
                beside = {"context": messages[0].context} if messages[0].context is not None else {}
                found.append({"instruction": messages[0].content, **beside})
            else:
                found.append({"messages": [{"role": each.role, "content": each.text} for each in messages]})
        return found


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let errors about rows say of which set they are."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error.message}", where=error.where, hint=error.hint) from error


KIND = Instruct()
