"""Wrong input of image classification: exit code 2, one clear message, no traceback, and nothing left behind."""

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from bad_input import Cases
from conftest import World
from PIL import Image

CASES = Cases()
case = CASES.add

TASK = {"name": "own", "type": "image-classification", "text": None, "data": None}


def drawn(form: str = "PNG", *, mode: str = "RGB", size: tuple[int, int] = (20, 16), seed: int = 0) -> bytes:
    """Return the bytes of an image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, form)
    return file.getvalue()


GOOD = drawn()


def distill(world: World, **task: Any) -> list[str]:
    world.model("viewer")
    return ["distill", world.recipe(task={**TASK, **task})]


def table(world: World, *rows: tuple[str, str], **task: Any) -> list[str]:
    """Write a CSV of twenty good files and the given rows, each a path and a label."""
    files = [(f"files/{n}.png", ("no", "yes")[n % 2]) for n in range(20)]
    for n, (name, _) in enumerate(files):
        world.write(name, drawn(seed=n))
    world.csv("rows.csv", [*files, *rows], header="file,label")
    return distill(world, **{"data": "rows.csv", "image": "file", **task})


def parquet(world: World, images: Any, classes: Any = None, **task: Any) -> list[str]:
    """Write a Parquet file of images and labels."""
    columns = {"image": images, "label": classes or [("no", "yes")[n % 2] for n in range(len(images))]}
    pa.parquet.write_table(pa.table(columns), world.folder / "rows.parquet")
    return distill(world, **{"data": "rows.parquet", **task})


def folder(world: World, *classes: str, root: str = "photos", count: int = 3) -> Path:
    """Write a folder with images of each class."""
    for number, name in enumerate(classes):
        for n in range(count):
            world.write(f"{root}/{name}/{n}.png", drawn(seed=100 * number + n))
    return world.folder / root


@case("task.image", "row 21: ", "files/lost.png does not exist", "start at the folder of their table")
def a_file_that_is_missing(world: World) -> list[str]:
    return table(world, ("files/lost.png", "no"))


@case("row 22: ", "does not exist; 2 images cannot be used")
def several_files_that_are_missing(world: World) -> list[str]:
    return table(world, ("files/0.png", "no"), ("files/lost.png", "no"), ("files/gone.png", "yes"))


@case("row 21: ", "does not exist", "its paths need / in place of \\")
def paths_of_another_system(world: World) -> list[str]:
    return table(world, ("files\\0.png", "no"))


@case("row 21: ", "files/empty.png is empty", "remove it")
def a_file_without_bytes(world: World) -> list[str]:
    world.write("files/empty.png", b"")
    return table(world, ("files/empty.png", "no"))


@case("row 21: ", "files is a folder, not an image")
def a_path_of_a_folder(world: World) -> list[str]:
    return table(world, ("files", "no"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_told_and_not_waited_for(world: World):
    os.mkfifo(world.folder / "pipe.png")
    outcome = world.call(*table(world, ("pipe.png", "no")))
    assert outcome.code == 2 and "row 21: " in outcome.err and "pipe.png is no regular file" in outcome.err


@case("row 21: ", "files/text.png is no image, or one of a format that is not read", "JPEG, PNG")
def a_file_of_text(world: World) -> list[str]:
    world.write("files/text.png", "a fine and moving film")
    return table(world, ("files/text.png", "no"))


@case("files/page.jpg is a web page, not an image", "download the image again")
def a_web_page_in_place_of_an_image(world: World) -> list[str]:
    world.write("files/page.jpg", "<!DOCTYPE html><html><body>404</body></html>")
    return table(world, ("files/page.jpg", "no"))


@case("files/big.jpg is a pointer of Git LFS", "git lfs pull")
def a_pointer_of_git_lfs(world: World) -> list[str]:
    world.write("files/big.jpg", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    return table(world, ("files/big.jpg", "no"))


@case("files/cut.png is truncated", "write or download it again")
def a_truncated_png(world: World) -> list[str]:
    world.write("files/cut.png", GOOD[:-100])
    return table(world, ("files/cut.png", "no"))


@case("row 3 is truncated", "write or download it again")
def a_truncated_jpeg_in_parquet(world: World) -> list[str]:
    return parquet(world, [GOOD, GOOD, drawn("JPEG", size=(64, 64))[:-400], GOOD])


def of_size(width: int, height: int) -> bytes:
    """Return a PNG that says it has this size."""
    header = b"IHDR" + struct.pack(">II", width, height) + GOOD[24:29]
    return GOOD[:12] + header + struct.pack(">I", zlib.crc32(header)) + GOOD[33:]


@case("row 2 has more than 178,956,970 pixels", "89,478,485 are the most", "scale it down")
def an_image_that_unpacks_to_gigabytes(world: World) -> list[str]:
    return parquet(world, [GOOD, of_size(30_000, 30_000), GOOD, GOOD])


@case("row 2 has 100,000,000 pixels; 89,478,485 are the most")
def an_image_that_is_too_large(world: World) -> list[str]:
    return parquet(world, [GOOD, of_size(10_000, 10_000), GOOD, GOOD])


@case("row 4 has pixels of 32 bits (F)", "scale them to 8 bits")
def pixels_without_limits(world: World) -> list[str]:
    return parquet(world, [GOOD, GOOD, GOOD, drawn("TIFF", mode="F")])


@case("row 2 is no image, or one of a format that is not read")
def more_channels_than_an_image_has(world: World) -> list[str]:
    # A TIFF that says it has nine samples a pixel.
    data = drawn("TIFF")
    place = data.index(b"\x15\x01\x03\x00\x01\x00\x00\x00")
    return parquet(world, [GOOD, data[: place + 8] + b"\x09" + data[place + 9 :], GOOD, GOOD])


@case("row 21: https://example.org/cat.jpg is an address", "downloads no images", "download them first")
def an_address_on_the_web(world: World) -> list[str]:
    return table(world, ("https://example.org/cat.jpg", "no"))


@case("row 1: data:image/png;base64", "is data inside a text")
def data_of_a_page(world: World) -> list[str]:
    rows = [{"image": "data:image/png;base64,iVBORw0KGgo=", "label": label} for label in ("no", "yes")]
    world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return distill(world, data="rows.jsonl")


@case("row 2 has no image", "remove the row, or add its image")
def a_row_without_an_image(world: World) -> list[str]:
    return parquet(world, [GOOD, None, GOOD, GOOD])


@case("row 3: x.png has an image of 0 bytes", "write its image again")
def bytes_that_are_none(world: World) -> list[str]:
    return parquet(world, [{"bytes": one, "path": "x.png"} for one in (GOOD, GOOD, b"", GOOD)])


@case("task.image: ", "'image' of row 1 is an array, not an image", "as PNG or JPEG")
def arrays_of_pixels(world: World) -> list[str]:
    return parquet(world, [[[0, 0, 0]]] * 4)


@case("'image' of row 1 is the number 7, not an image")
def numbers_in_place_of_images(world: World) -> list[str]:
    return parquet(world, [7, 8, 9, 10])


@case("no image column 'image'; it has 'picture', 'label'", 'name it: task.image = "COLUMN"')
def a_column_that_is_not_named(world: World) -> list[str]:
    world.write("rows.jsonl", json.dumps({"picture": "a.png", "label": "no"}))
    return distill(world, data="rows.jsonl")


@case("task.image", "no image column 'img'; it has 'image', 'label'")
def a_column_of_another_name(world: World) -> list[str]:
    return parquet(world, [GOOD] * 4, image="img")


@case("row 1: ", "a fine and moving film does not exist", "image = names their column")
def a_column_of_texts(world: World) -> list[str]:
    world.csv("rows.csv", [("a fine and moving film", "yes"), ("a dull film", "no")])
    return distill(world, data="rows.csv", image="text")


@case("'text' of row 1 is bytes, not a text", 'images have type = "image-classification"')
def images_for_a_classifier_of_texts(world: World) -> list[str]:
    world.model()
    pa.parquet.write_table(pa.table({"text": [GOOD] * 4, "label": ["no", "yes"] * 2}), world.folder / "rows.parquet")
    return ["distill", world.recipe(task={"data": "rows.parquet"})]


@case("has one class only ('yes'): there is nothing to learn")
def images_of_one_class(world: World) -> list[str]:
    return parquet(world, [GOOD] * 4, ["yes"] * 4)


@case("task.data", "photos has one folder of a class (all)", 'task.data = "photos/all"')
def a_folder_that_is_one_level_too_high(world: World) -> list[str]:
    folder(world, "all/yes", "all/no")
    return distill(world, data="photos")


@case("photos/yes/lost.png is a link to a file that does not exist", "hint: remove it")
def a_broken_link_in_a_folder_of_a_class(world: World) -> list[str]:
    (folder(world, "yes", "no") / "yes" / "lost.png").symlink_to("nowhere.png")
    return distill(world, data="photos")


@case("photos has one class only ('yes')")
def a_folder_of_one_class(world: World) -> list[str]:
    folder(world, "yes")
    return distill(world, data="photos")


@case("task.data: ", "photos has no images in folders of classes", "FOLDER/CLASS/image.jpg")
def a_folder_without_images(world: World) -> list[str]:
    world.write("photos/yes/readme.txt", "none yet")
    return distill(world, data="photos")


@case("has 3 images in no folder of a class (first: 0.png)", 'task.data = ".../metadata.csv"')
def a_folder_of_images_beside_their_table(world: World) -> list[str]:
    folder(world, "")
    world.write("photos/metadata.csv", "file_name,label\n0.png,no\n1.png,yes\n2.png,no\n")
    return distill(world, data="photos")


@case("photos/yes/1.png is truncated", "write or download it again")
def a_damaged_image_in_a_folder(world: World) -> list[str]:
    path = folder(world, "no", "yes") / "yes" / "1.png"
    data = path.read_bytes()
    path.write_bytes(data[:40] + b"IDAT" * 20 + data[120:-20])
    return distill(world, data="photos")


@case("the validation images have 1 class that the training images do not have (first: maybe)", "the same names")
def class_folders_that_differ(world: World) -> list[str]:
    folder(world, "no", "yes", root="photos/train")
    folder(world, "no", "maybe", root="photos/val")
    return distill(world, data="photos")


@case("task.validation", "1 class that the training images do not have (first: maybe)")
def class_folders_of_two_fields_that_differ(world: World) -> list[str]:
    folder(world, "no", "yes", root="a")
    folder(world, "no", "maybe", root="b")
    return distill(world, train="a", validation="b")


@case("folders of splits (train, test) and others (cats)", "task.train")
def splits_and_classes_in_one_folder(world: World) -> list[str]:
    folder(world, "train", "test", "cats")
    return distill(world, data="photos")


@case("photos has dev and val for one split")
def two_folders_for_one_split(world: World) -> list[str]:
    for split in ("train", "val", "dev"):
        folder(world, "no", "yes", root=f"photos/{split}")
    return distill(world, data="photos")


@case("photos has no folder of training images; it has test, val")
def splits_without_training_images(world: World) -> list[str]:
    for split in ("val", "test"):
        folder(world, "no", "yes", root=f"photos/{split}")
    return distill(world, data="photos")


@case("cat.png is one image", "a folder for each class")
def one_image_in_place_of_a_folder(world: World) -> list[str]:
    world.write("cat.png", GOOD)
    return distill(world, data="cat.png")


@case("no file at", "photoz", "relative paths start at the recipe's folder")
def a_folder_that_is_not_there(world: World) -> list[str]:
    return distill(world, data="photoz.csv")


@case("row 3", "has the label 'maybe', which is not in task.labels (no, yes)")
def a_label_that_is_not_named(world: World) -> list[str]:
    return parquet(world, [GOOD] * 4, ["no", "yes", "maybe", "no"], labels=["no", "yes"])


@case("are not the task's labels (cat, dog)", "teacher.labels")
def classes_that_the_teacher_does_not_have(world: World) -> list[str]:
    folder(world, "cat", "dog", count=20)
    return distill(world, data="photos")


@case("1 row without a label, the first is row 4", "remove or label them")
def an_image_without_a_label(world: World) -> list[str]:
    return parquet(world, [GOOD] * 4, ["no", "yes", "no", None])


@case("labels = ... needs data, train or hub")
def labels_for_a_set_that_has_them(world: World) -> list[str]:
    return ["distill", world.recipe("teacher", task={**TASK, "name": "shapes", "labels": ["a", "b"]}, teacher={})]


@case("shapes is an image-classification task, not a classification task")
def shapes_as_texts(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(task={**TASK, "name": "shapes", "type": "classification"})]


@case("own data needs text", "or type = ...")
def a_folder_without_a_type(world: World) -> list[str]:
    folder(world, "no", "yes")
    world.model("viewer")
    return ["distill", world.recipe(task={"name": "own", "data": "photos", "text": None})]


@case("--data", "photos has folders of splits: train, test", "photos/test")
def a_folder_of_splits_to_be_scored(world: World) -> list[str]:
    for split in ("train", "test"):
        folder(world, "no", "yes", root=f"photos/{split}")
    return ["eval", str(world.model("viewer")), "--data", "photos"]


@case("--set image", "no image column 'img'; it has 'image', 'label'")
def a_column_to_be_scored_that_is_missing(world: World) -> list[str]:
    parquet(world, [GOOD] * 4)
    return ["eval", "teacher", "--data", "rows.parquet", "--set", "image=img"]


@case("has the label 'maybe', which the model does not have (no, yes)")
def a_class_to_be_scored_that_the_model_lacks(world: World) -> list[str]:
    folder(world, "no", "maybe")
    return ["eval", str(world.model("viewer")), "--data", "photos"]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
