"""Teachers that learn on features of a body that stays as it is, and runs with models whose outputs alone are seen."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from image_rows import pictures, rows_of
from outer_models import OUTER, processor, whole
from tiny_recipes import changed, run_recipe, write_recipe
from transformers import AutoModelForImageClassification, PreTrainedModel

from kdcli.models.heads import BASE, IMAGE_CLASSIFICATION
from kdcli.models.load import load_model
from kdcli.models.save import save_model

RECIPE: dict[str, Any] = {
    "method": {"name": "kd"},
    "task": {
        "name": "pictures",
        "type": "image-classification",
        "train": "train.parquet",
        "validation": "test.parquet",
    },
    "teacher": {"model": "teacher", "finetune": {"max_steps": 2, "batch_size": 6, "head_only": True}},
    "student": {"form": "checkpoint", "model": "student"},
    "train": {"max_steps": 1, "batch_size": 6, "precision": "fp32", "device": "cpu"},
}
NAMES = {0: "0", 1: "1", 2: "2"}
NO_BLOCKS = {"matrix": 0, "layer": 0}


def folder_of(path: Path, teacher: PreTrainedModel, student: PreTrainedModel, /, **changes: Any) -> Path:
    """Put two models, rows of three classes and a recipe there, and return the recipe's path."""
    for name, model in (("teacher", teacher), ("student", student)):
        (path / name).mkdir()
        if hasattr(model, "text_model"):
            model.save_pretrained(path / name)
            processor().save_pretrained(path / name)
        else:
            save_model(model.eval(), path / name, processor())
    for name, seed in (("train", 0), ("test", 1)):
        pq.write_table(rows_of(pictures(18, seed=seed)).data.table, path / f"{name}.parquet")
    return write_recipe(path / "recipe.toml", changed(RECIPE, **changes))


def kept_teacher(own_cache: Path) -> PreTrainedModel:
    (folder,) = (own_cache / "teachers").iterdir()
    return load_model(folder, IMAGE_CLASSIFICATION)


@pytest.mark.slow
def test_a_probe_on_clips_features_changes_nothing_but_the_head(tmp_path: Path, own_cache: Path):
    # The student is another family's, and learns from what the features tell.
    run = run_recipe(folder_of(tmp_path, whole("clip", "clip_vision_model"), OUTER["swin"]()))
    before = load_model(tmp_path / "teacher", BASE).state_dict()
    after = kept_teacher(own_cache).state_dict()
    assert {name.removeprefix("vision_model.") for name in after} == {*before, "classifier.weight", "classifier.bias"}
    assert all(torch.equal(after[f"vision_model.{name}"], one) for name, one in before.items())
    assert after["classifier.bias"].any()
    assert run["student"]["parameters"] == sum(p.numel() for p in OUTER["swin"]().parameters())


def test_a_probe_leaves_running_means_of_the_body_as_they_are(tmp_path: Path, own_cache: Path):
    # Its layers of a batch's mean and deviation would follow the batches, were the body in training mode.
    run_recipe(folder_of(tmp_path, OUTER["tiny-vit"](), OUTER["tiny-vit"]()))
    before, after = load_model(tmp_path / "teacher", IMAGE_CLASSIFICATION).state_dict(), kept_teacher(own_cache)
    changed = {name for name, one in after.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {"timm_model.head.fc.weight", "timm_model.head.fc.bias"}


@pytest.mark.slow
@pytest.mark.parametrize("factorization", ["mpo", "svd"])
def test_a_student_of_timm_with_chains_is_a_plain_model_in_the_end(factorization: str, tmp_path: Path, own_cache: Path):
    chains = {"length": 1, "aux_weight": 0.0} if factorization == "mpo" else {"aux_weight": 0.0}
    overparam = {**chains, "factorization": factorization}
    path = folder_of(
        tmp_path,
        whole("siglip", "siglip_vision_model"),
        OUTER["tiny-vit"](),
        teacher={"finetune": {"max_steps": 1, "batch_size": 6}},
        student={"init": "random"},
        overparam=overparam,
    )
    run_recipe(path)
    (student,) = (tmp_path / "runs").rglob("student")
    plain = AutoModelForImageClassification.from_pretrained(student)
    assert plain.state_dict().keys() == OUTER["tiny-vit"]().state_dict().keys()
    assert all(one.isfinite().all() for one in plain.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"name": "kd"}, {"name": "lgtm"}, {"name": "makd", "weights": NO_BLOCKS}])
def test_methods_that_compare_predictions_run_on_outputs_alone(options: dict[str, Any], tmp_path: Path):
    models = OUTER["swin"](), OUTER["vit"]()
    path = folder_of(tmp_path, *models, method=options, teacher={"finetune": None})
    for name in ("teacher", "student"):
        model = load_model(tmp_path / name, IMAGE_CLASSIFICATION)
        model.config.id2label, model.config.label2id = NAMES, {name: number for number, name in NAMES.items()}
        save_model(model, tmp_path / name, processor())
    before = load_model(tmp_path / "student", IMAGE_CLASSIFICATION).state_dict()
    run_recipe(path)
    (student,) = (tmp_path / "runs").rglob("student")
    after = load_model(student, IMAGE_CLASSIFICATION).state_dict()
    assert after.keys() == before.keys() and not torch.equal(
        after["timm_model.blocks.0.mlp.fc1.weight"], before["timm_model.blocks.0.mlp.fc1.weight"]
    )
