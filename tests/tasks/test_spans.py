"""The best spans of a text from logits: against all spans, and against the rules of transformers' run_qa.py."""

import time
from typing import Any

import numpy as np
import pytest

from kdcli.tasks.spans import Spans, Windows, best_spans, best_threshold

Case = tuple[list[np.ndarray], list[np.ndarray], Windows, int]


def draw(seed: int, rows: int = 30, *, longest: int = 30) -> Case:
    """Return random logits of the windows of random rows: words of 4 characters, windows that share 3 of them."""
    random = np.random.default_rng(seed)
    starts, ends, lists = [], [], {name: [] for name in ("row", "first", "begins", "ends", "counts")}
    for row in range(rows):
        place = 0
        for _ in range(random.integers(1, 4)):
            count, first = int(random.integers(4, longest)), int(random.integers(2, 6))
            tokens = np.arange(place, place + count)
            starts.append(random.normal(size=first + count + 1).astype(np.float32))
            ends.append(random.normal(size=first + count + 1).astype(np.float32))
            lists["row"].append(row)
            lists["first"].append(first)
            lists["counts"].append(count)
            lists["begins"].append(5 * tokens)
            lists["ends"].append(5 * tokens + 4)
            place += count - 3
    arrays = {name: np.array(lists[name]) for name in ("row", "first", "counts")}
    joined = {name: np.concatenate(lists[name]) for name in ("begins", "ends")}
    return starts, ends, Windows(none=np.zeros(len(starts), int), **arrays, **joined), rows


def places_of(windows: Windows) -> list[tuple[np.ndarray, np.ndarray]]:
    cuts = np.cumsum(windows.counts)[:-1]
    return list(zip(np.split(windows.begins, cuts), np.split(windows.ends, cuts), strict=True))


def all_spans(case: Case, longest: int) -> list[dict[tuple[int, int], float]]:
    """Return the score of every span of every row."""
    starts, ends, windows, rows = case
    found: list[dict[tuple[int, int], float]] = [{} for _ in range(rows)]
    for number, (begins, finishes) in enumerate(places_of(windows)):
        row, first = found[windows.row[number]], windows.first[number]
        for i in range(len(begins)):
            for j in range(i, min(i + longest, len(begins))):
                key = (int(begins[i]), int(finishes[j]))
                score = float(starts[number][first + i] + ends[number][first + j])
                row[key] = max(row.get(key, -np.inf), score)
    return found


def run_qa(case: Case, n_best: int, longest: int) -> list[tuple[tuple[int, int], float, float]]:
    """Return the best span of each row, its score and that of no answer, as postprocess_qa_predictions has them."""
    starts, ends, windows, rows = case
    places, found = places_of(windows), []
    for row in range(rows):
        prelim: list[tuple[float, tuple[int, int]]] = []
        min_null = None
        for number in np.flatnonzero(windows.row == row):
            start, end, first, count = starts[number], ends[number], windows.first[number], windows.counts[number]
            null = float(start[0] + end[0])
            min_null = null if min_null is None or null < min_null else min_null
            begins, finishes = places[number]
            for i in np.argsort(start)[-1 : -n_best - 1 : -1].tolist():
                for j in np.argsort(end)[-1 : -n_best - 1 : -1].tolist():
                    if not (first <= i < first + count and first <= j < first + count):
                        continue
                    if j < i or j - i + 1 > longest:
                        continue
                    prelim.append((float(start[i] + end[j]), (int(begins[i - first]), int(finishes[j - first]))))
        best = max(prelim, key=lambda pair: pair[0]) if prelim else (-np.inf, (0, 0))
        found.append((best[1], best[0], min_null))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("longest", "most"), [(30, 20), (3, 5), (1, 1), (50, 400)])
def test_the_best_spans_are_the_best_of_all_that_there_are(longest: int, most: int):
    case = draw(longest)
    found = best_spans(*case, longest=longest, most=most)
    for row, spans in enumerate(all_spans(case, longest)):
        ranked = sorted(spans.items(), key=lambda pair: -pair[1])[:most]
        real = np.isfinite(found.scores[row])
        assert real.sum() == len(ranked)
        np.testing.assert_allclose(found.scores[row][real], [score for _, score in ranked], rtol=1e-6)
        mine = zip(found.begins[row][real].tolist(), found.ends[row][real].tolist(), strict=True)
        # What is at the limit may be one of several with one score.
        assert dict(ranked).keys() == set(mine)


def test_the_answers_are_those_of_run_qa_where_it_looks_at_all_spans():
    case = draw(1, 200)
    found = best_spans(*case, longest=30, most=20)
    for row, (span, score, null) in enumerate(run_qa(case, 100, 30)):
        assert (found.begins[row, 0], found.ends[row, 0]) == span
        assert found.scores[row, 0] == pytest.approx(score) and found.no_answer[row] == pytest.approx(null)
    # The 20 best starts and ends alone may leave out the best span, and never hold a better one.
    twenty = [score for _, score, _ in run_qa(case, 20, 30)]
    assert (found.scores[:, 0] >= np.array(twenty) - 1e-6).all()


def test_windows_may_come_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch):
    case = draw(2)
    whole = best_spans(*case, longest=30, most=4)
    monkeypatch.setattr("kdcli.tasks.spans.ELEMENTS", 2000)
    parts = best_spans(*case, longest=30, most=4)
    for name in ("scores", "begins", "ends", "no_answer"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_a_context_without_tokens_has_no_span():
    windows = Windows(
        row=np.array([0, 1]), first=np.array([3, 2]), none=np.array([0, 0]), counts=np.array([0, 1]),
        begins=np.array([0]), ends=np.array([4]),
    )  # fmt: skip
    found: Spans = best_spans([np.ones(3), np.ones(4)], [np.ones(3), np.ones(4)], windows, 2, longest=5, most=2)
    np.testing.assert_array_equal(found.scores, [[-np.inf, -np.inf], [2.0, -np.inf]])
    np.testing.assert_array_equal(found.no_answer, [2.0, 2.0])


def find_best_thresh(na_probs: dict[int, float], scores: dict[int, float], has_ans: dict[int, bool]) -> Any:
    """As evaluate-v2.0.py has it; predictions are never empty."""
    cur_score = best_score = sum(1 for qid in has_ans if not has_ans[qid])
    best_thresh = 0.0
    for qid in sorted(na_probs, key=lambda k: na_probs[k]):
        cur_score += scores[qid] if has_ans[qid] else -1
        if cur_score > best_score:
            best_score, best_thresh = cur_score, na_probs[qid]
    return best_score, best_thresh


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_reaches_the_official_best_f1(seed: int):
    random = np.random.default_rng(seed)
    unanswerable, f1 = random.random(50) < 0.4, random.random(50).round(1)
    margins = np.where(unanswerable, 1.0, -1.0) + random.normal(size=50).round(seed % 3 + 1) * 2
    threshold = best_threshold(margins, f1, unanswerable)
    reached = np.where(margins > threshold, unanswerable, np.where(unanswerable, 0.0, f1)).sum()
    if len(set(margins)) == 50:
        best, _ = find_best_thresh(*(dict(enumerate(values)) for values in (margins, f1, ~unanswerable)))
        assert reached == pytest.approx(best)
    every = [np.where(margins > t, unanswerable, np.where(unanswerable, 0.0, f1)).sum() for t in [*margins, -9e9]]
    assert reached == pytest.approx(max(every))


def test_ten_thousand_windows_are_decoded_in_a_few_seconds():
    random = np.random.default_rng(0)
    starts, ends = ([random.normal(size=384).astype(np.float32) for _ in range(10_000)] for _ in range(2))
    places = np.tile(np.arange(360), 10_000)
    windows = Windows(
        row=np.arange(10_000) // 2, first=np.full(10_000, 20), none=np.zeros(10_000, int),
        counts=np.full(10_000, 360), begins=5 * places, ends=5 * places + 4,
    )  # fmt: skip
    begun = time.process_time()
    best_spans(starts, ends, windows, 5000, longest=30, most=20)
    assert time.process_time() - begun < 5
