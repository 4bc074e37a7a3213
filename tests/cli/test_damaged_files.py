"""What the cache or a stopped run holds is checked when it is read: damage gives a note, and the same student."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World

from kdcli.distill import run as pipeline

Change = Callable[[Path], None]


def flip(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap_words(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    words = document["model"]["vocab"]
    one, other = list(words)[-6:-4]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def add_dropout(path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "hidden_dropout_prob": 0.5}))


def copy_over(path: Path) -> None:
    """Put another valid file in its place: weights of the same shapes."""
    from safetensors.torch import load_file, save_file

    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def student_of(world: World, name: str) -> dict[str, bytes]:
    folder = world.folder / "runs" / name / "student"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def only(folder: Path, pattern: str) -> Path:
    [found] = folder.glob(pattern)
    return found


TEACHER = {
    "scratch": {"layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 32, "vocab_size": 150},
    "finetune": {"max_steps": 2},
}


def test_a_damaged_teacher_in_the_cache_is_trained_again_to_the_same_student(world: World, own_cache: Path):
    recipe = world.recipe("teacher", teacher=TEACHER)
    first = world.call("distill", recipe, "--set", "name=first")
    assert first.code == 0, first.err
    expected = student_of(world, "first")
    cached = world.call("distill", recipe, "--set", "name=cached")
    # Whether the teacher came from the cache makes no difference to any file.
    assert cached.code == 0 and "fine-tuned before" in cached.err and student_of(world, "cached") == expected
    damage: list[tuple[str, Change]] = [
        ("model.safetensors", flip),
        ("model.safetensors", copy_over),
        ("tokenizer.json", swap_words),
        ("config.json", add_dropout),
        ("kdcli_manifest.json", flip),
        ("kdcli.json", Path.unlink),
    ]
    for number, (name, change) in enumerate(damage):
        change(only(own_cache, f"teachers/*/{name}"))
        again = world.call("distill", recipe, "--set", f"name=run{number}")
        assert again.code == 0, again.err
        assert "is made again" in again.err and name in again.err, (name, again.err)
        assert student_of(world, f"run{number}") == expected, name


def test_damaged_numbers_of_copies_are_asked_for_again(world: World, own_cache: Path):
    world.model()
    world.model("filler", "filler")
    augment = {"model": "filler", "copies": 1, "top_k": 3}
    recipe = world.recipe(task={"augment": augment, "max_length": 16})
    assert world.call("distill", recipe, "--set", "name=first").code == 0
    kept = only(own_cache, "augment/*/*.safetensors")
    whole = kept.read_bytes()
    for number, change in enumerate((flip, cut)):
        change(kept)
        again = world.call("distill", recipe, "--set", f"name=run{number}")
        assert again.code == 0 and f"{kept} is made again" in again.err, again.err
        assert kept.read_bytes() == whole
        assert student_of(world, f"run{number}") == student_of(world, "first")


def test_changed_decisions_are_asked_for_again(world: World, own_cache: Path):
    world.model()
    student = {"form": "checkpoint", "model": "teacher", "layers": 1}
    recipe = world.recipe(method={"name": "dbkd", "copies": 2}, student=student)
    assert world.call("distill", recipe, "--set", "name=first").code == 0
    kept = only(own_cache, "decisions/*.jsonl")
    lines = kept.read_text().splitlines()
    number = next(place for place, line in enumerate(lines) if line)
    row = json.loads(lines[number])
    lines[number] = json.dumps({**row, "decisions": [1 - decision for decision in row["decisions"]]})
    kept.write_text("\n".join(lines) + "\n")
    again = world.call("distill", recipe, "--set", "name=again")
    assert again.code == 0 and f"1 line of {kept} damaged" in again.err
    assert student_of(world, "again") == student_of(world, "first")


class Killed(BaseException):
    pass


def test_a_stopped_run_notices_what_was_changed_meanwhile(world: World):
    world.model()
    recipe = world.recipe(
        method={"name": "tinybert", "shares": [0.5, 0.5]}, train={"max_steps": 4, "eval_every": 1, "select": "last"}
    )
    assert world.call("distill", recipe, "--set", "name=whole").code == 0
    expected = student_of(world, "whole")

    def fail(*arguments: Any, **more: Any) -> None:
        raise Killed

    with world.monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "score_student", fail)
        world.call("distill", recipe)
    stopped = world.folder / "runs" / "recipe"
    shutil.copytree(stopped, world.folder / "stopped")
    damage: list[tuple[list[str], Change]] = [
        (["1-*/final/model.safetensors"], flip),
        (["2-*/final/model.safetensors"], copy_over),
        (["2-*/final/record.json"], flip),
        (["2-*/final/kdcli_manifest.json", "2-*/checkpoint-2/optimizer.pt"], flip),
        (["2-*/final/kdcli_manifest.json", "2-*/checkpoint-2/rng_state.pth"], cut),
        (["1-*/final/model.safetensors", "1-*/checkpoint-2/scheduler.pt", "1-*/checkpoint-1/model.safetensors"], flip),
    ]
    for patterns, change in damage:
        shutil.rmtree(stopped)
        shutil.copytree(world.folder / "stopped", stopped)
        spoiled = [only(stopped / "checkpoints", pattern) for pattern in patterns]
        for path in spoiled:
            change(path)
        again = world.call("distill", recipe, "--resume")
        assert again.code == 0, again.err
        for path in spoiled:
            assert f"{path.parent.relative_to(world.folder)}" in again.err, (patterns, again.err)
        assert student_of(world, "recipe") == expected, patterns


def test_a_teacher_that_was_exchanged_meanwhile_does_not_go_on_with_the_others_student(world: World):
    world.model()
    recipe = world.recipe(train={"max_steps": 2, "eval_every": 1})

    def fail(*arguments: Any, **more: Any) -> None:
        raise Killed

    with world.monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "score_student", fail)
        world.call("distill", recipe)
    copy_over(world.folder / "teacher" / "model.safetensors")
    again = world.call("distill", recipe, "--resume")
    assert again.code == 0 and "made from other settings or data" in again.err
    assert world.call("distill", recipe, "--set", "name=whole").code == 0
    assert student_of(world, "recipe") == student_of(world, "whole")
