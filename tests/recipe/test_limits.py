"""What a recipe cannot ask for: sizes without end, files without end, and reading that takes more than linear time."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.recipe.schema import Recipe

LEAST = 'task = "sst2"\nmethod = "kd"\nteacher = {model = "t"}\n'


def numbers(schema: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, type]]:
    """Yield (field, int or float) of every number in a schema and the tables below; `[]`: in a list, `64`: in a key."""
    for name, field in schema.model_fields.items():
        yield from _numbers(field.annotation, (*path, name))


def _numbers(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[str, type]]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        yield ".".join(path), annotation
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from numbers(annotation, path)
    elif origin is Annotated:
        yield from _numbers(parts[0], path)
    elif origin in (list, dict):
        yield from _numbers(parts[-1], (*path, "[]" if origin is list else "64"))
    else:
        for part in parts:
            yield from _numbers(part, path)


def written(place: str, value: object) -> str:
    """Return a recipe in one line that has `value` at a place, tables and lists around it."""
    text = str(value)
    for part in reversed(place.split(".")):
        text = f"[{text}]" if part == "[]" else f"{{{part} = {text}}}"
    return text


NUMBERS = sorted(set(numbers(Recipe)))
OF_METHODS = [
    (name, place, kind)
    for name in registry.BUILT_IN
    for place, kind in sorted(set(numbers(registry.get(name).options)))
]


def refusal(folder: Path, overrides: list[str]) -> str:
    """Return the message that refuses the smallest recipe with these overrides."""
    path = folder / "recipe.toml"
    path.write_text(LEAST)
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(("place", "kind"), NUMBERS)
def test_every_number_of_a_recipe_has_an_end(tmp_path: Path, place: str, kind: type) -> None:
    top, _, below = place.partition(".")
    for value in [2**63] if kind is int else ["inf", "-inf", "nan"]:
        option = f"{top}={written(below, value) if below else value}"
        # A table around it may lack what it needs; that is told beside it.
        assert place.replace(".[]", "[0]") in refusal(tmp_path, [option])


@pytest.mark.parametrize(("method", "place", "kind"), OF_METHODS)
def test_every_number_of_a_method_has_an_end(tmp_path: Path, method: str, place: str, kind: type) -> None:
    for value in [2**63] if kind is int else ["inf", "nan"]:
        top, _, below = place.partition(".")
        option = f"method={{name = '{method}', {top} = {written(below, value) if below else value}}}"
        message = refusal(tmp_path, [option])
        assert f"method.{place.partition('.[]')[0]}" in message and "must be" in message


def test_a_scratch_teacher_fits_a_memory(tmp_path: Path) -> None:
    option = "teacher={scratch = {layers = 200, hidden_size = 60000, heads = 4}}"
    assert "billion parameters" in refusal(tmp_path, [option])


@pytest.mark.parametrize("params", ["inf", "1e400k", "nan", "9999B", "-1k", "0"])
def test_a_parameter_count_is_a_number_with_an_end(tmp_path: Path, params: str) -> None:
    assert "parameter count" in refusal(tmp_path, [f"student.params='{params}'"])


def test_only_files_of_a_recipes_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "big").write_bytes(b"#" * 1_000_001)
    (tmp_path / "fits").write_text(LEAST + "#" * (1_000_000 - len(LEAST)))
    assert load_recipe(tmp_path / "fits").method.name == "kd"
    for name, words in [
        ("pipe", "is a device or a pipe"),
        ("endless", "is a device or a pipe"),
        ("loop", "cannot read"),
        ("big", "more than 1,000,000 bytes"),
        ("x" * 3000, "cannot read"),
        ("", "is a folder"),
        ("a\0b", "cannot read"),
    ]:
        with pytest.raises(InputError, match=words):
            load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 100_000, "too many brackets inside each other"),
        ("a = " + "{b = " * 100_000, "too many brackets inside each other"),
        ("a = " + "[" * 50 + "]" * 50, "tables more than 32 deep"),
        (".".join("ab" * 100_000) + " = 1", "too many dots in a line"),
        ("[" + ".".join("ab" * 25) + "]", "tables more than 32 deep"),
        ("seed = " + "9" * 5000, "exceeds the limit"),
    ],
)
def test_a_text_that_no_person_writes_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        load_recipe(path)
    assert "recipe.toml:1:" in str(caught.value)
    name, _, value = text.partition(" = ")
    if value:
        assert len(refusal(tmp_path, [f"{name}={value}", f"student={value}"])) < 1000


@pytest.mark.slow
def test_the_time_to_name_mistakes_grows_with_the_text_alone(tmp_path: Path) -> None:
    def seconds(lines: int) -> float:
        path = tmp_path / "recipe.toml"
        path.write_text(LEAST + "[student]\n" + "".join(f"key{number} = 1\n" for number in range(lines)))
        begun = time.process_time()
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        assert "of which these are the first 20" in str(caught.value) and len(str(caught.value)) < 10_000
        return time.process_time() - begun

    seconds(1000)
    # Ten times the text: ten times the time, not a hundred times. The machine may be busy.
    assert seconds(40_000) < 30 * max(seconds(4000), 0.02)
