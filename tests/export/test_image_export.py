"""Models of images as ONNX graphs: of every family, at every size that they take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import IMAGES, tiny
from PIL import Image
from scripts import answers_of_script

from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.export.export import export_model
from kdcli.export.graph import export_onnx, operators
from kdcli.export.session import MODEL, OnnxModel
from kdcli.models.families import FAMILIES
from kdcli.models.overparam import overparameterise
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tasks import registry
from kdcli.tasks.predict import predict


def processor(**settings: object) -> object:
    """Return an image processor for the tiny models' images."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(**{"size": {"height": 16, "width": 16}, **settings})


def pixels(batch: int, *sides: int) -> torch.Tensor:
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("family", IMAGES)
def test_every_familys_graph_gives_the_models_logits_at_every_size_that_it_takes(family: str, tmp_path: Path):
    model = tiny(family, layers=1, labels=3)
    exported = OnnxModel(export_onnx(model, processor(), tmp_path / "onnx").parent)
    [node] = exported.session.get_inputs()
    free = FAMILIES[family].interpolates
    assert node.shape == ["batch", 3, *(["height", "width"] if free else [16, 16])]
    for batch in (1, 5):
        values = pixels(batch, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(
                exported(pixel_values=values).logits, model(pixel_values=values).logits, atol=1e-5, rtol=0
            )


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
    for number, (name, mode, size) in enumerate(
        [
            ("same.png", "RGB", (16, 16)),
            ("tall.png", "RGB", (31, 90)),
            ("wide.jpg", "RGB", (90, 31)),
            ("grey.png", "L", (20, 24)),
            ("clear.png", "RGBA", (24, 20)),
            ("deep.png", "I;16", (24, 24)),
            ("turned.jpg", "RGB", (40, 20)),
        ]
    ):
        top = 2**16 if mode == "I;16" else 256
        shape = (size[1], size[0], len(mode)) if mode in ("RGB", "RGBA") else (size[1], size[0])
        values = drawn.integers(0, top, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
        exif = Image.Exif()
        if name == "turned.jpg":
            exif[0x0112] = 6
        Image.fromarray(values).save(folder / name, exif=exif)
        found.append(folder / name)
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


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_script_answers_files_as_kdcli_does(name: str, files: list[Path], tmp_path: Path):
    import transformers

    kind, settings = PROCESSORS[name]
    processor = getattr(transformers, kind)(**settings)
    model, result = saved(tmp_path, processor)
    assert result.script == "predict.py" and not result.notes
    found = answers_of_script(tmp_path / "out", [str(file) for file in files])
    expected = replies(model, processor, files)
    print([abs(a["probability"] - b["probability"]) for a, b in zip(found, expected)])
    assert [reply["label"] for reply in found] == [reply["label"] for reply in expected]
