"""Pairs of a question and a context as a model reads them: a long context in several windows that overlap."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdcli.data.rows import array_of, batches_of, stored, values_of
from kdcli.errors import InputError
from kdcli.models.inputs import INPUTS
from kdcli.tasks.encode import IDS, Collator, longest_input

if TYPE_CHECKING:
    from datasets import Dataset

STRIDE = 128
"""Tokens that neighbouring windows share, where the recipe does not say and max_length allows it."""

CANDIDATES = "candidates"
"""Of a batch where an answer may begin and end: (batch, seq), true at tokens of the context and at the one position
that stands for no answer."""


def room_of(tokenizer: Any, max_length: int, stride: int | None) -> tuple[int, int, int]:
    """Return the longest input, the most tokens of a question in it, and how many neighbouring windows share.

    A longer question is cut, so that half of each input is left for the context (transformers' run_qa.py fails there).
    stride: as a recipe has it, or None. Raises InputError for a tokenizer that does not know where its tokens stand in
    the text, and where no window could go beyond the one before.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not tell where in a text its tokens stand, which answers are cut by",
            where="teacher.tokenizer",
            hint="give a folder or hub name with a fast tokenizer (a file tokenizer.json)",
        )
    longest = longest_input(tokenizer, max_length)
    room = longest - tokenizer.num_special_tokens_to_add(pair=True)
    question = room // 2
    if room < 2:
        raise InputError(
            f"max_length {longest} leaves no room for a question and a context: {longest - room} tokens are special",
            where="task.max_length",
            hint=f"use at least {longest - room + 2}; {3 * STRIDE} is usual",
        )
    free = room - question - 1
    shared = min(STRIDE, longest // 3, free) if stride is None else stride
    if shared > free:
        raise InputError(
            f"windows of {longest} tokens cannot share {stride}: {longest - room} are special, and up to {question} "
            "the question's",
            where="task.stride",
            hint=f"use at most {free}, or max_length = {2 * shared + 1 + longest - room}",
        )
    return longest, question, shared


def encode_windows(rows: "Dataset", tokenizer: Any, max_length: int, stride: int | None) -> "Dataset":
    """Return windows, by row and then by place.

    rows: question, context and, where they have gold answers, start (a character, or -1) and label (their texts).
    Columns: index, row, the inputs, first (the position of the first token of the context), begins and ends (of each
    token of the context, in characters), none (the position that stands for no answer), length and labels: the
    positions of the answer's first and last token, both `none` where the window does not hold all of it.
    """
    room = room_of(tokenizer, max_length, stride)
    features, seen = 0, 0

    def encoded() -> Any:
        nonlocal features, seen
        for batch in batches_of(rows):
            part = _encoded(batch, tokenizer, *room, row=seen, index=features)
            seen, features = seen + len(batch["question"]), features + len(part)
            yield part

    return stored(encoded())


def count_windows(rows: "Dataset", tokenizer: Any, max_length: int, stride: int | None) -> int:
    """Return how many windows `encode_windows` makes; many rows may share a context, whose tokens are counted once."""
    longest, most, shared = room_of(tokenizer, max_length, stride)
    room = longest - tokenizer.num_special_tokens_to_add(pair=True)
    total = 0
    for batch in batches_of(rows):
        questions, contexts = (
            _lengths(texts, tokenizer) for texts in (_cut(batch["question"], tokenizer, most), batch["context"])
        )
        free = room - questions
        total += len(free) + int(np.maximum(np.ceil((contexts - free) / (free - shared)), 0).sum())
    return total


def count_unheld(rows: "Dataset", tokenizer: Any, max_length: int, stride: int | None) -> int:
    """Return how many rows have an answer that no window holds whole; rows with long answers are encoded only."""
    _, _, shared = room_of(tokenizer, max_length, stride)
    # One more token than windows share stands in one of them, wherever it begins; a token has a byte or more.
    answers = zip(values_of(rows, "start"), values_of(rows, "label"), strict=True)
    long = [i for i, (start, texts) in enumerate(answers) if start >= 0 and len(texts[0].encode()) > shared + 1]
    if not long:
        return 0
    windows = encode_windows(rows.select(long), tokenizer, max_length, stride)
    held = array_of(windows, "labels")[:, 0] != array_of(windows, "none")
    return len(long) - len(np.unique(array_of(windows, "row")[held]))


def _lengths(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    different = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    found = tokenizer(list(different), add_special_tokens=False, return_attention_mask=False, verbose=False)
    counts = np.array([len(ids) for ids in found["input_ids"]])
    return counts[[different[text] for text in texts]]


def _encoded(
    batch: dict[str, list[Any]], tokenizer: Any, longest: int, most: int, stride: int, *, row: int, index: int
) -> pa.RecordBatch:
    found = tokenizer(
        _cut(batch["question"], tokenizer, most),
        batch["context"],
        truncation="only_second",
        max_length=longest,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    places, numbers = found["offset_mapping"], found["overflow_to_sample_mapping"]
    firsts, begins, ends, nones = [], [], [], []
    for number, ids in enumerate(found["input_ids"]):
        sides = found.sequence_ids(number)
        count = sides.count(1)
        first = sides.index(1) if count else len(ids)
        spans = np.array(places[number][first : first + count], np.int32).reshape(-1, 2)
        firsts.append(first)
        begins.append(spans[:, 0])
        ends.append(spans[:, 1])
        nones.append(_no_answer(ids, tokenizer))
    columns: dict[str, Any] = {
        "index": pa.array(range(index, index + len(numbers)), pa.int64()),
        "row": pa.array([row + number for number in numbers], pa.int64()),
    }
    for name in INPUTS:
        if name in found:
            columns[name] = pa.array(found[name], IDS[name])
    places_in_text = pa.list_(pa.int32())
    columns |= {
        "first": pa.array(firsts, pa.int32()),
        "begins": pa.array(begins, places_in_text),
        "ends": pa.array(ends, places_in_text),
        "none": pa.array(nones, pa.int32()),
    }
    if "start" in batch:
        pairs = zip(batch["start"], batch["label"], strict=True)
        answers = [(start, start + len(texts[0]) if texts else start) for start, texts in pairs]
        windows = zip(numbers, firsts, begins, ends, nones, strict=True)
        positions = [_positions(answers[i], first, begin, end, none) for i, first, begin, end, none in windows]
        columns["labels"] = pa.array(positions, places_in_text)
    columns["length"] = pa.array([len(ids) for ids in found["input_ids"]], pa.int32())
    return pa.RecordBatch.from_pydict(columns)


def _cut(questions: Sequence[str], tokenizer: Any, most: int) -> list[str]:
    """Return the beginnings of questions that have at most so many tokens, without white space before them."""
    questions = [question.lstrip() for question in questions]
    pending, allowed = list(range(len(questions))), most
    while pending and allowed:
        found = tokenizer(
            [questions[i] for i in pending], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        long = [j for j, ids in enumerate(found["input_ids"]) if len(ids) > most]
        for j in long:
            questions[pending[j]] = questions[pending[j]][: found["offset_mapping"][j][allowed - 1][1]]
        # A cut word may have more pieces than it had as a part of the whole.
        pending, allowed = [pending[j] for j in long], allowed - 1
    return questions


def _no_answer(ids: list[int], tokenizer: Any) -> int:
    """Return the position that stands for no answer: that of the token that begins an input."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token in ids:
            return ids.index(token)
    return 0


def _positions(answer: tuple[int, int], first: int, begins: np.ndarray, ends: np.ndarray, none: int) -> list[int]:
    """Return the positions of the first and the last token of an answer; twice `none` where a window lacks a part.

    answer: where it begins and ends in the text; (-1, -1) for none.
    """
    start, end = answer
    if start < 0 or not len(begins) or start < begins[0] or end > ends[-1]:
        return [none, none]
    left = int(np.searchsorted(begins, start, side="right")) - 1
    right = int(np.searchsorted(ends, end, side="left"))
    return [first + left, first + right]


class WindowCollator:
    """Pads windows to one length and stacks them; tells where answers may be (`CANDIDATES`)."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = Collator(tokenizer)

    def __call__(self, windows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad(windows)
        candidates = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        for places, window in zip(candidates, windows, strict=True):
            places[window["first"] : window["first"] + len(window["begins"])] = True
            places[window["none"]] = True
        return {**batch, CANDIDATES: candidates}
