"""The halves of CLIP and SigLIP that read images: taken out of whole models, and classifiers on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from outer_models import SIDE, whole
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from kdcli.errors import InputError
from kdcli.models.blocks import blocks_of
from kdcli.models.heads import BASE, IMAGE_CLASSIFICATION
from kdcli.models.load import has_head, load_config, load_model
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.processors import hash_of_processor, load_processor
from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection

NAMES = {0: "red", 1: "green", 2: "blue"}
SETTINGS = {"num_labels": 3, "id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
FAMILIES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(pixel_values=pixels()).logits


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = whole(request.param, FAMILIES[request.param])
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def classifier(folder: Path) -> PreTrainedModel:
    torch.manual_seed(3)
    return load_model(folder, IMAGE_CLASSIFICATION, new_head=SETTINGS)


def test_of_a_whole_model_the_half_that_reads_images_is_taken(folder: Path):
    assert not has_head(folder, IMAGE_CLASSIFICATION)
    body = load_model(folder, BASE)
    given = AutoModel.from_pretrained(folder).eval().vision_model
    with torch.no_grad():
        assert torch.equal(body(pixel_values=pixels())[0], given(pixel_values=pixels())[0])
    assert not [name for name in body.state_dict() if "text" in name or "head." in name]


def test_a_folder_of_the_half_alone_is_the_same(folder: Path, tmp_path: Path):
    AutoModel.from_pretrained(folder).vision_model.save_pretrained(tmp_path / "half")
    one, other = (load_model(name, BASE).state_dict() for name in (folder, tmp_path / "half"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert load_config(folder).hidden_size == load_config(tmp_path / "half").hidden_size == 32


def test_its_projection_into_the_space_of_texts_is_left_out(tmp_path: Path):
    config = whole("clip", "clip_vision_model").config.vision_config
    model = CLIPVisionModelWithProjection(config)
    model.save_pretrained(tmp_path)
    assert not has_head(tmp_path, IMAGE_CLASSIFICATION)
    body = load_model(tmp_path, BASE)
    assert all(torch.equal(one, model.vision_model.state_dict()[name]) for name, one in body.state_dict().items())


def test_a_classifier_on_it_is_read_by_the_library_alone(classifier: PreTrainedModel, tmp_path: Path):
    save_model(classifier, tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(plain).__module__.startswith("transformers.") and type(plain) is not type(classifier)
    torch.testing.assert_close(logits(plain), logits(classifier))
    assert plain.config.id2label == NAMES
    again = load_model(tmp_path, IMAGE_CLASSIFICATION)
    assert torch.equal(logits(again), logits(classifier))
    assert again.config.id2label == NAMES


@pytest.mark.parametrize(
    "form", [{"form": "depth", "layers": 1}, {"form": "width", "hidden_size": 16}, {"form": "low-rank", "rank": 6}]
)
def test_students_of_it_are_written_and_read_again(classifier: PreTrainedModel, form: dict[str, Any], tmp_path: Path):
    section = StudentSection(**form, **({"init": "svd"} if form["form"] == "low-rank" else {}))
    student = build_student(classifier, section, seed=0).model
    save_model(student, tmp_path)
    assert torch.equal(logits(load_model(tmp_path, IMAGE_CLASSIFICATION)), logits(student))
    if form["form"] != "low-rank":
        torch.testing.assert_close(logits(AutoModelForImageClassification.from_pretrained(tmp_path)), logits(student))
    body = load_model(tmp_path, BASE)
    assert len(blocks_of(body)) == form.get("layers", 2)


def test_chains_in_its_place_are_the_same_function_written_read_and_contracted(
    classifier: PreTrainedModel, tmp_path: Path
):
    before = logits(classifier)
    overparameterise(classifier, OverparamSection(length=1))
    torch.testing.assert_close(logits(classifier), before, atol=1e-5, rtol=1e-5)
    save_model(classifier, tmp_path)
    again = load_model(tmp_path, IMAGE_CLASSIFICATION)
    assert torch.equal(logits(again), logits(classifier))
    contract_model(again)
    torch.testing.assert_close(logits(again), before, atol=1e-5, rtol=1e-5)


def test_its_image_processor_is_found_beside_a_tokenizer(folder: Path):
    own = CLIPImageProcessor(crop_size={"height": SIDE, "width": SIDE})
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": own.to_dict()}))
    assert hash_of_processor(load_processor(folder)) == hash_of_processor(own)


def test_a_whole_model_without_the_half_is_refused(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no vision_config"):
        load_config(folder)
