"""Spans in tags: their scores are seqeval's, and what is wrong about a sequence is found."""

import random
import warnings
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import Dataset
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import BILOU, IOBES, Entities

from kdcli.tasks.tag_spans import Scheme, beginnings, incomplete, scheme_of, spans_of, types_of
from kdcli.tasks.token_classification import KIND

PREFIXES: dict[Scheme, str] = {"IOB": "BI", "IOBES": "BIES", "BILOU": "BILU"}
STRICT = {"IOBES": IOBES, "BILOU": BILOU}
TYPES = ["person", "creative-work", "X"]


def tags_of(scheme: Scheme, types: list[str] = TYPES) -> list[str]:
    return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in PREFIXES[scheme])]


def drawn(draw: random.Random, tags: list[str], *, words: int = 12) -> list[str]:
    """Return tags that go on or change at random: right spans and wrong ones."""
    found: list[str] = []
    for _ in range(draw.randint(1, words)):
        same = [tag for tag in tags if found and tag[1:] == found[-1][1:]]
        found.append(draw.choice(same if same and draw.random() < 0.6 else tags))
    return found


def agree(answers: list[list[str]], truth: list[list[str]], scheme: Scheme) -> None:
    """Assert that the kind's scores are seqeval's."""
    labels = sorted({tag for side in (answers, truth) for row in side for tag in row})
    number = {tag: place for place, tag in enumerate(labels)}
    rows = Dataset.from_dict({"label": [[number[tag] for tag in row] for row in truth]})
    import numpy as np

    found = KIND.score([np.array([number[tag] for tag in row]) for row in answers], rows, labels, KIND.metrics)
    options = {} if scheme == "IOB" else {"mode": "strict", "scheme": STRICT[scheme]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "f1": f1_score(truth, answers, **options),
            "precision": precision_score(truth, answers, **options),
            "recall": recall_score(truth, answers, **options),
            "accuracy": accuracy_score(truth, answers),
        }
        each = f1_score(truth, answers, average=None, **options)
    gold, given = (
        Entities(side, STRICT[scheme]).unique_tags
        if options
        else {kind for row in side for kind, *_ in get_entities(row)}
        for side in (truth, answers)
    )
    kinds = sorted(gold | given)
    expected |= {f"f1/{kind}": value for kind, value in zip(kinds, each, strict=True)}
    expected["f1_macro"] = float(each.mean()) if len(each) else 0.0
    assert set(found) == {*KIND.metrics, *(f"f1/{kind}" for kind in gold)}
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-12)


@pytest.mark.parametrize("scheme", PREFIXES)
def test_scores_are_those_of_seqeval(scheme: Scheme):
    draw = random.Random(0)
    tags = tags_of(scheme)
    for _ in range(400):
        truth = [drawn(draw, tags) for _ in range(draw.randint(1, 6))]
        answers = [[tag if draw.random() < 0.7 else draw.choice(tags) for tag in row] for row in truth]
        # Labels must show the scheme.
        truth.append([f"{prefix}-X" for prefix in PREFIXES[scheme]])
        answers.append(["O"] * len(PREFIXES[scheme]))
        agree(answers, truth, scheme)


@pytest.mark.parametrize("scheme", PREFIXES)
def test_spans_of_tags_without_types_are_those_of_seqeval(scheme: Scheme):
    draw = random.Random(1)
    tags = ["O", *PREFIXES[scheme]]
    assert scheme_of(tags) == scheme and types_of(tags) == ["_"]
    for _ in range(300):
        row = drawn(draw, tags)
        if scheme == "IOB":
            expected = get_entities(row)
        else:
            found = Entities([row], STRICT[scheme]).entities[0]
            expected = [(one.tag, one.start, one.end - 1) for one in found]
        assert spans_of(row, scheme) == expected


@pytest.mark.data
@pytest.mark.parametrize(("name", "column"), [("conll2000", "chunk_tags"), ("wnut_17", "ner_tags")])
def test_scores_on_real_rows_are_those_of_seqeval(name: str, column: str, data_dir: Path):
    import json

    truth = pyarrow.parquet.read_table(data_dir / name / "validation.parquet").column(column).to_pylist()
    names = json.loads((data_dir / name / "tags.json").read_text())
    truth = [[names[tag] if isinstance(tag, int) else tag for tag in row] for row in truth]
    draw = random.Random(2)
    answers = [[tag if draw.random() < 0.9 else draw.choice(names) for tag in row] for row in truth]
    agree(answers, truth, "IOB")
    agree(truth, truth, "IOB")
    assert beginnings(truth).scheme == "IOB2" and beginnings(truth).errors == 0


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["B-x", "I-x", "O"], "IOB"),
        (["I-x", "O"], "IOB"),
        (["B-x"], "IOB"),
        (["B", "I", "O"], "IOB"),
        (["S-x", "B-x", "E-x", "O"], "IOBES"),
        (["S-x", "O"], "IOBES"),
        (["U-x", "L-x", "B-x", "I-y", "O"], "BILOU"),
        (["I", "O"], None),
        (["E-x", "I-x", "O"], None),
        (["B-x", "E-x", "L-x"], None),
        (["B-x", "NOUN"], None),
        (["NOUN", "VERB"], None),
        (["0", "1"], None),
        (["O"], None),
        (["B-", "O"], None),
    ],
)
def test_schemes_are_recognised(tags: list[str], scheme: str | None):
    assert scheme_of(tags) == scheme


def test_iob1_is_told_from_iob2_with_errors():
    iob2 = [["B-x", "I-x", "O", "B-y"], ["B-x", "B-x", "I-x"]] * 10
    iob1 = [["I-x", "I-x", "O", "I-y"], ["I-x", "B-x", "I-x"]] * 10
    for rows, scheme in ((iob2, "IOB2"), (iob1, "IOB1")):
        found = beginnings(rows)
        assert (found.scheme, found.errors, found.spans) == (scheme, 0, 40)
        # The same spans, whatever writes them.
        assert [spans_of(row, "IOB") for row in rows] == [spans_of(row, "IOB") for row in iob2]
    broken = beginnings([*iob2, ["O", "I-x", "B-y", "I-x"]])
    assert (broken.scheme, broken.errors, broken.first_bare) == ("IOB2", 2, (20, 1))
    broken = beginnings([*iob1, ["O", "O", "B-x"]])
    assert (broken.scheme, broken.errors, broken.first_parting) == ("IOB1", 1, (20, 2))


@pytest.mark.parametrize(
    ("tags", "place"),
    [
        (["B-x", "I-x", "E-x", "O", "S-x"], None),
        (["B-x", "L-x", "U-y"], None),
        (["B-x", "I-x", "O"], 0),
        (["S-x", "E-x"], 1),
        (["B-x", "I-y", "E-x"], 0),
        (["B-x", "E-x", "I-x"], 2),
    ],
)
def test_a_tag_of_no_complete_span_is_found(tags: list[str], place: int | None):
    assert incomplete(tags) == place
