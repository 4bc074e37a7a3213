"""Conversations as features of at most so many tokens: what is too long is cut or dropped, and counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdcli.data.rows import batches_of, stored
from kdcli.errors import InputError
from kdcli.tasks.conversations import Message, messages_of
from kdcli.tasks.encode import IDS
from kdcli.tasks.next_tokens import IGNORED
from kdcli.tasks.templates import Template, Tokens, shortened, template_of
from kdcli.words import counted

if TYPE_CHECKING:
    from datasets import Dataset

    from kdcli.tasks.instruct import InstructFields


@dataclass(frozen=True)
class Fitted:
    """Rows as features: index, input_ids, attention_mask, labels and length. rows, counts: how many there were, and how
    many of them were too long, by what became of them; limits: of a prompt, and in all."""

    features: "Dataset"
    rows: int
    counts: Counter[str]
    limits: tuple[int, int]

    def notes(self, name: str) -> list[str]:
        """Return how many rows were cut and dropped. name: what the rows are."""
        prompt, whole = (counted(limit, "token") for limit in self.limits)
        said = {
            "cut prompt": f"prompts cut to {prompt}",
            "cut": f"responses cut at {whole} in all",
            "dropped prompt": f"rows with prompts of more than {prompt} left out",
            "dropped": f"rows of more than {whole} in all left out",
        }
        found = ((self.counts[key], what) for key, what in said.items())
        return [f"{name}: {what}: {count:,} of {self.rows:,}" for count, what in found if count]


def prompt_limit(max_length: int, fields: "InstructFields") -> int:
    """Return how many tokens a prompt may have."""
    return min(fields.max_prompt_length or max_length // 2, max_length - 1)


def fitted(rows: "Dataset", tokenizer: Any, max_length: int, fields: "InstructFields") -> Fitted:
    """Return conversations as features of at most `max_length` tokens.

    Raises InputError where none is left, and for a prompt that cannot be cut to its limit.
    """
    template = template_of(tokenizer, fields.template)
    counts: Counter[str] = Counter()
    limits = (prompt_limit(max_length, fields), max_length)
    features = stored(_batches(rows, template, limits, fields, counts))
    if not len(features):
        raise InputError(
            f"none of {counted(len(rows), 'row')} is left: all have more than {limits[0]} tokens of prompt or "
            f"{limits[1]} in all",
            where="task.max_length",
            hint='give more, or too_long = "cut"',
        )
    return Fitted(features, len(rows), counts, limits)


def _batches(
    rows: "Dataset", template: Template, limits: tuple[int, int], fields: "InstructFields", counts: Counter[str]
) -> Iterator[pa.RecordBatch]:
    for batch in batches_of(rows):
        conversations = list(map(messages_of, batch["messages"]))
        found, kept = template.tokens(conversations, fields.turns), []
        for index, messages, tokens in zip(batch["index"], conversations, found, strict=True):
            fitting = _fit(messages, tokens, template, limits, fields, counts, index)
            if fitting is not None:
                kept.append((index, fitting))
        ids = [tokens.ids for _, tokens in kept]
        yield pa.RecordBatch.from_pydict(
            {
                "index": pa.array([index for index, _ in kept], pa.int64()),
                "input_ids": pa.array(ids, IDS["input_ids"]),
                "attention_mask": pa.array([[1] * len(row) for row in ids], IDS["attention_mask"]),
                "labels": pa.array([_labels(tokens) for _, tokens in kept], IDS["input_ids"]),
                "length": pa.array([len(row) for row in ids], pa.int32()),
            }
        )


def _labels(tokens: Tokens) -> list[int]:
    labels = [IGNORED] * len(tokens.ids)
    for start, end in tokens.spans:
        labels[start:end] = tokens.ids[start:end]
    return labels


def _fit(
    messages: list[Message],
    tokens: Tokens,
    template: Template,
    limits: tuple[int, int],
    fields: "InstructFields",
    counts: Counter[str],
    index: int,
) -> Tokens | None:
    """Return a conversation that is not too long; None where it is dropped."""
    prompt, whole = limits
    if tokens.prompt > prompt:
        if fields.too_long == "drop":
            counts["dropped prompt"] += 1
            return None
        counts["cut prompt"] += 1
        place = _place_of_response(messages, fields)
        while tokens.prompt > prompt:
            before = _shorter(messages[:place], tokens.prompt - prompt, template, prompt, index)
            messages, place = [*before, *messages[place:]], len(before)
            tokens = template.tokens([messages], fields.turns)[0]
    if len(tokens.ids) > whole:
        if fields.too_long == "drop":
            counts["dropped"] += 1
            return None
        counts["cut"] += 1
        spans = [(start, min(end, whole)) for start, end in tokens.spans if start < whole]
        tokens = Tokens(tokens.ids[:whole], spans)
    return tokens


def _place_of_response(messages: Sequence[Message], fields: "InstructFields") -> int:
    """Return the place of the first response that has a loss."""
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    return places[0] if fields.turns == "all" else places[-1]


def _shorter(messages: list[Message], excess: int, template: Template, limit: int, index: int) -> list[Message]:
    found = shortened(messages, excess, template.tokenizer)
    if found is None:
        raise InputError(
            f"the prompt of row {index + 1} is longer than {counted(limit, 'token')} even without its instruction",
            where="task.max_prompt_length",
            hint="give more tokens, or a shorter system prompt",
        )
    return found


def prompts_within(
    conversations: Sequence[list[Message]], tokenizer: Any, max_length: int, fields: "InstructFields"
) -> list[list[int]]:
    """Return prompts as tokens, each of at most its limit; what is too long is cut."""
    template = template_of(tokenizer, fields.template)
    limit = prompt_limit(max_length, fields)
    found = template.prompts(conversations)
    for place, messages in enumerate(conversations):
        while len(found[place]) > limit:
            messages = _shorter(messages, len(found[place]) - limit, template, limit, place)
            found[place] = template.prompts([messages])[0]
    return found
