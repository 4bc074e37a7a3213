"""Text that is cut into sentences: where they end, and that nothing but space is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.data.sentences import cut, sentences


@pytest.mark.parametrize(
    "expected",
    [
        ["One.", "Two!", "Three?", "Four ..."],
        ["Mr. J. B. Brown of Reps. and Sens. met Dr. No in Sept. 1961.", "He left."],
        ['He said "it is so."', "She did not."],
        ["It cost 3.5 dollars, i.e. little.", "(Really.)", "1999 was long ago."],
        ["the cat sat.", "it slept."],
        ["Was it I.", "No."],
        ["He asked: why? and went."],
        ["1. First of a list.", "Then."],
        ["هل هذا؟", "نعم."],
        ["यह एक है।", "वह दो है।"],
    ],
)
def test_sentences_end_where_they_should(expected: list[str]):
    assert list(sentences(" ".join(expected))) == expected


def test_chinese_and_japanese_need_no_space():
    assert list(sentences("这是一。那是二！“好吗？”是的")) == ["这是一。", "那是二！", "“好吗？”", "是的"]


@given(st.text("aA .!?。\"'\n1", max_size=60))
def test_nothing_but_space_is_lost(text: str):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_units_repeats_and_what_holds_no_word():
    documents = ["One. Two.\n\nTwo.\n* * *\n", "One. Two.", "Three"]
    assert list(cut(documents, "sentences")) == ["One.", "Two.", "Three"]
    assert list(cut(documents, "paragraphs")) == ["One. Two.", "Two.", "Three"]
    assert list(cut(documents, "texts")) == ["One. Two.\n\nTwo.\n* * *", "One. Two.", "Three"]
