"""From logits at positions to spans of a text: the best of each row over all its windows. Arrays only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

ELEMENTS = 2**22
"""Spans that are looked at at a time."""


@dataclass(frozen=True)
class Windows:
    """What is known of n windows, in their order: by row.

    row, first, none: (n,), as `encode_windows` gives them. begins, ends: of the tokens of all contexts, one window
    after the other; `counts` (n,) says how many each has.
    """

    row: np.ndarray
    first: np.ndarray
    none: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Spans:
    """The best spans of m rows: scores, begins and ends (characters), (m, k), the best first; of fewer the rest is
    -inf and empty. no_answer: (m,), the score of there being none."""

    scores: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    no_answer: np.ndarray


def best_spans(
    starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], windows: Windows, rows: int, *, longest: int, most: int
) -> Spans:
    """Return the best spans of `rows` rows. starts, ends: the logits of each window, (tokens,).

    A span's score is the sum of its start's and its end's logit; it has at most `longest` tokens, all of them of the
    context. A span that several windows hold has its highest score. The score of no answer is the lowest over the
    windows, as any of them may hold the answer. `most` spans are kept of each row. All spans are looked at, where
    transformers' run_qa.py pairs the 20 best starts and ends alone.
    Source: Devlin et al. 2019 (arXiv 1810.04805), sections 4.2 and 4.3.
    """
    parts = list(_by_window(starts, ends, windows, longest, most))
    window, score, left, right = (np.concatenate(column) for column in zip(*parts, strict=True))
    offsets = np.cumsum(windows.counts) - windows.counts
    row, begin, end = windows.row[window], windows.begins[offsets[window] + left], windows.ends[offsets[window] + right]
    order = np.lexsort((-score, end, begin, row))
    row, score, begin, end = (values[order] for values in (row, score, begin, end))
    # Of equal spans the first is the best.
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (begin[1:] != begin[:-1]) | (end[1:] != end[:-1])
    order = np.lexsort((-score, row))
    order = order[new[order]]
    row, score, begin, end = (values[order] for values in (row, score, begin, end))
    rank = np.arange(len(row)) - np.searchsorted(row, row, side="left")
    kept = rank < most
    found = Spans(
        np.full((rows, most), -np.inf),
        np.zeros((rows, most), np.int64),
        np.zeros((rows, most), np.int64),
        _no_answer(starts, ends, windows, rows),
    )
    for table, values in ((found.scores, score), (found.begins, begin), (found.ends, end)):
        table[row[kept], rank[kept]] = values[kept]
    return found


def _no_answer(starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], windows: Windows, rows: int) -> np.ndarray:
    scores = np.array([start[none] + end[none] for start, end, none in zip(starts, ends, windows.none, strict=True)])
    lowest = np.full(rows, np.inf)
    np.minimum.at(lowest, windows.row, scores)
    return lowest


def _by_window(
    starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], windows: Windows, longest: int, most: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the best spans of some windows at a time: window, score, and the first and the last token."""
    width = int(windows.counts.max(initial=1))
    size = max(1, ELEMENTS // (width * longest))
    for place in range(0, len(starts), size):
        chosen = range(place, min(place + size, len(starts)))
        left = np.full((len(chosen), width), -np.inf, np.float32)
        right = np.full((len(chosen), width + longest - 1), -np.inf, np.float32)
        for i, number in enumerate(chosen):
            first, count = windows.first[number], windows.counts[number]
            left[i, :count] = starts[number][first : first + count]
            right[i, :count] = ends[number][first : first + count]
        # (window, start, length - 1)
        table = left[:, :, None] + np.lib.stride_tricks.sliding_window_view(right, longest, axis=1)
        # The best spans begin where the best of each start are.
        begins = _highest(table.max(2), most)
        table = np.take_along_axis(table, begins[:, :, None], axis=1).reshape(len(chosen), -1)
        best = _highest(table, most)
        score = np.take_along_axis(table, best, axis=1)
        start = np.take_along_axis(begins, best // longest, axis=1)
        window = np.broadcast_to(np.arange(place, place + len(chosen))[:, None], best.shape)
        real = np.isfinite(score)
        yield window[real], score[real].astype(np.float64), start[real], (start + best % longest)[real]


def _highest(table: np.ndarray, most: int) -> np.ndarray:
    """Return the places of the highest numbers of each row, (n, most or fewer), in any order."""
    most = min(most, table.shape[1])
    return np.argpartition(table, -most, axis=1)[:, -most:]


def best_threshold(margins: np.ndarray, f1: np.ndarray, unanswerable: np.ndarray) -> float:
    """Return the margin above which no answer is given, with the highest F1: in the middle between two that occur.

    margins: (n,), how far the score of no answer is above the best span's. f1: (n,), of the best spans.
    unanswerable: (n,), boolean.
    Source: the script for SQuAD v2.0, `find_best_thresh`.
    """
    order = np.argsort(margins, kind="stable")
    edges = np.concatenate([[margins[order[0]] - 1.0], margins[order], [margins[order[-1]] + 1.0]])
    # What giving an answer adds to the sum of F1 where all questions with higher margins get none.
    gain = np.where(unanswerable, -1.0, f1)[order]
    total = np.concatenate([[0.0], np.cumsum(gain)])
    # Equal margins are answered together, or none of them.
    total[1:-1][edges[1:-2] == edges[2:-1]] = -np.inf
    last = int(total.argmax())
    return float((edges[last] + edges[last + 1]) / 2)
