"""Models of images as ONNX graphs: of every family, at every size that they take."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import IMAGES, tiny
from PIL import Image
from rich.console import Console
from scripts import answers_of_script

from kdcli.cli import render
from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.errors import InputError, RunError
from kdcli.export.export import export_model
from kdcli.export.graph import export_onnx, operators
from kdcli.export.session import MODEL, OnnxModel
from kdcli.models.families import FAMILIES
from kdcli.models.overparam import overparameterise
from kdcli.models.shape import both_sides, shape_of, takes_any_size
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tasks import registry
from kdcli.tasks.image_script import lines_for
from kdcli.tasks.predict import predict


def processor(**settings: Any) -> Any:
    """Return an image processor for the tiny models' images."""
    return transformers.ViTImageProcessor(**{"size": {"height": 16, "width": 16}, **settings})


# Each takes seconds.
FAST = ("vit",)
CASES = [
    *(pytest.param(name, {}, marks=() if name in FAST else pytest.mark.slow, id=name) for name in IMAGES),
    pytest.param("beit", {"use_relative_position_bias": True}, marks=pytest.mark.slow, id="beit, relative"),
    pytest.param("beit", {"use_absolute_position_embeddings": True}, marks=pytest.mark.slow, id="beit, absolute"),
    pytest.param("vit", {"image_size": (16, 24)}, marks=pytest.mark.slow, id="vit, not square"),
    pytest.param("vit", {"num_channels": 1}, marks=pytest.mark.slow, id="vit, grey"),
]


@pytest.mark.parametrize(("family", "extra"), CASES)
def test_every_familys_graph_gives_the_models_logits_at_every_size_that_it_takes(
    family: str, extra: dict[str, Any], tmp_path: Path
):
    model = tiny(family, layers=1, labels=3, **extra)
    exported = OnnxModel(export_onnx(model, processor(), tmp_path / "onnx").parent)
    [node] = exported.session.get_inputs()
    own, channels = both_sides(shape_of(model.config).image), shape_of(model.config).channels
    free = takes_any_size(model.config)
    assert node.shape == ["batch", channels, *(["height", "width"] if free else own)]
    for batch in (1, 5):
        assert distance(model, exported, (batch, channels, *own)) < 1e-5
    for sides in ((20, 24), (12, 16), (40, 40), (33, 18)):
        if free:
            told = {"interpolate_pos_encoding": True} if family not in ALWAYS else {}
            assert distance(model, exported, (2, channels, *sides), **told) < 1e-5
        else:
            with pytest.raises(RunError, match="pixel_values"):
                exported(pixel_values=torch.zeros(2, channels, *sides))


ALWAYS = ("dinov2",)
"""They interpolate whether they are told to or not."""


@torch.no_grad()
def distance(model: Any, exported: OnnxModel, shape: tuple[int, ...], **told: Any) -> float:
    """Return the largest difference between the logits of a model and its graph, on random images."""
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    return float((exported(pixel_values=pixels).logits - model(pixel_values=pixels, **told).logits).abs().max())


@pytest.mark.slow
def test_a_dynamic_size_changes_nothing_at_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny("vit")
    free = OnnxModel(export_onnx(model, processor(), tmp_path / "free").parent)
    monkeypatch.setitem(FAMILIES, "vit", replace(FAMILIES["vit"], interpolates=False))
    fixed = OnnxModel(export_onnx(model, processor(), tmp_path / "fixed").parent)
    assert "Resize" in operators(tmp_path / "free" / MODEL) and "Resize" not in operators(tmp_path / "fixed" / MODEL)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(free(pixel_values=images).logits, fixed(pixel_values=images).logits)


@pytest.mark.slow
def test_both_heads_of_a_distilled_deit_are_one_answer(tmp_path: Path):
    model = transformers.DeiTForImageClassificationWithTeacher(tiny("deit").config).eval()
    exported = OnnxModel(export_onnx(model, processor(), tmp_path / "onnx").parent)
    assert exported.outputs == ["logits"] and distance(model, exported, (3, 3, 16, 16)) < 1e-5


@pytest.mark.slow
def test_an_overparameterised_model_exports_as_the_plain_one_and_factors_stay_factors(tmp_path: Path):
    plain, wide = tiny("vit", layers=1), tiny("vit", layers=1)
    overparameterise(wide, OverparamSection(length=2))
    low = build_student(plain, StudentSection(form="low-rank", rank=4), seed=0).model.eval()
    found = {
        name: OnnxModel(export_onnx(model, processor(), tmp_path / name).parent)
        for name, model in {"plain": plain, "wide": wide, "low": low}.items()
    }
    counts = {name: operators(tmp_path / name / MODEL) for name in found}
    assert counts["wide"] == counts["plain"] and distance(plain, found["wide"], (2, 3, 16, 16)) < 1e-4
    assert counts["low"]["MatMul"] > counts["plain"]["MatMul"]
    assert found["low"].megabytes < found["plain"].megabytes
    assert distance(low, found["low"], (2, 3, 16, 16)) < 1e-4


@pytest.mark.slow
def test_an_export_compares_another_size_and_times_images_of_the_sizes_asked_for(tmp_path: Path):
    grid: dict[str, Any] = {"batch_sizes": [1, 2], "image_sizes": [16, 24], "runs": 2}
    result = export_model(tiny("vit"), processor(), tmp_path / "out", task=None, teacher=tiny("beit"), **grid)
    document = json.loads(json.dumps(result.to_json()))
    assert document["parity"]["inputs"] == "random inputs, and random ones of 20 x 24"
    assert document["parity"]["max_abs_difference"] < 1e-4
    cells = {(row["model"], row["backend"], row["batch"], row["image"]) for row in document["latency"]["rows"]}
    assert len(cells) == 16
    console = Console(file=io.StringIO(), width=100)
    console.print(render.exported(result))
    assert "2 x 24" in console.file.getvalue() and "pixels of a side" in console.file.getvalue()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.onnx", "config.json", "preprocessor_config.json", "predict.py"}


def replies(model: Any, processor: Any, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what kdcli answers with a model."""
    kind = registry.get("image-classification")
    images = [{"bytes": None, "path": str(file)} for file in files]
    rows = kind.read_inputs({"image": Column.of(images)}, kind.fields(), "here", [])
    return kind.replies(model, dataset_of(rows), processor, max_length=1, ask=predict)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of several sizes, formats and kinds of pixels."""
    folder, drawn = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = []
    for name, mode, size in (
        ("same.png", "RGB", (16, 16)),
        ("tall.png", "RGB", (31, 90)),
        ("wide.jpg", "RGB", (90, 31)),
        ("grey.png", "L", (20, 24)),
        ("clear.png", "RGBA", (24, 20)),
        ("deep.png", "I;16", (24, 24)),
        ("turned.jpg", "RGB", (40, 20)),
    ):
        top = 2**16 if mode == "I;16" else 256
        shape = (size[1], size[0], len(mode)) if mode in ("RGB", "RGBA") else (size[1], size[0])
        values = drawn.integers(0, top, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
        exif = Image.Exif()
        if name == "turned.jpg":
            exif[0x0112] = 6
        Image.fromarray(values).save(folder / name, exif=exif)
        found.append(folder / name)
    # A palette with shades of transparency, which Pillow warns of.
    Image.open(folder / "wide.jpg").convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    found.append(folder / "palette.png")
    return found


PROCESSORS: dict[str, Any] = {
    "square": ("ViTImageProcessor", {"size": {"height": 16, "width": 16}}),
    "shorter edge": ("CLIPImageProcessor", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}),
    "crop": ("DeiTImageProcessor", {"size": {"height": 18, "width": 21}, "crop_size": {"height": 16, "width": 16}}),
    "padded": ("CLIPImageProcessor", {"size": {"shortest_edge": 11}, "crop_size": {"height": 16, "width": 16}}),
}


def saved(tmp_path: Path, processor: Any) -> tuple[Any, Any]:
    """Return a model of images, and the result of its export."""
    model = tiny("vit", layers=1, labels=3, id2label={0: "cat", 1: "dog", 2: "ship"})
    return model, export_model(model, processor, tmp_path / "out", task=None, latency=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_script_answers_files_as_kdcli_does(name: str, files: list[Path], tmp_path: Path):
    kind, settings = PROCESSORS[name]
    processor = getattr(transformers, kind)(**settings)
    model, result = saved(tmp_path, processor)
    assert result.script == "predict.py" and not result.notes
    found = answers_of_script(tmp_path / "out", [str(file) for file in files])
    expected = replies(model, processor, files)
    assert [reply["label"] for reply in found] == [reply["label"] for reply in expected]
    # A few pixels differ by one of 256 levels; where nothing is resized none does.
    far = [abs(one["probability"] - other["probability"]) for one, other in zip(found, expected, strict=True)]
    assert max(far) < 0.02 and (name != "square" or far[0] < 1e-5)


def lines_of(processor: Any) -> str:
    """Return the lines that make pixels as an image processor does."""
    kind = registry.get("image-classification")
    collator = kind.collator(processor)

    def make(files: list[bytes]) -> np.ndarray:
        rows = [{"index": 0, "image": {"bytes": file, "path": None}} for file in files]
        return collator(rows)["pixel_values"].numpy()

    return lines_for(processor, len(processor.image_mean), make)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        # Bicubic and Lanczos overshoot, and are cut off between both sides: the order of these counts.
        ("DeiTImageProcessor", {"resample": 3}),
        ("DeiTImageProcessor", {"resample": 1}),
        ("ViTImageProcessor", {"do_resize": False}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("ViTImageProcessor", {"do_rescale": False}),
        ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
        ("ViTImageProcessor", {"image_mean": [0.4], "image_std": [0.3]}),
        ("SiglipImageProcessor", {"size": {"height": 33, "width": 16}}),
    ],
)
def test_lines_make_the_pixels_of_a_processor(kind: str, settings: dict[str, Any]):
    assert "def pixels(" in lines_of(getattr(transformers, kind)(**settings))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("ViTImageProcessor", {"resample": 0}, "of 255 levels from Pillow's"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}, "it makes 224 x 224 pixels of"),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 8, "longest_edge": 9}}, "by longest_edge and shortest_edge"),
        ("ViTImageProcessor", {"do_pad": True, "pad_size": {"height": 300, "width": 300}}, "it pads images"),
    ],
)
def test_what_lines_cannot_follow_is_told_with_the_reason(kind: str, settings: dict[str, Any], reason: str):
    with pytest.raises(InputError, match=reason):
        lines_of(getattr(transformers, kind)(**settings))


@pytest.mark.slow
def test_a_folder_without_a_script_says_why(tmp_path: Path):
    _, result = saved(tmp_path, processor(do_pad=True, pad_size={"height": 16, "width": 16}))
    assert result.script is None and not (tmp_path / "out" / "predict.py").exists()
    [note] = result.notes
    assert "no predict.py is written" in note and "it pads images" in note
