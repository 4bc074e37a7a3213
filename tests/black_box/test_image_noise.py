"""Noised copies of images, and what black boxes are asked with them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image
from scipy.stats import norm
from transformers import ViTImageProcessor

from kdcli.black_box.answers import ask, recorded
from kdcli.black_box.ask import Command, LocalModel, PythonCallable
from kdcli.black_box.estimate import logits_from_decisions
from kdcli.black_box.image_noise import ImageNoise
from kdcli.data.tables import dataset_of
from kdcli.errors import InputError
from kdcli.tasks import registry
from kdcli.tasks.base import Task

KIND = registry.get("image-classification")
NAMES = ("dark", "bright")
SIZE = (8, 8)


def file_of(pixels: np.ndarray, form: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def grey(value: int, shape: tuple[int, ...] = (*SIZE, 3)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


def pixels_of(cell: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])))


def cell(pixels: np.ndarray) -> dict[str, Any]:
    return {"bytes": file_of(pixels), "path": None}


def task_of(cells: list[dict[str, Any]]) -> Task:
    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})
    rows = dataset_of(pa.table({"image": pa.array(cells, kind), "label": [i % 2 for i in range(len(cells))]}))
    return Task("greys", KIND, None, NAMES, ("accuracy",), rows, rows, {"test": rows})


class Brightness:
    """A linear classifier of pixels: bright where their mean is above a threshold. Its distances are known."""

    def __init__(self, threshold: float = 127.5, patience: int = 10**9) -> None:
        self.threshold = threshold
        self.patience = patience
        self.identity = {"threshold": threshold}
        self.asked = 0

    def decide(self, questions: Any) -> list[int]:
        images = [pixels_of(one) for one in questions["image"]]
        if self.asked + len(images) > self.patience:
            raise KeyboardInterrupt
        self.asked += len(images)
        return [int(image.mean() > self.threshold) for image in images]


def counts_of(box: Any, rows: Dataset, noise: ImageNoise, **extra: Any) -> np.ndarray:
    options = {"columns": ["image"], "copies": 4, "names": NAMES, "noise_identity": noise.identity, **extra}
    return ask(box, rows, noise, **options)


# --- copies ---------------------------------------------------------------------------------------------------------


def test_noise_has_the_strength_that_is_asked_for_and_the_first_copy_none():
    noise = ImageNoise(0.1, 0, (64, 64))
    image = grey(127, (64, 64, 3))
    first, *others = (pixels_of(one) for one in noise.copies(cell(image), 7, range(20), "image"))
    assert (first == image).all()
    drawn = np.stack(others).astype(float) - 127
    assert drawn.std() == pytest.approx(25.5, rel=0.01) and abs(drawn.mean()) < 0.1
    assert np.corrcoef(drawn.reshape(19, -1))[np.triu_indices(19, 1)].max() < 0.05


def test_a_copy_depends_on_seed_example_and_number_alone():
    noise, image = ImageNoise(0.1, 3, SIZE), cell(grey(90))
    whole = noise.copies(image, 5, range(4), "image")
    assert noise.copies(image, 5, [3], "image") == whole[3:]
    for other in (ImageNoise(0.1, 4, SIZE).copies(image, 5, [1], "image"), noise.copies(image, 6, [1], "image")):
        assert other[0] != whole[1]


def test_pixels_stay_in_their_range():
    noise = ImageNoise(0.5, 0, (32, 32))
    for value in (0, 255):
        [copy] = noise.copies(cell(grey(value, (32, 32, 3))), 0, [1], "image")
        pixels = pixels_of(copy)
        # Half of the noise is cut off at the end of the range, none of it comes out at the other end.
        assert 0.4 < (pixels == value).mean() < 0.6 and abs(int(np.median(pixels)) - value) < 5


@pytest.mark.parametrize(
    ("given", "expected"), [((16, 16), (8, 8)), ((40, 16), (20, 8)), ((6, 30), (6, 30)), ((8, 8), (8, 8))]
)
def test_an_image_is_shrunk_as_far_as_it_covers_what_is_read(given: tuple[int, int], expected: tuple[int, int]):
    copies = ImageNoise(0.1, 0, SIZE).copies(cell(grey(127, (*given, 3))), 0, [0, 1], "image")
    assert [pixels_of(copy).shape for copy in copies] == [(*expected, 3)] * 2


def test_images_of_one_channel_keep_it():
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    noise = ImageNoise.for_processor(processor, 0.1, 0)
    assert (noise.size, noise.mode) == ((8, 8), "L")
    assert [pixels_of(copy).shape for copy in noise.copies(cell(grey(9, SIZE)), 0, [0, 1], "image")] == [SIZE] * 2


# --- estimates ------------------------------------------------------------------------------------------------------


def test_the_distance_to_a_known_boundary_is_estimated():
    """Of 8 x 8 x 3 values with noise s, the mean has noise s / sqrt(192): z_1 - z_0 = sqrt(2) (v - t) sqrt(192) / s."""
    values, ratio, copies = [126, 127, 128, 129], 0.1, 2000
    task = task_of([cell(grey(value)) for value in values])
    counts = counts_of(Brightness(), task.train, ImageNoise(ratio, 0, SIZE), copies=copies, use_cache=False)
    spread = ratio * 255 / np.sqrt(192)
    share = norm.cdf((np.array(values) - 127.5) / spread)
    error = np.sqrt(share * (1 - share) / copies)
    assert (np.abs(counts[:, 1] / copies - share) < 4 * error).all()
    z = logits_from_decisions(counts)
    expected = np.sqrt(2.0) * (np.array(values) - 127.5) / spread
    # The error of the share, by the slope of the inverse of the normal distribution.
    slope = np.sqrt(2.0) / norm.pdf(expected / np.sqrt(2.0))
    assert (np.abs(z[:, 1] - z[:, 0] - expected) < 4 * error * slope + 2e-3).all()


def test_more_noise_reaches_a_boundary_that_is_farther_away():
    task = task_of([cell(grey(140))])
    shares = [
        counts_of(Brightness(), task.train, ImageNoise(ratio, 0, SIZE), copies=200, use_cache=False)[0, 0]
        for ratio in (0.05, 0.5)
    ]
    assert shares[0] == 0 and shares[1] > 20


# --- asking and remembering -----------------------------------------------------------------------------------------


def test_an_interrupted_questioning_goes_on_and_other_images_or_noise_are_asked_again():
    task, noise = task_of([cell(grey(value)) for value in (100, 127, 128)]), ImageNoise(0.1, 0, SIZE)
    with pytest.raises(KeyboardInterrupt):
        counts_of(Brightness(patience=9), task.train, noise, queries_per_call=4)
    rest = Brightness()
    counts = counts_of(rest, task.train, noise, queries_per_call=4)
    assert rest.asked == 4 and counts.sum(1).tolist() == [4, 4, 4]
    assert counts.tolist() == counts_of(Brightness(), task.train, noise, use_cache=False).tolist()
    others = (
        (task, ImageNoise(0.2, 0, SIZE)),
        (task, ImageNoise(0.1, 1, SIZE)),
        (task, ImageNoise(0.1, 0, (4, 4))),
        (task_of([cell(grey(value)) for value in (100, 127, 129)]), noise),
    )
    for rows, other in others:
        asked = Brightness()
        counts_of(asked, rows.train, other)
        assert asked.asked == 12


def test_a_callable_gets_pillows_images(tmp_path: Path):
    source = "from PIL.Image import Image\n\ndef of(images):\n"
    source += '    assert all(isinstance(i, Image) and i.mode == "RGB" for i in images)\n'
    source += '    return ["bright" if i.getpixel((0, 0))[0] > 99 else "dark" for i in images]\n'
    (tmp_path / "box_of_images.py").write_text(source)
    box = PythonCallable("box_of_images:of", NAMES, tmp_path)
    assert box.decide({"image": [cell(grey(50)), cell(grey(200))]}) == [0, 1]


def test_a_command_gets_png_files_in_base64(tmp_path: Path):
    (tmp_path / "ask.py").write_text(
        "import base64, io, json, sys\nfrom PIL import Image\n"
        "for line in sys.stdin:\n"
        "    [(key, text)] = json.loads(line).items()\n"
        "    image = Image.open(io.BytesIO(base64.b64decode(text)))\n"
        '    assert key == "image" and image.format == "PNG"\n'
        "    print(int(image.getpixel((0, 0))[0] > 99))\n"
    )
    box = Command([sys.executable, "ask.py"], NAMES, tmp_path)
    assert box.decide({"image": [cell(grey(50)), cell(grey(200))]}) == [0, 1]


# --- recorded decisions ---------------------------------------------------------------------------------------------


def test_recorded_decisions_name_images_by_their_files(tmp_path: Path):
    paths = [tmp_path / "photos" / f"{name}.png" for name in ("one", "two")]
    task = task_of([{"bytes": None, "path": str(path)} for path in paths])
    rows = [{"image": "photos/two.png", "label": "dark"}, {"image": str(paths[0]), "counts": [1, 3]}]
    table = [{"image": row["image"], "counts": row.get("counts", [1, 0])} for row in rows]
    file = tmp_path / "decisions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    assert recorded(file, task, "method.black_box.decisions").tolist() == [[1, 3], [1, 0]]
    file.write_text(json.dumps({"index": 1, "label": "dark"}) + "\n" + json.dumps({"index": 0, "label": 1}) + "\n")
    assert recorded(file, task, "method.black_box.decisions").tolist() == [[0, 1], [1, 0]]
    file.write_text(json.dumps({"image": "photos/three.png", "label": "dark"}) + "\n")
    with pytest.raises(InputError, match="no decision on 2 of 2 training examples"):
        recorded(file, task, "method.black_box.decisions")
    file.write_text(json.dumps({"label": "dark"}) + "\n")
    with pytest.raises(InputError, match="does not say which example") as caught:
        recorded(file, task, "method.black_box.decisions")
    assert caught.value.hint == "add the column index, or image"


# --- a model here ---------------------------------------------------------------------------------------------------


def test_a_local_model_reads_copies_by_its_processor():
    import torch
    from families import tiny

    model = tiny("vit", labels=2, seed=1)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(12)]
    box = LocalModel(KIND, model, processor, max_length=128, batch_size=5, device="cpu")
    found = box.decide({"image": [cell(image) for image in images]})
    with torch.no_grad():
        pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        assert found == model(pixels).logits.argmax(-1).tolist()
