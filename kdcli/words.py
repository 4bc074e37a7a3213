"""Words of messages that several modules share."""

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 thread`, `1,024 examples`, `2 matrices`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def one(noun: str) -> str:
    """Return a noun with its article: `a regression task`, `an instruct task`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def joined(names: Sequence[str]) -> str:
    """Return names as a sentence has them: `a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
