"""Cases of wrong input, and what must hold for each. A part of the program has a file of cases, `test_bad_PART.py`:

CASES = Cases()
case = CASES.add

@case("words of the message", "more words")
def what_is_wrong(world: World) -> list[str]:
    ...put it into world.folder...
    return ["distill", world.recipe()]

@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
"""

from collections.abc import Callable
from pathlib import Path

from conftest import World

Prepare = Callable[[World], list[str]]
"""Puts the wrong thing into the working folder, and returns the arguments of the program."""


class Cases(dict[str, tuple[Prepare, tuple[str, ...]]]):
    """name -> (what to prepare, words that the message must have)."""

    def add(self, *words: str) -> Callable[[Prepare], Prepare]:
        def add(prepare: Prepare) -> Prepare:
            assert prepare.__name__ not in self and words
            self[prepare.__name__] = (prepare, words)
            return prepare

        return add

    def check(self, name: str, world: World, own_cache: Path) -> None:
        """Exit code 2, one clear message, no traceback, and nothing left behind; a dry run refuses the same."""
        prepare, words = self[name]
        arguments = prepare(world)
        before = world.listing()
        outcome = world.call(*arguments)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        assert [line.startswith("error:") for line in outcome.err.splitlines()].count(True) == 1
        assert [word for word in words if word not in outcome.err] == [], outcome.err
        assert world.listing() == before
        assert list(own_cache.iterdir()) == []
        if arguments[0] == "distill":
            # The dry run refuses what the run refuses, in the same words.
            planned = world.call(*arguments, "--dry-run")
            assert (planned.code, planned.out, planned.err) == (2, "", outcome.err)
