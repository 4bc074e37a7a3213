"""Tables as people have them: other separators, other encodings, broken quotes."""

from pathlib import Path

import pytest

from kdcli.data.columns import Columns
from kdcli.data.files import read_file
from kdcli.errors import InputError
from kdcli.recipe.schema import TaskSection

TEXTS = ["good, and fun", "dull; empty", "one | two", "über"]
LABELS = ["yes", "no", "yes", "no"]


def read(path: Path, content: str | bytes, **options: str) -> Columns:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, "task.data", **options)  # type: ignore[arg-type]


def table(separator: str) -> str:
    return "\n".join(
        f'"{text}"{separator}{label}' for text, label in zip(["text", *TEXTS], ["label", *LABELS], strict=True)
    )


@pytest.mark.parametrize("separator", list(",;\t|"))
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_what_separates_columns_is_found_out(separator: str, suffix: str, tmp_path: Path):
    columns = read(tmp_path / f"rows.{suffix}", table(separator))
    assert {name: list(values) for name, values in columns.items()} == {"text": TEXTS, "label": LABELS}


def test_another_separator_than_the_usual_is_told(tmp_path: Path):
    told: list[str] = []
    (tmp_path / "rows.csv").write_text(table(";"))
    read_file(tmp_path / "rows.csv", "task.data", notes=told)
    assert told == ["rows.csv: columns are separated by ';'"]
    (tmp_path / "rows.csv").write_text(table(","))
    read_file(tmp_path / "rows.csv", "task.data", notes=told)
    assert len(told) == 1


def test_unquoted_texts_with_another_separator_in_them_are_read_as_the_header_says(tmp_path: Path):
    rows = ["text,label", "so; so,yes", "dull; and; empty,no"]
    assert list(read(tmp_path / "rows.csv", "\n".join(rows))["text"]) == ["so; so", "dull; and; empty"]
    rows = ["text;label", "so, so;yes", "dull, and, empty;no"]
    assert list(read(tmp_path / "rows.csv", "\n".join(rows))["text"]) == ["so, so", "dull, and, empty"]


def test_where_the_header_has_several_separators_the_rows_decide(tmp_path: Path):
    columns = read(tmp_path / "rows.csv", "text;label, as given;who\na;yes;x\nb, c, d;no;y\n")
    assert list(columns) == ["text", "label, as given", "who"] and list(columns["text"]) == ["a", "b, c, d"]


def test_one_column_is_one_column(tmp_path: Path):
    assert list(read(tmp_path / "rows.csv", "text\nfine\nso so\n")["text"]) == ["fine", "so so"]


def test_a_separator_that_is_given_is_taken(tmp_path: Path):
    columns = read(tmp_path / "rows.csv", "text~label\na,b;c~yes\n", delimiter="~")
    assert list(columns["text"]) == ["a,b;c"]
    with pytest.raises(InputError, match=r"rows\.csv:2 has 1 column, the header has 2"):
        read(tmp_path / "rows.csv", "text;label\na,b\n", delimiter=";")


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (["text,label", "fine,yes", r'"he said \"dull\", really",no', "so,no"], 3),
        (["text,label", '"two', 'lines",yes', '"he said "no" twice",no', "so,no"], 4),
        (["text,label", "fine,yes", '"never closed,no', "so,no", "la,yes"], 3),
        (["text,label", "fine,yes", '"never closed,no', '"so",no', "la,yes"], 3),
        (["text,label", "fine,yes", '"closed too late,no', 'so",no,x', "la,yes"], 3),
    ],
)
def test_broken_quotes_name_the_line_where_the_row_begins(rows: list[str], line: int, tmp_path: Path):
    with pytest.raises(InputError, match=rf"rows\.csv:{line} ") as caught:
        read(tmp_path / "rows.csv", "\n".join(rows) + "\n")
    assert "doubled" in str(caught.value.hint)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_bytes_that_are_no_utf8_name_the_line_and_the_remedy(suffix: str, tmp_path: Path):
    lines = {
        "csv": ["text,label", "fine,yes", "übel,no", "so,no"],
        "jsonl": ['{"text": "fine"}', "", '{"text": "übel"}'],
        "json": ["[", '{"text": "\ufffd"},', '{"text": "übel"}]'],
    }[suffix]
    content = "\n".join(lines)
    with pytest.raises(InputError, match=rf"rows\.{suffix}:3 is not readable as .*: its bytes are not UTF-8") as caught:
        read(tmp_path / f"rows.{suffix}", content.replace("\ufffd", "x").encode("latin-1"))
    assert 'task.encoding = "latin-1"' in str(caught.value.hint)
    columns = read(tmp_path / f"rows.{suffix}", content.replace("\ufffd", "x").encode("latin-1"), encoding="latin-1")
    assert "übel" in list(columns["text"])


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_recognised_and_read_when_asked_for(codec: str, tmp_path: Path):
    content = table(",").encode(codec)
    with pytest.raises(InputError, match=r"rows\.csv:1 .*looks like UTF-16") as caught:
        read(tmp_path / "rows.csv", content)
    assert f'task.encoding = "{codec}"' in str(caught.value.hint)
    assert list(read(tmp_path / "rows.csv", content, encoding=codec)["text"]) == TEXTS


def test_an_encoding_that_does_not_fit_names_the_line(tmp_path: Path):
    with pytest.raises(InputError, match=r"rows\.csv:3 is not readable as CSV: its bytes are not ascii"):
        read(tmp_path / "rows.csv", "text,label\na,b\nü,c\n", encoding="ascii")


@pytest.mark.parametrize(
    "fields",
    [
        {"delimiter": "ab"},
        {"delimiter": '"'},
        {"delimiter": ""},
        {"delimiter": "a"},
        {"encoding": "nonesuch"},
        {"encoding": "base64"},
        {"encoding": ""},
    ],
)
def test_impossible_separators_and_encodings_are_refused_with_the_recipe(fields: dict[str, str]):
    with pytest.raises(ValueError, match=r"cannot stand between|is no encoding"):
        TaskSection.model_validate({"name": "own", "data": "rows.csv", "text": "text", **fields})


def test_columns_that_begin_late_and_values_of_all_types_keep_their_rows(tmp_path: Path):
    lines = ['{"a": 1}'] * 12_000 + ['{"a": "x", "b": [1]}', '{"b": null}', '{"a": 0.5, "b": "y"}']
    columns = read(tmp_path / "rows.jsonl", "\n".join(lines))
    assert list(columns["a"]) == [1] * 12_000 + ["x", None, 0.5]
    assert list(columns["b"]) == [None] * 12_000 + [[1], None, "y"]
    assert columns["a"][12_000] == "x" and columns["a"][-1] == 0.5 and columns["b"][12_000:] == [[1], None, "y"]
