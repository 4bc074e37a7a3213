"""Exact match and F1 against the rules of SQuAD's official scripts, written down here once more."""

import random
import re
import string
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kdcli.tasks.squad_score import normalised, scores_of

WORDS = ["The", "a", "an", "cat", "Cat's", "U.S.", "1,000", "the-end", "...", "Ärger", "—", "in", "\u00a0of", "'", "%5"]


# evaluate-v1.1.py and evaluate-v2.0.py, function by function.


def normalize_answer(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def white_space_fix(text: str) -> str:
        return " ".join(text.split())

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return white_space_fix(remove_articles(remove_punc(s.lower())))


def f1_v1(prediction: str, ground_truth: str) -> float:
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    num_same = sum((Counter(prediction_tokens) & Counter(ground_truth_tokens)).values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def score_v1(prediction: str, ground_truths: list[str]) -> tuple[float, float]:
    exact = max(normalize_answer(prediction) == normalize_answer(truth) for truth in ground_truths)
    return float(exact), max(f1_v1(prediction, truth) for truth in ground_truths)


def get_tokens(s: str) -> list[str]:
    return normalize_answer(s).split() if s else []


def compute_f1(a_gold: str, a_pred: str) -> float:
    gold_toks, pred_toks = get_tokens(a_gold), get_tokens(a_pred)
    num_same = sum((Counter(gold_toks) & Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def score_v2(prediction: str, ground_truths: list[str]) -> tuple[float, float]:
    gold_answers = [a for a in ground_truths if normalize_answer(a)]
    if not gold_answers:
        gold_answers = [""]
    exact = max(int(normalize_answer(a) == normalize_answer(prediction)) for a in gold_answers)
    return float(exact), float(max(compute_f1(a, prediction) for a in gold_answers))


def check(prediction: str, truths: list[str]) -> None:
    assert scores_of(prediction, truths, unanswerable=True) == pytest.approx(score_v2(prediction, truths))
    if truths:
        assert scores_of(prediction, truths, unanswerable=False) == pytest.approx(score_v1(prediction, truths))


def test_scores_are_those_of_the_official_rules_on_random_texts():
    draw = random.Random(0)

    def text(most: int) -> str:
        return draw.choice([" ", "  ", "-", ", "]).join(draw.choices(WORDS, k=draw.randint(0, most)))

    found = []
    for _ in range(1000):
        truths = [text(4) for _ in range(draw.randint(0, 4))]
        prediction = draw.choice([*truths, *(f"{text(2)} {truth} {text(1)}" for truth in truths), text(5), "", text(1)])
        check(prediction, truths)
        assert normalised(prediction) == normalize_answer(prediction)
        found.append(scores_of(prediction, truths, unanswerable=True))
    # The cases are neither all right nor all wrong.
    assert 100 < sum(exact for exact, _ in found) < 900 and sum(0 < f1 < 1 for _, f1 in found) > 100


def test_the_two_versions_differ_where_an_answer_is_nothing_but_an_article():
    assert scores_of("The", ["the"], unanswerable=False) == score_v1("The", ["the"]) == (1.0, 0.0)
    assert scores_of("The", ["the"], unanswerable=True) == score_v2("The", ["the"]) == (1.0, 1.0)
    assert scores_of("a", ["the", "cat"], unanswerable=False) == score_v1("a", ["the", "cat"]) == (1.0, 0.0)
    assert scores_of("a", ["the", "cat"], unanswerable=True) == score_v2("a", ["the", "cat"]) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name", ["squad_small", "squad_v2_small", "xquad_en"])
def test_scores_are_those_of_the_official_rules_on_real_answers(name: str, data_dir: Path):
    draw = random.Random(0)
    for split in ("train", "validation"):
        for row in pq.read_table(data_dir / name / f"{split}.parquet").to_pylist():
            words = row["context"].split(" ")
            place, length = draw.randrange(len(words)), draw.randint(1, 6)
            truths = row["answers"]["text"]
            predictions = ["", " ".join(words[place : place + length]), row["question"]]
            for truth in truths[-1:]:
                at = row["context"].index(truth)
                predictions += [truth, row["context"][max(0, at - 7) : at + len(truth) + draw.randint(-3, 9)]]
            for prediction in predictions:
                check(prediction, truths)
