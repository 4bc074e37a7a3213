"""Column files: a word a line."""

from pathlib import Path

import pytest

from kdcli.data.files import read_file
from kdcli.errors import InputError

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

# ! . O
\xa0 -- : O
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def columns_of(path: Path) -> dict[str, list]:
    return {name: list(column) for name, column in read_file(path, "task.train").items()}


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns_are_numbered_and_sentences_end_at_blank_lines(separator: str, end: str, tmp_path: Path):
    text = CONLL.replace(" ", separator).replace("\n", end)
    found = columns_of(write(tmp_path / "a.conll", text))
    assert found["1"] == [["EU", "rejects"], ["#", "\xa0"]] and list(found) == ["1", "2", "3", "4"]
    assert found["4"] == [["B-ORG", "O"], ["O", "O"]]


def test_the_last_sentence_needs_no_blank_line(tmp_path: Path):
    assert columns_of(write(tmp_path / "a.iob", "a O\nb O\n\n\n\nc O"))["1"] == [["a", "b"], ["c"]]


def test_tabs_leave_room_for_empty_cells_and_spaces_in_words(tmp_path: Path):
    found = columns_of(write(tmp_path / "a.bio", "New York\tB-x\n\tO\n"))
    assert found == {"1": [["New York", ""]], "2": [["B-x", "O"]]}


def test_comments_before_sentences_are_left_out(tmp_path: Path):
    text = "#\tsource\n# sent_id = 1\n1\tMr\tO\n# 2\t#\tO\n\n# sent_id = 2\n1\tx\tO\n".replace("# 2", "#2")
    assert columns_of(write(tmp_path / "a.conll", text))["2"] == [["Mr", "#"], ["x"]]


@pytest.mark.parametrize("separator", ["\t", " "])
@pytest.mark.parametrize(
    "head", ["", "-DOCSTART- O\n\n", "# sent_id = 1\n", "# two words and more\n", "#\n", "# source\n"]
)
def test_words_may_begin_with_a_hash_also_before_all_others(head: str, separator: str, tmp_path: Path):
    text = "#nowplaying O\n#a=b O\nx B-y\n\n#one O\n\n#two O\ny O\n".replace("#a=b", "#ab").replace(" ", separator)
    found = columns_of(write(tmp_path / "a.conll", head + text))
    assert found["1"] == [["#nowplaying", "#ab", "x"], ["#one"], ["#two", "y"]]
    assert found["2"] == [["O", "O", "B-y"], ["O"], ["O", "O"]]


@pytest.mark.parametrize("separator", ["\t", " "])
def test_all_words_may_begin_with_a_hash(separator: str, tmp_path: Path):
    text = "# a comment\n# id = 1\n#one|O\n#two|B-x\n\n# id = 2\n#three|O\n".replace("|", separator)
    assert columns_of(write(tmp_path / "a.conll", text)) == {
        "1": [["#one", "#two"], ["#three"]],
        "2": [["O", "B-x"], ["O"]],
    }


def test_conllu_has_its_own_names_and_lines_that_are_no_words(tmp_path: Path):
    line = "{}\t{}\t_\t{}\t_\t_\t0\t_\t_\t_\n"
    rows = [("1-2", "im", "_"), ("1", "in", "ADP"), ("2", "dem", "DET"), ("2.1", "", "_"), ("3", "Haus", "NOUN")]
    text = "# newdoc\n# text = im Haus\n" + "".join(line.format(*row) for row in rows)
    found = columns_of(write(tmp_path / "a.conllu", text))
    assert found["form"] == [["in", "dem", "Haus"]] and found["upos"] == [["ADP", "DET", "NOUN"]]


def test_a_file_may_name_its_columns(tmp_path: Path):
    found = columns_of(write(tmp_path / "a.conllup", "# global.columns = FORM NER\nx\tO\n\ny\tB-z\n"))
    assert found == {"form": [["x"], ["y"]], "ner": [["O"], ["B-z"]]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.conll", "a O\n\nb B-x I\n", r"a.conll:3 has 3 columns, line 1 has 2"),
        ("a.conllu", "a O\n", r"a.conllu:1 has 2 columns, the format has 10"),
        ("a.conll", "\n\n# nothing\n", "has no rows"),
    ],
)
def test_what_is_no_column_file_is_told_with_its_line(name: str, text: str, words: str, tmp_path: Path):
    with pytest.raises(InputError, match=words):
        read_file(write(tmp_path / name, text), "task.train")


def test_bytes_that_are_no_text_are_told(tmp_path: Path):
    (tmp_path / "a.conll").write_bytes(b"a O\nb\xe9 O\n")
    with pytest.raises(InputError, match=r"a.conll:2 is not readable as CoNLL"):
        read_file(tmp_path / "a.conll", "task.train")
    assert list(read_file(tmp_path / "a.conll", "task.train", encoding="latin-1")["1"]) == [["a", "b\xe9"]]
