"""Models of which only outputs are seen: what is loaded, written and compared of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outer_models import OUTER, SIDE, processor, timm_model
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from kdcli.cli.app import run
from kdcli.models import families
from kdcli.models.blocks import pairs_of_alike
from kdcli.models.classes import reorder_classes
from kdcli.models.heads import BASE, IMAGE_CLASSIFICATION, Labelling
from kdcli.models.load import load_model
from kdcli.models.overparam import contract_model, linears_of, overparameterise, teacher_factors
from kdcli.models.probe import probe_batch
from kdcli.models.processors import hash_of_processor, load_processor
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tensors.parametrization import tensors_of

NAMES = {0: "red", 1: "green", 2: "blue", 3: "grey", 4: "black"}
SETTINGS = {"num_labels": 5, "id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}


def pixels(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(pixel_values=pixels()).logits


@pytest.fixture(scope="module", params=OUTER)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return OUTER[request.param]().eval()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", processor())
    return tmp_path / "model"


def test_a_model_is_loaded_as_the_library_loads_it(model: PreTrainedModel, folder: Path):
    loaded = load_model(folder, IMAGE_CLASSIFICATION)
    assert [*loaded.state_dict()] == [*model.state_dict()]
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in loaded.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(model))
    torch.testing.assert_close(logits(AutoModelForImageClassification.from_pretrained(folder)), logits(model))


def test_a_new_head_stands_on_the_same_body(model: PreTrainedModel, folder: Path, tmp_path: Path):
    headed = load_model(folder, IMAGE_CLASSIFICATION, new_head=SETTINGS)
    assert logits(headed).shape == (2, 5)
    (tmp_path / "headed").mkdir()
    save_model(headed, tmp_path / "headed", processor())
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "headed")
    assert plain.config.id2label == NAMES
    torch.testing.assert_close(logits(plain), logits(headed))
    bodies = [load_model(name, BASE).eval() for name in (folder, tmp_path / "headed")]
    one, other = (body(pixel_values=pixels())[0] for body in bodies)
    torch.testing.assert_close(one, other)


def test_classes_in_another_order_are_the_same_logits_in_that_order(folder: Path):
    model = load_model(folder, IMAGE_CLASSIFICATION)
    before = logits(model)
    reorder_classes(model, [2, 0, 1])
    torch.testing.assert_close(logits(model), before[:, [2, 0, 1]])


def test_two_heads_whose_mean_alone_is_an_output_are_not_said_to_part(tmp_path: Path):
    (tmp_path / "student").mkdir()
    model = OUTER["two-heads"]()
    save_model(model, tmp_path / "student", processor())
    section = StudentSection(form="checkpoint", model=str(tmp_path / "student"))
    labelling = Labelling(IMAGE_CLASSIFICATION, {}, lambda model, name: [])
    build = build_student(OUTER["vit"](), section, seed=0, labelling=labelling)
    assert not any("two heads" in note for note in build.notes)


def test_a_size_inside_is_told_of_no_such_model(model: PreTrainedModel):
    shape = shape_of(model.config)
    assert shape.channels == 3
    with pytest.raises(Exception, match="only outputs can be compared, because"):
        shape.hidden  # noqa: B018


def of_the_hub(folder: Path, **settings: Any) -> None:
    """Write a model as timm's own files on the hub are: without the library's names."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3, channels=[8, 8, 16, 16], stem_width=8)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "label_names": ["cat", "dog", "cow"],
        "model_args": {"channels": [8, 8, 16, 16], "stem_width": 8},
        "pretrained_cfg": {**model.pretrained_cfg, "input_size": [3, 32, 32], "crop_pct": 0.8, **settings},
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_file_of_timm_itself_is_read_with_its_classes_and_its_images(tmp_path: Path):
    of_the_hub(tmp_path)
    loaded = load_model(tmp_path, IMAGE_CLASSIFICATION)
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    library = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(library))
    assert load_processor(tmp_path).crop_size["height"] == 32


@pytest.mark.parametrize(
    "settings", [{}, {"crop_pct": 1.0, "interpolation": "bilinear"}, {"crop_mode": "squash", "crop_pct": 0.8}]
)
def test_images_become_what_timm_makes_of_them(tmp_path: Path, settings: dict[str, Any]):
    of_the_hub(tmp_path, **settings)
    own, theirs = load_processor(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    drawn = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    for size in ((40, 52), (64, 33), (32, 32)):
        image = Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC)
        one, other = (each(image, return_tensors="pt")["pixel_values"] for each in (own, theirs))
        assert one.shape == other.shape == (1, 3, 32, 32)
        # Pillow and torchvision round differently: by a level or two of 255, a deviation being at least 0.22.
        assert (one - other).abs().max() < 2.5 / 255 / 0.22


def test_what_is_written_beside_a_model_of_timm_is_what_others_read(tmp_path: Path):
    of_the_hub(tmp_path)
    (tmp_path / "student").mkdir()
    save_model(load_model(tmp_path, IMAGE_CLASSIFICATION), tmp_path / "student", processor())
    assert hash_of_processor(load_processor(tmp_path / "student")) == hash_of_processor(processor())
    assert hash_of_processor(AutoImageProcessor.from_pretrained(tmp_path / "student")) == hash_of_processor(processor())


def test_families_say_why_only_outputs_are_seen(capsys: pytest.CaptureFixture[str]):
    assert run(["families", "swin", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["limits"] == ["outputs only"]
    assert (told["blocks"], told["matrices"]) == ("not seen", {})
    assert "because its blocks have other widths" in told["limits_in_full"][0] and "kd" in told["limits_in_full"][0]


def test_a_model_of_timm_that_takes_any_size_says_so():
    assert shape_of(timm_model("resnet10t", channels=[8, 8, 16, 16], stem_width=8).config).any_size
    assert not shape_of(OUTER["vit"]().config).any_size


def test_rows_name_a_reason_and_no_blocks():
    for family in families.FAMILIES.values():
        assert (family.outputs_only is None) == bool(family.blocks) == bool(family.matrices)


def test_a_student_that_takes_any_size_takes_its_teachers_images(tmp_path: Path):
    of_the_hub(tmp_path, input_size=[3, 160, 160])
    assert shape_of(load_model(tmp_path, IMAGE_CLASSIFICATION).config).image == (160, 160)
    names = Labelling(IMAGE_CLASSIFICATION, {}, lambda model, name: [])
    section = StudentSection(form="checkpoint", model=str(tmp_path))
    student = build_student(OUTER["swin"](), section, seed=0, labelling=names).model
    (tmp_path / "student").mkdir()
    save_model(student, tmp_path / "student", processor())
    again = load_model(tmp_path / "student", IMAGE_CLASSIFICATION)
    assert shape_of(again.config).image == (SIDE, SIDE)
    assert probe_batch(again)["pixel_values"].shape[2:] == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["swin", "tiny-vit"])
def test_linear_layers_inside_become_chains_and_plain_again(name: str, tmp_path: Path):
    model = OUTER[name]().eval()
    before, linear = logits(model), [one for one in model.modules() if isinstance(one, nn.Linear)]
    report = overparameterise(model, OverparamSection(length=1))
    # All but the classifier.
    assert len(report.rows) == len(linear) - 1 and not report.skipped
    assert {type(one).__name__ for one in linear} == {"Linear", "ParametrizedLinear"}
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    save_model(model, tmp_path)
    again = load_model(tmp_path, IMAGE_CLASSIFICATION)
    assert torch.equal(logits(again), logits(model)) and again.config.id2label == model.config.id2label
    contract_model(again)
    assert again.state_dict().keys() == OUTER[name]().state_dict().keys()
    torch.testing.assert_close(logits(again), before, atol=1e-5, rtol=1e-4)


def test_chains_of_a_copy_are_compared_with_the_layers_that_they_are_copies_of():
    teacher, student = OUTER["tiny-vit"](), OUTER["tiny-vit"]()
    pairs = pairs_of_alike(student, teacher)
    section = OverparamSection(length=1)
    overparameterise(student, section)
    found, skipped = teacher_factors(teacher, student, pairs, section)
    chains = {key: tensors_of(layer) for key, layer in linears_of(student)}
    assert found.keys() == chains.keys() and not skipped
    assert all(torch.equal(one, two) for key in found for one, two in zip(found[key], chains[key], strict=True))
    assert pairs_of_alike(OUTER["swin"](), teacher) == []


def test_a_student_starts_at_random_as_its_library_starts_it(tmp_path: Path):
    (tmp_path / "student").mkdir()
    trained = OUTER["tiny-vit"]()
    with torch.no_grad():
        trained.timm_model.patch_embed.conv1.bn.running_mean.add_(3.0)
    save_model(trained, tmp_path / "student", processor())
    names = Labelling(IMAGE_CLASSIFICATION, SETTINGS, lambda model, name: [])
    section = StudentSection(form="checkpoint", model=str(tmp_path / "student"), init="random")
    one, other, third = (
        build_student(OUTER["swin"](), section, seed=seed, labelling=names).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    weight = "timm_model.stages.1.blocks.0.mlp.fc1.weight"
    assert not torch.equal(one[weight], third[weight]) and not torch.equal(one[weight], trained.state_dict()[weight])
    assert not one["timm_model.patch_embed.conv1.bn.running_mean"].any()
    assert one["timm_model.head.fc.weight"].shape[0] == 5
    # Convolutions of TinyViT start by fan-in, which the library's own start does not.
    assert one["timm_model.patch_embed.conv1.conv.weight"].std() > 0.05
