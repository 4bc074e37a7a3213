"""From lists of words to batches: pieces of words, long rows in windows that end between words, labels at first pieces.

A word is predicted at its first piece. A row that is longer than a model reads becomes several features, windows that
share some of their pieces; a word that two of them have is predicted in the one where it has more words on
both sides. So every word is predicted exactly once, but for those of which a tokenizer leaves nothing (control
characters, say).
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdcli.data.rows import batches_of, stored
from kdcli.errors import InputError
from kdcli.tasks.encode import IDS, Collator, longest_input

if TYPE_CHECKING:
    from datasets import Dataset

UNLABELLED = -100
"""The label of pieces that are not predicted."""

SHARED = 4
"""The part of a window's pieces that the next one has, too, where a recipe does not say: one of so many."""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise InputError where a tokenizer does not tell which pieces are of which word."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not tell which pieces are of which word",
            where="teacher.tokenizer",
            hint="give a folder with a tokenizer.json: AutoTokenizer writes one for most models (save_pretrained)",
        )


def encode_words(rows: "Dataset", tokenizer: Any, max_length: int, stride: int | None = None) -> "Dataset":
    """Return features: index (from 0), row (its place in `rows`), the inputs, words, [labels] and length.

    stride: most pieces that neighbouring windows share; None is a quarter.

    words: of each piece the number of the word that is predicted there, -1 where none is. labels: of each piece, where
    rows have labels.
    """
    longest = longest_input(tokenizer, max_length)
    index, row = count(), count()

    def encoded(batch: dict[str, list[Any]]) -> pa.RecordBatch:
        features = []
        for place, windows in enumerate(_windows(batch["words"], tokenizer, longest, stride)):
            number = next(row)
            label = batch["label"][place] if "label" in batch else None
            features += [
                {"index": next(index), "row": number, **window, **labels_at(window["words"], label)}
                for window in windows
            ]
        types = {**dict.fromkeys(("index", "row"), pa.int64()), **IDS}
        types |= {"words": pa.list_(pa.int32()), "labels": pa.list_(pa.int64()), "length": pa.int32()}
        schema = pa.schema([(name, types[name]) for name in types if name in features[0]])
        return pa.RecordBatch.from_pylist(features, schema=schema)

    return stored(encoded(batch) for batch in batches_of(rows))


def labels_at(words: "np.ndarray", label: Sequence[int] | None) -> "dict[str, np.ndarray]":
    """Return the labels of pieces: those of the words that are predicted there. label: of each word."""
    if label is None:
        return {}
    return {"labels": np.where(words >= 0, np.array([*label, UNLABELLED])[words], UNLABELLED)}


def _windows(rows: list[list[str]], tokenizer: Any, longest: int, stride: int | None) -> Iterator[list[dict[str, Any]]]:
    """Yield the features of each row: its inputs, words and length."""
    spell = _spelling(tokenizer)

    def encode(texts: list[list[str]], **options: Any) -> Any:
        return tokenizer([[spell(word) for word in text] for text in texts], is_split_into_words=True, **options)

    room = longest - tokenizer.num_special_tokens_to_add(False)
    # Not a word is said about rows that are too long: they are cut into windows below.
    found = encode(rows, truncation=False, verbose=False)
    for number, words in enumerate(rows):
        places = _words_of(found, number)
        if len(places) <= longest:
            yield [_feature(found, number, _first(places))]
            continue
        pieces = np.bincount(places[places >= 0], minlength=len(words))
        windows = cut(np.minimum(pieces, room).tolist(), room, room // SHARED if stride is None else stride)
        parts = encode([words[start:end] for start, end, _, _ in windows], truncation=True, max_length=longest)
        features = []
        for part, (start, _, first, behind) in enumerate(windows):
            own = _first(_words_of(parts, part))
            own = np.where(own >= 0, own + start, -1)
            features.append(_feature(parts, part, np.where((own >= first) & (own < behind), own, -1)))
        yield features


def _words_of(encoded: Any, number: int) -> "np.ndarray":
    """Return the number of the word that each piece is of; -1 for special tokens."""
    return np.array([-1 if word is None else word for word in encoded.word_ids(number)], np.int64)


def _first(places: "np.ndarray") -> "np.ndarray":
    """Return the words of first pieces, and -1 for all other pieces."""
    return np.where(places != np.concatenate([[-1], places[:-1]]), places, -1)


def _feature(encoded: Any, number: int, words: "np.ndarray") -> dict[str, Any]:
    inputs = {name: encoded[name][number] for name in IDS if name in encoded}
    return {**inputs, "words": words, "length": len(words)}


def cut(pieces: Sequence[int], room: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Return windows of a row: the words from `start` to `end`, of which those from `first` to `behind` are predicted.

    pieces: of each word, none more than `room`, the pieces of a window. stride: the most that two windows share. All
    ends are exclusive.
    """
    spans: list[tuple[int, int]] = []
    start = end = 0
    while True:
        total = sum(pieces[start:end])
        while end < len(pieces) and total + pieces[end] <= room:
            total += pieces[end]
            end += 1
        spans.append((start, end))
        if end == len(pieces):
            break
        # The next word must fit, too.
        shared, most, start = 0, min(stride, room - pieces[end]), end
        while start - 1 > spans[-1][0] and shared + pieces[start - 1] <= most:
            start -= 1
            shared += pieces[start]
    borders = [0, *((start + end) // 2 for (_, end), (start, _) in pairwise(spans)), len(pieces)]
    return [(*span, *own) for span, own in zip(spans, pairwise(borders), strict=True)]


def with_space_before_words(tokenizer: Any) -> Any:
    """Return a tokenizer that cuts a word of a list as it cuts it inside a text, whatever program calls it.

    Byte-level ones tell where a word begins by the space before it, which lists of words have not. Other tokenizers are
    returned as they are.
    """
    if not lacks_spaces(tokenizer):
        return tokenizer
    from kdcli.models.load import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        # Some classes read the one file, some the other.
        for file in ("tokenizer.json", "tokenizer_config.json"):
            document = json.loads((folder / file).read_text(encoding="utf-8"))
            for step in _splitters(document.get("pre_tokenizer")) if file == "tokenizer.json" else [document]:
                if file != "tokenizer.json" or step["type"] == "ByteLevel":
                    step["add_prefix_space"] = True
            (folder / file).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        return load_tokenizer(folder)


def _splitters(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer's splitting, by its state in tokenizer.json."""
    return (state or {}).get("pretokenizers", [state] if state else [])


def lacks_spaces(tokenizer: Any) -> bool:
    """True for a byte-level tokenizer that puts no space before a word."""
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    steps = _splitters(json.loads(splitter.__getstate__())) if splitter is not None else []
    return any(step["type"] == "ByteLevel" and not step["add_prefix_space"] for step in steps)


def _spelling(tokenizer: Any) -> Callable[[str], str]:
    """Return how a word is given to a tokenizer."""
    return (lambda word: f" {word}" if word else word) if lacks_spaces(tokenizer) else (lambda word: word)


class WordCollator(Collator):
    """Pads features as `Collator` does, and their labels; tells at which places words are predicted."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the same, with labels (batch, seq), and the flat `predicted_positions` of batch x seq."""
        batch = super().__call__([{name: value for name, value in row.items() if name != "labels"} for row in rows])
        for name, padding in (("words", -1), ("labels", UNLABELLED)):
            if name in rows[0]:
                table = np.full(tuple(batch["input_ids"].shape), padding, np.int64)
                for number, row in enumerate(rows):
                    table[number, : len(row[name])] = row[name]
                batch[name] = torch.from_numpy(table)
        batch["predicted_positions"] = (batch.pop("words").flatten() >= 0).nonzero().squeeze(-1)
        return batch
