"""The built-in reviews: what decides is in the text, and the noise is as it says."""

import hashlib
import math
import re
import subprocess
import sys

import pytest

from kdcli.data import reviews as synthetic
from kdcli.data.reviews import LABELS, NOISE, SIZES, reviews

NEGATIONS = ("not at all ", "far from ", "anything but ", "hardly ", "never ", "not ")


def read(sentence: str) -> int:
    """Return the true label by rules that the generator does not use: the deciding clause, its word, its negation."""
    opinions = [part for part in sentence.split(" . ") if part not in synthetic.FILLERS]
    assert len(opinions) == 1
    clause = opinions[0]
    if " , but " in clause:
        clause = clause.split(" , but ")[1]
    elif clause.startswith("although "):
        clause = clause.split(" , ")[1]
    elif " , even if " in clause:
        clause = clause.split(" , even if ")[0]
    clause = clause.split(" and ")[0]
    words = re.findall(r"\w+", clause)
    positive = [word for word in words if word in synthetic.POSITIVE]
    negative = [word for word in words if word in synthetic.NEGATIVE]
    assert len(positive) + len(negative) == 1
    return int(bool(positive) != any(negation in clause for negation in NEGATIONS))


@pytest.fixture(scope="module")
def data() -> dict[str, dict[str, list]]:
    return reviews()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_reader_without_noise_is_right_every_time(data: dict, split: str):
    assert [read(text) for text in data[split]["text"]] == data[split]["truth"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_are_flipped_as_often_as_it_says(split: str, seed: int):
    rows = reviews(seed)[split]
    flipped = sum(a != b for a, b in zip(rows["label"], rows["truth"], strict=True))
    size = SIZES[split]
    assert abs(flipped / size - NOISE) < 4 * math.sqrt(NOISE * (1 - NOISE) / size)


def test_noise_does_not_depend_on_the_label(data: dict):
    rows = data["train"]
    for truth in (0, 1):
        labels = [label for label, true in zip(rows["label"], rows["truth"], strict=True) if true == truth]
        rate = sum(label != truth for label in labels) / len(labels)
        assert abs(rate - NOISE) < 4 * math.sqrt(NOISE * (1 - NOISE) / len(labels))


def test_the_best_possible_score_is_one_minus_the_noise(data: dict):
    rows = data["validation"]
    right = sum(read(text) == label for text, label in zip(rows["text"], rows["label"], strict=True))
    assert abs(right / SIZES["validation"] - (1 - NOISE)) < 0.03


def test_sizes_and_balance(data: dict):
    assert {name: len(rows["text"]) for name, rows in data.items()} == SIZES
    assert len(LABELS) == 2
    for rows in data.values():
        assert abs(sum(rows["label"]) / len(rows["label"]) - 0.5) < 0.05


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_sentence_is_in_both_sets(seed: int):
    data = reviews(seed)
    assert not set(data["train"]["text"]) & set(data["validation"]["text"])


def test_the_same_seed_gives_the_same_data_in_another_process(data: dict):
    code = (
        "import hashlib; from kdcli.data.reviews import reviews; "
        "print(hashlib.sha256(repr(reviews()).encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip(),
        hashlib.sha256(repr(data).encode()).hexdigest(),
    }
    assert len(digests) == 1


def test_another_seed_gives_other_sentences(data: dict):
    other = reviews(1)
    shared = set(other["train"]["text"]) & set(data["train"]["text"])
    assert len(shared) < 0.1 * SIZES["train"]


def test_counting_opinion_words_alone_is_not_enough(data: dict):
    """A bag of words that knows every opinion's sign, but no order, stays well below the ceiling."""
    rows = data["train"]
    right = 0.0
    for text, truth in zip(rows["text"], rows["truth"], strict=True):
        words = re.findall(r"\w+", text)
        balance = sum(w in synthetic.POSITIVE for w in words) - sum(w in synthetic.NEGATIVE for w in words)
        right += 0.5 if balance == 0 else float((balance > 0) == bool(truth))
    assert 0.5 < right / len(rows["text"]) < 0.75


def test_opinions_have_one_sign_each():
    assert not set(synthetic.POSITIVE) & set(synthetic.NEGATIVE)
    opinions = {*synthetic.POSITIVE, *synthetic.NEGATIVE}
    assert len(opinions) == len(synthetic.POSITIVE) + len(synthetic.NEGATIVE)
    harmless = " ".join([*synthetic.FILLERS, *synthetic.SUBJECTS, *synthetic.STRONG])
    assert not opinions & set(re.findall(r"\w+", harmless))
