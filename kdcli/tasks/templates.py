"""From conversations to tokens: by a tokenizer's chat template, or in the Alpaca layout."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kdcli.errors import InputError, cut
from kdcli.tasks.conversations import Message
from kdcli.tasks.packing import frame_of

Turns = Literal["all", "last"]

WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
WITHOUT_CONTEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
"""What stands before an instruction (Taori et al. 2023, Stanford Alpaca), unless a system prompt does."""


@dataclass(frozen=True)
class Tokens:
    """A conversation as a model reads it. spans: of the tokens that have a loss, each a response with its end token."""

    ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def prompt(self) -> int:
        """How many tokens come before the first response that has a loss."""
        return self.spans[0][0]


class Template(ABC):
    """How conversations are written as tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def ends(self) -> set[int]:
        """The tokens that may end a response."""

    @abstractmethod
    def tokens(self, conversations: Sequence[list[Message]], turns: Turns) -> list[Tokens]:
        """Return conversations that end with a response; turns: which of the responses have a loss."""

    @abstractmethod
    def prompts(self, conversations: Sequence[list[Message]]) -> list[list[int]]:
        """Return conversations that end with a user's turn, up to where a response begins."""

    @abstractmethod
    def texts(self, messages: Sequence[Message]) -> list[str]:
        """Return what the tokenizer gets of a conversation, each text by itself."""

    @abstractmethod
    def layout(self, messages: list[Message]) -> tuple[list[int], str]:
        """Return a prompt as the special tokens before it, and its text."""

    def ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Return texts as tokens, none added."""
        texts = list(texts)
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


class Alpaca(Template):
    """Instruction, input and response under headings, and the end-of-text token after each response."""

    @property
    def ends(self) -> set[int]:
        return {end_of_text(self.tokenizer)}

    def tokens(self, conversations: Sequence[list[Message]], turns: Turns) -> list[Tokens]:
        before, end = frame_of(self.tokenizer)[0], end_of_text(self.tokenizer)
        pieces = [_pieces(messages) for messages in conversations]
        ids = iter(self.ids(text for each in pieces for text in each))
        found = []
        for each in pieces:
            row, spans = list(before), []
            # Every other piece is a response.
            for place in range(len(each)):
                start = len(row)
                row += next(ids)
                if place % 2:
                    row.append(end)
                    spans.append((start, len(row)))
            found.append(Tokens(row, spans if turns == "all" else spans[-1:]))
        return found

    def prompts(self, conversations: Sequence[list[Message]]) -> list[list[int]]:
        # A response that is not there yet: what comes before it is the prompt.
        started = [[*messages, Message("assistant", "")] for messages in conversations]
        return [tokens.ids[: tokens.prompt] for tokens in self.tokens(started, "last")]

    def texts(self, messages: Sequence[Message]) -> list[str]:
        return _pieces(messages)

    def layout(self, messages: list[Message]) -> tuple[list[int], str]:
        return frame_of(self.tokenizer)[0], _pieces(messages)[-1]


def _pieces(messages: Sequence[Message]) -> list[str]:
    """Return the texts of prompts and responses by turns."""
    system = messages[0].content if messages[0].role == "system" else None
    found = []
    for message in messages:
        if message.role == "assistant":
            found.append(message.content)
        elif message.role == "user":
            beside = message.context
            preamble = system or (WITHOUT_CONTEXT if beside is None else WITH_CONTEXT)
            start = preamble if not found else ""
            middle = "" if beside is None else f"### Input:\n{beside}\n\n"
            found.append(f"{start}\n\n### Instruction:\n{message.content}\n\n{middle}### Response:\n")
    return found


class Chat(Template):
    """A tokenizer's own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.special = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    @property
    def ends(self) -> set[int]:
        """The end-of-text token, and the one with which the template ends a response."""
        example = [Message("user", "a"), Message("assistant", "b")]
        tokens = self.tokens([example], "all")[0]
        eos = self.tokenizer.eos_token_id
        return {tokens.ids[tokens.spans[-1][1] - 1]} | ({eos} if eos is not None else set())

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return a conversation as text. prompt: up to where a response begins."""
        import jinja2

        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InputError(
                f"the chat template refuses a conversation of {', '.join(turn['role'] for turn in turns)}: "
                f"{cut(str(error))}",
                where="task.template",
                hint='leave out task.system where it takes no system prompt, or use template = "alpaca"',
            ) from error

    def tokens(self, conversations: Sequence[list[Message]], turns: Turns) -> list[Tokens]:
        texts, responses = [], []
        for messages in conversations:
            places = [place for place, message in enumerate(messages) if message.role == "assistant"]
            places = places if turns == "all" else places[-1:]
            responses.append(len(places))
            texts.append(self.text(messages))
            for place in places:
                texts.append(self.text(messages[:place], prompt=True))
                # With its last response a conversation is whole.
                texts += [self.text(messages[: place + 1])] if place + 1 < len(messages) else []
        ids = iter(self.ids(texts))
        found = []
        for count in responses:
            whole, spans = next(ids), []
            for number in range(count):
                start = self._prefix(next(ids), whole)
                end = self._prefix(next(ids), whole) if number + 1 < count else len(whole)
                spans.append((start, self._end(whole, start, end)))
            found.append(Tokens(whole[: spans[-1][1]], spans))
        return found

    def _prefix(self, part: list[int], whole: list[int]) -> int:
        """Return the length of a part. Raises InputError where the whole does not begin with it."""
        if whole[: len(part)] == part:
            return len(part)
        place = next((i for i, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other), len(whole))
        raise InputError(
            "the chat template writes a prompt in other tokens than the same with its response (from token "
            f"{place + 1} on: {cut(repr(self.tokenizer.decode(part[place:])))} and "
            f"{cut(repr(self.tokenizer.decode(whole[place:])))}), so that it is not known where the response begins",
            where="task.template",
            hint='use template = "alpaca"; or turns = "last", where it is about earlier responses',
        )

    def _end(self, whole: list[int], start: int, end: int) -> int:
        """Return where a response ends: after its last special token, not after the line break behind that."""
        for place in range(end, start, -1):
            if whole[place - 1] in self.special:
                return place
        raise InputError(
            "the chat template writes no end token after a response, so that a model could not learn to stop",
            where="task.template",
            hint='use template = "alpaca"',
        )

    def prompts(self, conversations: Sequence[list[Message]]) -> list[list[int]]:
        return self.ids(self.text(messages, prompt=True) for messages in conversations)

    def texts(self, messages: Sequence[Message]) -> list[str]:
        return [self.text(messages)]

    def layout(self, messages: list[Message]) -> tuple[list[int], str]:
        return [], self.text(messages, prompt=True)


def end_of_text(tokenizer: Any) -> int:
    """Return the token that ends a text. Raises InputError where there is none."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "the tokenizer has no end-of-text token, so that a model could not learn to stop",
        where="teacher.tokenizer",
        hint="name it in tokenizer_config.json (eos_token), as it was in training",
    )


def template_of(tokenizer: Any, wanted: str) -> Template:
    """Return how conversations are written. wanted: "auto", "chat" or "alpaca".

    Raises InputError for a tokenizer without a chat template where that is wanted, and without an end-of-text token.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if wanted == "chat" and not has:
        raise InputError(
            "the tokenizer has no chat template", where="task.template", hint='use template = "auto" or "alpaca"'
        )
    if has and wanted != "alpaca":
        return Chat(tokenizer)
    end_of_text(tokenizer)
    return Alpaca(tokenizer)


def shortened(messages: list[Message], excess: int, tokenizer: Any) -> list[Message] | None:
    """Return a prompt without `excess` of its tokens, about; None where nothing is left to be left out.

    Of several turns the oldest go first; then the end of the context, and of the instruction.
    """
    system = [message for message in messages if message.role == "system"]
    turns = messages[len(system) :]
    if len(turns) > 1:
        return [*system, *turns[2:]]
    (last,) = turns
    text = last.context if last.context is not None else last.content
    kept = _without_end(text, excess, tokenizer)
    if last.context is not None:
        return [*system, replace(last, context=kept or None)]
    return [*system, replace(last, content=kept)] if kept else None


def _without_end(text: str, excess: int, tokenizer: Any) -> str:
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    count = len(ids["input_ids"]) - excess
    if count <= 0:
        return ""
    if tokenizer.is_fast:
        return text[: ids["offset_mapping"][count - 1][1]].rstrip()
    return tokenizer.decode(ids["input_ids"][:count]).rstrip()
