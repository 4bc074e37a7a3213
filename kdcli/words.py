"""Words of messages that several modules share."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: `1 thread`, `1,024 examples`, `2 matrices`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
