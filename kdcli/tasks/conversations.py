"""Rows of conversations: instructions with responses in columns, or lists of messages."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kdcli.data.columns import Column, Columns, chunked, is_missing, need_column
from kdcli.errors import InputError, cut

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation. context: what an instruction is about, where it stands in a column of its own."""

    role: str
    content: str
    context: str | None = None

    @property
    def text(self) -> str:
        """The turn as one text."""
        return self.content if self.context is None else f"{self.content}\n\n{self.context}"


def messages_of(row: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Return a row's `messages`."""
    return [Message(**each) for each in row]


def prompt_of(messages: list[Message]) -> list[Message]:
    """Return a conversation up to its last user's turn: what is answered."""
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    return messages[: last + 1]


def column_of_messages(columns: Columns, fields: Any) -> str | None:
    """Return the column of lists of messages; None where instructions and responses have columns of their own."""
    if fields.messages is not None:
        return fields.messages
    named = fields.instruction or fields.context or fields.response
    return "messages" if not named and "messages" in columns and "instruction" not in columns else None


def read_conversations(columns: Columns, fields: Any, source: str, *, answered: bool = True) -> "pa.Table":
    """Return the columns `messages` (role, content, context) and, where `answered`, `references`.

    The references are all right responses, of which the first one is the last turn. Raises InputError, with the row,
    for what is no conversation, for an empty turn, and where there is no response.
    """
    import pyarrow as pa

    name = column_of_messages(columns, fields)
    rows = (
        _of_messages(need_column(columns, name, "messages", source), source, answered)
        if name is not None
        else _of_columns(columns, fields, source, answered)
    )
    if fields.system is not None:
        rows = ((_with_system(messages, fields.system), references) for messages, references in rows)
    text = pa.large_string()
    turn = pa.struct({"role": pa.string(), "content": text, "context": text})
    parts: dict[str, list[pa.Array]] = {"messages": [], "references": []}
    for chunk in chunked(rows):
        parts["messages"].append(pa.array([list(map(asdict, messages)) for messages, _ in chunk], pa.list_(turn)))
        parts["references"].append(pa.array([references for _, references in chunk], pa.list_(text)))
    types = {"messages": pa.list_(turn), "references": pa.list_(text)}
    table = pa.table({key: pa.chunked_array(found, types[key]) for key, found in parts.items()})
    return table if answered else table.drop_columns("references")


def _with_system(messages: list[Message], system: str) -> list[Message]:
    return messages if messages[0].role == "system" else [Message("system", system), *messages]


def _of_columns(
    columns: Columns, fields: Any, source: str, answered: bool
) -> Iterator[tuple[list[Message], list[str]]]:
    instructions = need_column(columns, fields.instruction or "instruction", "instruction", source)
    contexts: Iterable[Any] = [None] * len(instructions)
    if fields.context is not None or "context" in columns:
        contexts = need_column(columns, fields.context or "context", "context", source)
    responses: Iterable[Any] = [None] * len(instructions)
    if answered:
        responses = need_column(columns, fields.response or "response", "response", source)
    rows = enumerate(zip(instructions, contexts, responses, strict=True), 1)
    for row, (instruction, context, response) in rows:
        content = _text(instruction, source, row, "instruction", "instruction")
        beside = None if is_missing(context) else _text(context, source, row, "context", "context")
        messages, references = [Message("user", content, beside)], []
        if answered:
            values = response if isinstance(response, list) else [response]
            references = [_text(value, source, row, "response", "response") for value in values or [None]]
            messages.append(Message("assistant", references[0]))
        yield messages, references


def _text(value: Any, source: str, row: int, what: str, field: str) -> str:
    """Return a text without the white space around it."""
    if is_missing(value):
        raise InputError(f"{source}: row {row} has an empty {what}", where=f"task.{field}", hint="remove the row")
    if isinstance(value, list | dict | bytes):
        raise InputError(
            f"{source}: row {row} has {cut(repr(value))} as its {what}, not a text",
            where=f"task.{field}",
            hint="lists of messages are read from the column that task.messages names" if what != "response" else None,
        )
    return str(value).strip()


def _of_messages(values: Column, source: str, answered: bool) -> Iterator[tuple[list[Message], list[str]]]:
    for row, value in enumerate(values, 1):
        messages = _messages(value, f"{source}: row {row}")
        if answered and messages[-1].role != "assistant":
            raise InputError(
                f"{source}: row {row} ends with a turn of the {messages[-1].role}, not with a response",
                where="task.messages",
                hint="the last message of a conversation is the assistant's: remove the row, or what comes after it",
            )
        if not answered:
            messages = prompt_of(messages)
        yield messages, [messages[-1].content] if answered else []


def _messages(value: Any, place: str) -> list[Message]:
    """Return a conversation. Raises InputError for what is none."""
    where = "task.messages"
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value) or not value:
        raise InputError(
            f"{place} has {cut(repr(value))} as its messages, not a list of {{role, content}}",
            where=where,
            hint='give such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    messages = []
    for number, each in enumerate(value, 1):
        if not {"role", "content"} <= each.keys():
            raise InputError(
                f"{place}: message {number} has {', '.join(map(repr, each))}, not role and content", where=where
            )
        role, content = each["role"], each["content"]
        if role not in ROLES:
            raise InputError(
                f"{place}: message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}",
                where=where,
                hint="rename it, or remove the row",
            )
        if not isinstance(content, str) or not content.strip():
            said = "no content" if not content or isinstance(content, str) else f"{cut(repr(content))} as its content"
            what = "response" if role == "assistant" else f"message of the {role}"
            raise InputError(f"{place}: message {number}, a {what}, has {said}", where=where, hint="remove the row")
        if role == "system" and number > 1:
            raise InputError(f"{place}: message {number} is a system prompt, which comes first", where=where)
        messages.append(Message(role, content.strip()))
    turns = [message.role for message in messages if message.role != "system"]
    for before, (role, wanted) in enumerate(zip(turns, ("user", "assistant") * len(turns), strict=False)):
        if role != wanted:
            number = before + 1 + len(messages) - len(turns)
            raise InputError(
                f"{place}: message {number} is the {role}'s; turns of user and assistant take turns, the user's first",
                where=where,
            )
    if not turns:
        raise InputError(f"{place} has a system prompt alone", where=where, hint="remove the row")
    return messages
