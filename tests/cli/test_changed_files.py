"""What a finished run keeps, and what is said when that was changed afterwards."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import World

SCORE = ("--data", "rows.csv", "--text", "text")


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def swap_words(path: Path) -> None:
    """Give two words of a tokenizer each other's number: no size and no shape changes."""
    document = json.loads(path.read_text(encoding="utf-8"))
    words = document["model"]["vocab"]
    one, other = list(words)[-6:-4]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def finished(world: World) -> Path:
    world.model()
    outcome = world.call("distill", world.recipe())
    assert outcome.code == 0, outcome.err
    return world.folder / "runs" / "recipe"


def test_a_finished_run_has_no_checkpoints_unless_they_are_asked_for(world: World, finished: Path):
    assert not (finished / "checkpoints").exists() and (finished / "student").is_dir()
    # As a process leaves it that is killed between its last two steps.
    (finished / "checkpoints" / "1-distil" / "checkpoint-1").mkdir(parents=True)
    assert world.call("distill", "recipe.toml", "--resume").code == 0
    assert not (finished / "checkpoints").exists()
    kept = world.call("distill", "recipe.toml", "--set", "train.keep_checkpoints=true", "--set", "name=kept")
    assert kept.code == 0
    assert list((world.folder / "runs" / "kept" / "checkpoints").glob("*/checkpoint-1/optimizer.pt"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(flip, id="one bit"),
        pytest.param(swap_words, id="two words", marks=pytest.mark.slow),
        pytest.param(Path.unlink, id="a file less", marks=pytest.mark.slow),
    ],
)
def test_eval_and_resume_name_a_changed_file_of_a_student(world: World, finished: Path, change: object):
    name = "tokenizer.json" if change is swap_words else "model.safetensors"
    before = world.call("eval", "runs/recipe", *SCORE)
    assert before.code == 0 and "WARNING" not in before.err
    if change is Path.unlink:
        name = "special_tokens_map.json" if (finished / "student/special_tokens_map.json").exists() else "kdcli.json"
    change(finished / "student" / name)  # type: ignore[operator]
    outcome = world.call("eval", "runs/recipe", *SCORE)
    assert outcome.code == 0, outcome.err
    assert "WARNING" in outcome.err and "is not what kdcli wrote there" in outcome.err and name in outcome.err
    resumed = world.call("distill", "recipe.toml", "--resume")
    assert resumed.code == 2 and name in resumed.err and "--force" in resumed.err


def test_a_students_card_may_be_edited(world: World, finished: Path):
    (finished / "student" / "README.md").write_text("# Mine\n")
    outcome = world.call("eval", "runs/recipe", *SCORE)
    assert outcome.code == 0 and "WARNING" not in outcome.err
    assert world.call("distill", "recipe.toml", "--resume").code == 0


def test_a_student_of_another_run_is_not_taken_for_this_ones(world: World, finished: Path):
    assert world.call("distill", "recipe.toml", "--set", "name=other", "--set", "seed=7").code == 0
    shutil.rmtree(finished / "student")
    shutil.copytree(world.folder / "runs" / "other" / "student", finished / "student")
    assert "WARNING" in world.call("eval", "runs/recipe", *SCORE).err


@pytest.mark.slow
def test_a_graph_that_was_changed_is_told_of_until_it_is_made_again(world: World):
    world.model()
    grid = {"runs": 1, "batch_sizes": [1], "sequence_lengths": [8]}
    assert world.call("distill", world.recipe(export={"onnx": True, **grid})).code == 0
    finished = world.folder / "runs" / "recipe"
    graph = finished / "onnx" / "config.json"
    graph.write_text(graph.read_text() + "\n")
    outcome = world.call("eval", "runs/recipe/onnx", *SCORE)
    assert outcome.code == 0 and "WARNING" in outcome.err and "config.json" in outcome.err
    assert world.call("export", "runs/recipe", "--no-latency").code == 0
    assert "WARNING" not in world.call("eval", "runs/recipe/onnx", *SCORE).err


def test_a_record_that_was_changed_is_not_believed(world: World, finished: Path):
    file = finished / "run.json"
    record = json.loads(file.read_text())
    record["student"]["score"] = 0.99
    file.write_text(json.dumps(record))
    for command in (["distill", "recipe.toml", "--resume"], ["eval", "runs/recipe", *SCORE]):
        outcome = world.call(*command)
        assert outcome.code == 2 and "run.json was changed after kdcli wrote it" in outcome.err
    del record["checksum"]
    file.write_text(json.dumps(record))
    assert world.call("distill", "recipe.toml", "--resume").code == 0


@pytest.mark.slow
def test_a_teacher_of_the_cache_that_was_changed_is_told_of(world: World, own_cache: Path):
    teacher = {
        "scratch": {"layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 32, "vocab_size": 150},
        "finetune": {"max_steps": 1},
    }
    assert world.call("distill", world.recipe("teacher", teacher=teacher)).code == 0
    gate = ("eval", "runs/recipe", *SCORE, "--fail-under-retention", "0.01")
    assert "WARNING" not in world.call(*gate).err
    [cached] = (own_cache / "teachers").glob("*/model.safetensors")
    flip(cached)
    assert f"WARNING: {cached.parent}" in world.call(*gate).err
    exported = world.call("export", "runs/recipe", "--runs", "1", "--batch-sizes", "1", "--sequence-lengths", "8")
    assert exported.code == 0 and f"WARNING: {cached.parent}" in exported.err


def test_a_finished_runs_recipe_is_written_again(world: World, finished: Path):
    file = finished / "recipe.toml"
    whole = file.read_bytes()
    flip(file)
    assert world.call("distill", "recipe.toml", "--resume").code == 0
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_a_changed_student_is_told_of_when_it_lies_elsewhere(world: World, finished: Path):
    shutil.move(finished / "student", world.folder / "disk2")
    (finished / "student").symlink_to(world.folder / "disk2")
    before = world.call("eval", "runs/recipe/student", *SCORE)
    assert before.code == 0 and "WARNING" not in before.err
    flip(world.folder / "disk2" / "model.safetensors")
    for model in ("runs/recipe", "runs/recipe/student", "runs/latest/student"):
        assert "WARNING" in world.call("eval", model, *SCORE).err
    outcome = world.call("export", "runs/recipe/student", "--no-latency")
    assert outcome.code == 0 and "WARNING" in outcome.err, outcome.err
    resumed = world.call("distill", "recipe.toml", "--resume")
    assert resumed.code == 2 and "model.safetensors" in resumed.err
