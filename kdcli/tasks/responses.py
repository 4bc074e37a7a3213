"""Features of prompts and responses: which tokens are the prompt, and the same prompt with another response."""

from collections.abc import Mapping, Sequence
from typing import Any

IGNORED = -100
"""The label of a token that is not predicted."""


def prompt_of(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Return the tokens before the last response, which is the last run of tokens that have a label."""
    predicted = [label != IGNORED for label in labels]
    if not any(predicted):
        return list(ids)
    start = len(predicted) - 1 - predicted[::-1].index(True)
    while start and predicted[start - 1]:
        start -= 1
    return list(ids[:start])


def with_response(row: Mapping[str, Any], prompt: Sequence[int], response: Sequence[int]) -> dict[str, Any]:
    """Return a feature whose prompt is answered otherwise; the response alone is predicted."""
    ids = [*prompt, *response]
    return {
        **row,
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [IGNORED] * len(prompt) + list(response),
        "length": len(ids),
    }
