"""ROUGE-L and exact match of generated texts, beside the package that papers take their numbers from."""

import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.tasks.text_score import common_length, exact_match, rouge_l, tokens_of_text

PAIRS = 1000


def responses() -> list[str]:
    """Return real responses; words of a grammar where the data are not there."""
    path = Path(os.environ.get("KDCLI_DATA_DIR", "")) / "instruct" / "dolly3k" / "train.parquet"
    if not path.is_file():
        pytest.skip("needs instruct/dolly3k")
    return pq.read_table(path, columns=["response"])["response"].to_pylist()


def perturbed(text: str, other: str, draw: random.Random) -> str:
    """Return a text with words dropped, swapped, changed in their endings and case, or mixed with those of another."""
    words = text.split()
    for _ in range(draw.randrange(1 + len(words) // 2)):
        place = draw.randrange(len(words))
        words[place] = draw.choice(
            ["", words[place].upper(), words[place] + "ing", words[place] + "ies", draw.choice(other.split() or [""])]
        )
    if draw.random() < 0.3:
        draw.shuffle(words)
    return draw.choice([" ", "\n", ", "]).join(words[: draw.randrange(1, 200)])


def test_rouge_l_is_that_of_the_reference_package_on_real_responses():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    reference = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    texts, draw = responses(), random.Random(0)
    found, wanted = [], []
    for _ in range(PAIRS):
        # The reference package fills its table cell by cell.
        text, other, third = (each[:250] for each in draw.sample(texts, 3))
        answer = draw.choice([text, other, *(perturbed(text, other, draw) for _ in range(3))])
        found.append(rouge_l(answer, [text, third]))
        wanted.append(reference.score_multi([text, third], answer)["rougeL"].fmeasure)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert 0.2 < sum(found) / PAIRS < 0.8 and len(set(found)) > PAIRS / 4


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_table(first: list[str], second: list[str]):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, two in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == two else max(table[i][j + 1], table[i + 1][j])
    assert common_length(first, second) == table[-1][-1]


def test_words_are_stemmed_and_the_nearest_reference_counts():
    assert rouge_l("Running dogs!", ["the dog runs", "run dog"]) == 1.0
    assert rouge_l("a dog", ["a cat sat", "a dog sat down"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("text", "reference"), [("", "a dog"), ("a dog", ""), ("", ""), ("...", "..."), ("ä", "ä")])
def test_texts_without_words_score_nothing(text: str, reference: str):
    assert rouge_l(text, [reference]) == 0.0


def test_exact_match_keeps_articles_and_nothing_of_case_marks_and_space():
    assert exact_match(" The  cat, sat.\n", ["the cat sat"]) == 1.0
    assert exact_match("cat sat", ["the cat sat"]) == 0.0
    assert exact_match("no", ["yes", "No!"]) == 1.0


def test_a_generated_text_ends_before_its_first_end_token():
    assert tokens_of_text([5, 6, 2, 7, 2], {2, 9}) == [5, 6]
    assert tokens_of_text([5, 6], {2}) == [5, 6]
    assert tokens_of_text([2], {2}) == []


def test_an_unwritten_answer_is_no_match_and_punctuation_alone_is_compared():
    assert [exact_match(text, ["?", "..."]) for text in ("", " ", "!", "? ", "a")] == [0.0, 0.0, 0.0, 1.0, 0.0]
