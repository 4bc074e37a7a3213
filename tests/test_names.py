"""What may become the name of a folder."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.errors import InputError
from kdcli.names import folder_of, problem_of, same_folder

GOOD = [
    "one",
    "sst2-makd",
    "0.5",
    "rte (small)",
    "Übung",
    "文书分类",
    "x" * 100,
    "a b",
    "Κυριακή",
    "latest2",
    "console",
    "com",
    "می‌خواهم",
]
BAD = ["", ".", "..", "...", ".hidden", "-o", "a/b", "a\\b", "a\0b", "a\nb", "a\x1b[31m", "a\u202eb", "a\u2066b"]
BAD += ["x" * 101, "文" * 70, " a", "a ", "a.", "latest", "/etc", "~/../x", "a\u2028b", "\ud800", "C:\\x", "a\x7f"]
BAD += ["Latest", "LATEST", "con", "NUL", "aux.txt", "Com1", *(f"a{sign}b" for sign in ':*?"<>|')]
BAD += ["\u200b", "\u2060\ufeff", "\u3164", "\u2800", "\ufe0f"]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_a_folder_in_its_place(name: str, tmp_path: Path):
    folder = folder_of(tmp_path, name)
    folder.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_refused_with_its_field(name: str, tmp_path: Path):
    with pytest.raises(InputError, match="cannot be a name") as caught:
        folder_of(tmp_path, name, where="task.name")
    assert caught.value.where == "task.name"
    assert not [c for c in str(caught.value) if ord(c) < 32 and c != "\n"]


@given(st.text())
def test_what_is_accepted_stays_in_its_folder(name: str):
    if problem_of(name) is None:
        assert os.path.dirname(os.path.normpath(f"/runs/{name}")) == "/runs"
        assert len(f".{name}.replaced".encode()) <= 255


def test_names_that_some_disks_take_for_one():
    assert same_folder("Caf\u00e9") == same_folder("cafe\u0301") != same_folder("cafe")
