"""Further training rows: copies in which words gave way to others that fit there (data augmentation of TinyBERT).

A copy replaces each word with some probability by one of its candidates, which a masked language model gave
(`kdcli.augment.suggest`). Copies keep their row's label, right or wrong after the change: what a student learns from
them is what its teacher predicts for them.
Source: Jiao et al. 2020 (TinyBERT), algorithm 1.
"""

import random
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from kdcli.errors import InputError

MODEL = "task.augment.model"
"""The field that names the model."""

TRIES = 10
"""How often a copy is drawn before it is given up: each must differ from its row and from the row's other copies."""

NONE = -1
"""In place of a candidate's token, where there are no more."""

_WORD = re.compile("(?<![a0'])a+(?:'a+)*(?!'?[a0])")


def words_of(text: str) -> list[tuple[int, int]]:
    """Return where the words of `text` begin and end: runs of letters, with apostrophes inside ("don't").

    What is joined to a digit, an underscore or an apostrophe before it ("3d", "'s") is none; nor are the letters of
    Chinese, Japanese and Korean, where spaces do not tell words.
    """
    return [match.span() for match in _WORD.finditer("".join(map(_kind, text)))]


def _kind(character: str) -> str:
    if character in "'’":
        return "'"
    category = unicodedata.category(character)
    if category[0] in "LM":
        return " " if unicodedata.east_asian_width(character) in "WF" else "a"
    return "0" if category[0] == "N" or category == "Pc" else " "


def text_of(cell: str | list[str]) -> str:
    """Return a text as it is; of a list of words the text that they make."""
    return cell if isinstance(cell, str) else " ".join(cell)


def like(cell: str | list[str], text: str) -> str | list[str]:
    """Return a text, or its words where `cell` is a list."""
    return text if isinstance(cell, str) else text.split(" ")


class Vocabulary:
    """The whole words among a tokenizer's tokens: no special tokens, pieces of words, numbers or punctuation.

    spaced, tight: (vocabulary,) bool, the tokens that are a whole word after white space, and elsewhere (at the
    beginning, after punctuation). A byte-level tokenizer has two tokens for a word: with the space and without it.
    """

    def __init__(self, tokenizer: Any) -> None:
        size = len(tokenizer)
        special = set(tokenizer.all_special_ids)
        self.texts = [tokenizer.decode([i]).strip() for i in range(size)]
        plain = [i for i, text in enumerate(self.texts) if i not in special and words_of(text) == [(0, len(text))]]
        if not plain:
            raise InputError("the tokenizer has no token that is a whole word", where=MODEL)
        after = tokenizer([f" {self.texts[i]}" for i in plain], add_special_tokens=False)["input_ids"]
        alone = tokenizer([self.texts[i] for i in plain], add_special_tokens=False)["input_ids"]
        self.spaced, self.tight = torch.zeros(2, size, dtype=torch.bool)
        self.same: dict[str, list[int]] = {}
        for i, with_space, without in zip(plain, after, alone, strict=True):
            self.spaced[i] = with_space == [i]
            # "ing" without a space is a token, too; that it is none with a space tells that it is no word.
            self.tight[i] = without == [i] and len(with_space) == 1
            self.same.setdefault(self.texts[i].casefold(), []).append(i)
        self.knows_case = tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]

    def spell(self, token: int, word: str) -> str:
        """Return a token's text in place of `word`, with its capital where the tokenizer knows none."""
        text = self.texts[token]
        return text[:1].upper() + text[1:] if not self.knows_case and word[:1].isupper() else text


def add_copies(
    train: Dataset,
    candidates: dict[str, Tensor],
    vocabulary: Vocabulary,
    copies: int,
    probability: float,
    *,
    texts: Sequence[str],
    seed: int,
) -> Dataset:
    """Return the rows of `train` and then up to `copies` copies of each, in the rows' order, with new indices.

    texts: the columns that hold text, or lists of words: there a word takes a word's place, and a row with white space
    inside a word has no copies. candidates: for every text (words, top_k) token ids, -1 for none. A copy replaces each
    word that has candidates with `probability` by one of them, all equally likely; of a pair one text changes in each
    copy, both in turn, and the other one stays, as in the released code. White space, punctuation and case around the
    words stay. A text equal to its row's or to that of an earlier copy is drawn again, at most 10
    times, and then the copy is left out. What is drawn depends on the seed and the row's index alone.
    """
    columns: dict[str, list[Any]] = {name: list(train[name]) for name in train.column_names}
    added: dict[str, list[Any]] = {name: [] for name in columns}
    for row, index in enumerate(columns["index"]):
        generator = random.Random(f"augment-{seed}-{index}")
        cells = [columns[name][row] for name in texts]
        own = [text_of(cell) for cell in cells]
        pieces = [_pieces(text, candidates[text], vocabulary) for text in own]
        changing = [
            place
            for place, text in enumerate(pieces)
            if any(options for _, options in text) and like(cells[place], own[place]) == cells[place]
        ]
        seen = [{text} for text in own]
        for number in range(copies if changing else 0):
            place = changing[number % len(changing)]
            copy = _draw(pieces[place], probability, generator, seen[place])
            if copy is None:
                # Nearly all that can be made of this text is there.
                continue
            seen[place].add(copy)
            for name, values in added.items():
                values.append(like(cells[place], copy) if name == texts[place] else columns[name][row])
    first = max(columns["index"]) + 1
    added["index"] = list(range(first, first + len(added["index"])))
    return Dataset.from_dict({name: values + added[name] for name, values in columns.items()}, features=train.features)


Pieces = list[tuple[str, list[str]]]
"""A text cut at its words: each piece, and what can stand in its place."""


def _pieces(text: str, candidates: Tensor, vocabulary: Vocabulary) -> Pieces:
    pieces: Pieces = []
    last = 0
    for (start, end), tokens in zip(words_of(text), candidates.tolist(), strict=True):
        word = text[start:end]
        pieces.append((text[last:start], []))
        pieces.append((word, [vocabulary.spell(token, word) for token in tokens if token != NONE]))
        last = end
    return [*pieces, (text[last:], [])]


def _draw(pieces: Pieces, probability: float, generator: random.Random, seen: set[str]) -> str | None:
    for _ in range(TRIES):
        copy = "".join(
            generator.choice(options) if options and generator.random() < probability else piece
            for piece, options in pieces
        )
        if copy not in seen:
            return copy
    return None
