"""Runs on images: what is kept of a teacher, what shapes it, and what is written beside a student."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from image_rows import put_images, put_model
from tiny_recipes import changed, run_recipe, write_recipe

from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.processors import load_image_processor, settings_of

EVERYTHING = {"flip": True, "crop": 2, "rand_augment": {"operations": 1}, "mixup": 0.3}


def planned(path: Path) -> Any:
    return prepare(load_recipe(path), path)


def logits(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "logits").glob("*"))


def test_the_teachers_logits_are_kept_unless_images_change(tmp_path: Path, own_cache: Path):
    recipe = put_images(tmp_path, image_mean=[0.4, 0.5, 0.6])
    path = write_recipe(tmp_path / "recipe.toml", changed(recipe, task=EVERYTHING))
    assert any("flip, crop, rand_augment and mixup change" in note for note in planned(path).notes)
    run_recipe(path, "name=changed")
    # Those that its score is of.
    [scored] = logits(own_cache)
    path = write_recipe(tmp_path / "recipe.toml", recipe)
    assert not any("change" in note for note in planned(path).notes)
    document = run_recipe(path, "name=plain")
    kept = logits(own_cache)
    assert len(kept) == 2 and scored in kept
    # Kept pixels are the same inputs, and another scale makes others.
    other = run_recipe(path, "name=kept", "task.cache_pixels=true")
    assert logits(own_cache) == kept
    assert [stage["history"] for stage in other["training"]] == [stage["history"] for stage in document["training"]]
    student = tmp_path / "runs" / "plain" / "student"
    own, theirs = (settings_of(load_image_processor(folder)) for folder in (student, tmp_path / "teacher"))
    assert own == theirs and own["image_mean"] == [0.4, 0.5, 0.6]
    settings = json.loads((tmp_path / "teacher" / "preprocessor_config.json").read_text())
    (tmp_path / "teacher" / "preprocessor_config.json").write_text(json.dumps({**settings, "image_std": [1, 1, 1]}))
    run_recipe(path, "name=other")
    assert len(logits(own_cache)) == 4


def test_states_of_changing_images_are_refused(tmp_path: Path):
    recipe = put_images(tmp_path)
    path = write_recipe(tmp_path / "recipe.toml", changed(recipe, task={"flip": True}, teacher={"cache": "all"}))
    with pytest.raises(InputError, match="drawn again in every epoch") as caught:
        planned(path)
    assert caught.value.where == "teacher.cache"


@pytest.mark.slow
def test_augmentation_is_a_part_of_what_shapes_a_teacher(tmp_path: Path, own_cache: Path):
    recipe = changed(put_images(tmp_path), teacher={"finetune": {"max_steps": 1, "batch_size": 8}})
    for number, fields in enumerate(({}, {"flip": True}, {"flip": True, "cache_pixels": True}, {"mixup": 0.2})):
        path = write_recipe(tmp_path / "recipe.toml", changed(recipe, task=fields))
        run_recipe(path, f"name=run{number}")
    assert len(list((own_cache / "teachers").iterdir())) == 3


def test_a_student_that_was_made_for_other_pixels(tmp_path: Path):
    recipe = put_images(tmp_path)
    start = changed(recipe, "student", student={"form": "checkpoint", "model": "start"})
    put_model(tmp_path / "start", image_std=[0.2, 0.2, 0.2])
    notes = planned(write_recipe(tmp_path / "recipe.toml", start)).notes
    assert [
        note for note in notes if "image_std is [0.2, 0.2, 0.2], not [0.5, 0.5, 0.5]" in note and "teacher's" in note
    ]
    put_model(tmp_path / "same")
    start = changed(recipe, "student", student={"form": "checkpoint", "model": "same"})
    assert not [note for note in planned(write_recipe(tmp_path / "recipe.toml", start)).notes if "image" in note]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "hs", "minilm", "minilmv2", "makd", "tinybert", "theseus", "lgtm", "adkd"])
def test_every_method_learns_from_changed_and_mixed_images(name: str, tmp_path: Path):
    options = {"minilmv2": {"relation_heads": 4}}.get(name, {})
    tables: dict[str, Any] = {"task": EVERYTHING, "method": {"name": name, **options}, "train": {"workers": 1}}
    recipe = changed(put_images(tmp_path), "student", **tables)
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    history = [entry for stage in document["training"] for entry in stage["history"] if "loss" in entry]
    assert history and all(math.isfinite(value) for entry in history for value in entry.values())


@pytest.mark.slow
def test_a_teacher_of_larger_images_teaches_at_the_size_of_its_processor(tmp_path: Path):
    recipe = put_images(tmp_path)
    for name, size in (("large", 32), ("start", 24)):
        put_model(tmp_path / name, model={"family": "dinov2", "image_size": size})
    tables: dict[str, Any] = {"method": {"name": "hs"}, "teacher": {"model": "large", "cache": "all"}}
    path = write_recipe(tmp_path / "recipe.toml", changed(recipe, **tables))
    assert "teacher: its positions are interpolated from images of 32 x 32 pixels to 16 x 16, as it does itself" in [
        note for note in planned(path).notes if note.startswith("teacher")
    ]
    kept = run_recipe(path, "name=kept")
    asked = run_recipe(path, "name=asked", "teacher.cache=false")
    assert kept["training"][0]["history"] == asked["training"][0]["history"]
    start = {"student": {"form": "checkpoint", "model": "start"}}
    path = write_recipe(tmp_path / "recipe.toml", changed(recipe, "student", **tables, **start))
    notes = planned(path).followers[0].build.notes
    assert any("24 x 24 pixels to 16 x 16" in note for note in notes)
    assert run_recipe(path, "name=checkpoint")["status"] == "done"
