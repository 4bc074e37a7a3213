"""Noised copies of sentences (easy data augmentation): a word inserted, swapped, deleted or replaced."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Neighbours = Callable[[str], Sequence[str]]
"""From a word to words that may stand in its place; none for a word without any."""


MOST = 0.5
"""The largest share of words that a copy changes."""


@dataclass(frozen=True)
class Noise:
    """How a sentence is changed a little: each copy by one operation, at a share of its words drawn for that copy.

    ratio: the mean share of words that change. Shares are half-normal, min(0.5, |N(0, (ratio sqrt(pi / 2))^2)|).
    insert: words are added at random places: neighbours of the sentence's words, or, without a source of
    neighbours, words of the sentence itself. swap: two words change places. delete: each word is left out with
    the chance of the copy's share, but never all. replace: words give way to neighbours; only with a source of them.
    A copy depends on the seed, the example, the copy's number and the field alone, so that copies can be made
    again in any order. Source: Wei and Zou 2019 (EDA); the released code of DBKD applies it to each sentence of a
    pair by itself, every operation equally often.
    """

    ratio: float = 0.1
    seed: int = 0
    neighbours: Neighbours | None = None

    def copies(self, text: str, example: int, numbers: Sequence[int], field: str = "text") -> list[str]:
        """Return numbered copies of `text`."""
        return [self.copy(text, example, number, field) for number in numbers]

    def copy(self, text: str, example: int, number: int, field: str = "text") -> str:
        """Return copy `number` of `text`, where copy 0 is the text itself; words are what white space separates.

        One word alone stays as it is. Of copies 1, 2, ... each run of as many as there are operations has every
        operation once, in an order of its own.
        """
        words = text.split()
        if number == 0 or len(words) < 2:
            return text
        operations = [self.insert, self.swap, self.delete] + ([self.replace] if self.neighbours is not None else [])
        run, place = divmod(number - 1, len(operations))
        random.Random(f"operations-{self.seed}-{example}-{run}-{field}").shuffle(operations)
        generator = random.Random(f"noise-{self.seed}-{example}-{number}-{field}")
        return " ".join(operations[place](words, self.share(generator), generator))

    def share(self, generator: random.Random) -> float:
        """Return the share of words that a copy changes."""
        return min(MOST, abs(generator.gauss(0.0, self.ratio * math.sqrt(math.pi / 2))))

    def insert(self, words: list[str], share: float, generator: random.Random) -> list[str]:
        """Return `words` with about a share more."""
        words = list(words)
        for _ in range(_times(words, share)):
            new = generator.choice(words)
            if self.neighbours is not None:
                new = generator.choice([*self.neighbours(new)] or [new])
            words.insert(generator.randrange(len(words) + 1), new)
        return words

    def swap(self, words: list[str], share: float, generator: random.Random) -> list[str]:
        """Return `words` with pairs of places exchanged."""
        words = list(words)
        for _ in range(_times(words, share)):
            i, j = generator.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
        return words

    def delete(self, words: list[str], share: float, generator: random.Random) -> list[str]:
        """Return `words` without some, but never nothing."""
        return [word for word in words if generator.random() >= share] or [generator.choice(words)]

    def replace(self, words: list[str], share: float, generator: random.Random) -> list[str]:
        """Return `words` with a share of them replaced, as far as they have neighbours."""
        words = list(words)
        assert self.neighbours is not None
        left = _times(words, share)
        for i in generator.sample(range(len(words)), len(words)):
            if left and (near := self.neighbours(words[i])):
                words[i] = generator.choice(list(near))
                left -= 1
        return words


def _times(words: list[str], share: float) -> int:
    return max(1, int(share * len(words)))
