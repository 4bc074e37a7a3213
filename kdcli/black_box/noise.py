"""Noised copies of sentences (easy data augmentation): a word inserted, swapped, deleted or replaced."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Neighbours = Callable[[str], Sequence[str]]
"""From a word to words that may stand in its place; none for a word without any."""


@dataclass(frozen=True)
class Noise:
    """How a sentence is changed a little: one operation, drawn for every copy, at about `ratio` of its words.

    insert: words are added at random places: neighbours of the sentence's words, or, without a source of
    neighbours, words of the sentence itself. swap: two words change places. delete: each word is left out with
    the chance `ratio`, but never all. replace: words give way to neighbours; only with a source of them.
    A copy depends on the seed, the example, the copy's number and the field alone, so that copies can be made
    again in any order. Source: Wei and Zou 2019 (EDA); DBKD applies it to each sentence of a pair by itself.
    """

    ratio: float = 0.1
    seed: int = 0
    neighbours: Neighbours | None = None

    def copy(self, text: str, example: int, number: int, field: str = "text") -> str:
        """Return copy `number` of `text`; words are what white space separates. One word alone stays as it is."""
        words = text.split()
        if len(words) < 2 or self.ratio <= 0:
            return text
        generator = random.Random(f"noise-{self.seed}-{example}-{number}-{field}")
        operations = [self.insert, self.swap, self.delete] + ([self.replace] if self.neighbours is not None else [])
        return " ".join(generator.choice(operations)(words, generator))

    def _times(self, words: list[str]) -> int:
        return max(1, int(self.ratio * len(words)))

    def insert(self, words: list[str], generator: random.Random) -> list[str]:
        """Return `words` with about a share `ratio` more."""
        words = list(words)
        for _ in range(self._times(words)):
            new = generator.choice(words)
            if self.neighbours is not None:
                new = generator.choice([*self.neighbours(new)] or [new])
            words.insert(generator.randrange(len(words) + 1), new)
        return words

    def swap(self, words: list[str], generator: random.Random) -> list[str]:
        """Return `words` with pairs of places exchanged."""
        words = list(words)
        for _ in range(self._times(words)):
            i, j = generator.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
        return words

    def delete(self, words: list[str], generator: random.Random) -> list[str]:
        """Return `words` without some, but never nothing."""
        return [word for word in words if generator.random() >= self.ratio] or [generator.choice(words)]

    def replace(self, words: list[str], generator: random.Random) -> list[str]:
        """Return `words` with a share `ratio` of them replaced, as far as they have neighbours."""
        words = list(words)
        assert self.neighbours is not None
        left = self._times(words)
        for i in generator.sample(range(len(words)), len(words)):
            if left and (near := self.neighbours(words[i])):
                words[i] = generator.choice(list(near))
                left -= 1
        return words
