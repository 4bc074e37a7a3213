"""A few of the wrong recipes, overrides and command lines of `fuzz.py`; the whole of it is run by hand."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from families import tiny, tokenizer
from faults import fuzz

from kdcli.models.save import save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the cases name."""

    def save_teacher(folder: Path) -> None:
        folder.mkdir()
        names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
        save_model(tiny("bert", **names), folder, tokenizer())

    folder = tmp_path_factory.mktemp("fuzz")
    fuzz.furnish(folder, save_teacher)
    return folder


@pytest.mark.parametrize(
    ("cases", "count"), [(fuzz.recipes, len(fuzz.HOSTILE) + 20), (fuzz.overrides, 30), (fuzz.argument_lists, 120)]
)
def test_wrong_words_end_with_a_message_and_soon(
    cases: Callable[[int], Iterator[fuzz.Case]], count: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("KDCLI_DATA_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {case.name: fuzz.problem_of(case, place) for case in cases(count)}
    assert {name: problem for name, problem in found.items() if problem is not None} == {}
    assert sorted(os.listdir(place)) == sorted({*os.listdir(place)} - {"runs", "out"})
