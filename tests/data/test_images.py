"""Where images come from: folders, tables of paths, encoded bytes; what is read is what was written."""

import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from image_rows import encoded, pictures
from PIL import Image, ImageOps

from kdcli.data.columns import Column
from kdcli.data.images import decoded, read_images
from kdcli.data.shapes import LABELS, OUTLINES, SHAPES, SIZES, shapes
from kdcli.errors import InputError
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task

PICTURES = pictures(12)
CLASSES = ("cat", "dog", "emu")


def task_of(base: Path, **fields: Any) -> Task:
    section = TaskSection(name="own", type="image-classification", **{"validation_fraction": 0.25, **fields})
    return load_task(section, EvaluateSection(), base=base)


def folder_of(path: Path, splits: tuple[str, ...] = ("",)) -> Path:
    """Write four pictures of each class, other ones in each split."""
    for shift, split in enumerate(splits):
        for number, image in enumerate(PICTURES):
            name = path / split / CLASSES[number % 3] / f"{number}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            image.rotate(90 * shift).save(name)
    return path


def held(rows: Dataset) -> dict[bytes, int]:
    """Return the class of each image by its pixels."""
    return {decoded(row["image"]).tobytes(): row["label"] for row in rows}


WANTED = {image.tobytes(): number % 3 for number, image in enumerate(PICTURES)}


def written(form: str, base: Path) -> dict[str, Any]:
    """Write the pictures in one of the forms, and return the fields of `[task]` that read them."""
    numbers = [n % 3 for n in range(12)]
    names = [CLASSES[n] for n in numbers]
    content = [encoded(image) for image in PICTURES]
    if form == "folder":
        return {"data": folder_of(base / "photos").name}
    if form in ("csv", "jsonl"):
        folder_of(base / "files")
        paths = [f"{name}/{n}.png" for n, name in enumerate(names)]
        lines = [f"{path},{name}" for path, name in zip(paths, names, strict=True)]
        if form == "jsonl":
            lines = [
                f'{{"image": {{"path": "{path}"}}, "label": "{name}"}}' for path, name in zip(paths, names, strict=True)
            ]
        (base / "files" / f"rows.{form}").write_text(
            "\n".join((["image,label"] if form == "csv" else []) + lines) + "\n"
        )
        return {"data": f"files/rows.{form}"}
    if form == "binary":
        pa.parquet.write_table(pa.table({"picture": pa.array(content), "label": numbers}), base / "rows.parquet")
        return {"data": "rows.parquet", "labels": list(CLASSES)}
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=list(CLASSES))})
    rows = Dataset.from_dict({"img": [{"bytes": one, "path": None} for one in content], "label": numbers}, features)
    if form == "struct":
        rows.to_parquet(base / "rows.parquet")
        return {"data": "rows.parquet", "labels": list(CLASSES)}
    (base / "set").mkdir()
    rows.to_parquet(base / "set" / "train.parquet")
    return {"hub": str(base / "set")}


@pytest.mark.parametrize("form", ["folder", "csv", "jsonl", "binary", "struct", "hub"])
def test_the_same_images_and_classes_whatever_they_are_kept_in(form: str, tmp_path: Path):
    task = task_of(tmp_path, **written(form, tmp_path))
    assert task.label_names == CLASSES
    assert (len(task.train), len(task.selection)) == (9, 3)
    assert held(task.train) | held(task.selection) == WANTED
    # Each class keeps its share of the held-out rows.
    assert sorted(task.selection["label"]) == [0, 1, 2]


def test_splits_of_folders_are_read_as_the_field_calls_them(tmp_path: Path):
    folder_of(tmp_path / "photos", ("train", "valid", "Test"))
    task = task_of(tmp_path, data="photos")
    assert {len(task.train), len(task.selection)} == {12} and {n: len(r) for n, r in task.report.items()} == {
        "test": 12
    }
    assert held(task.train) == WANTED
    fields = {"train": "photos/train", "validation": "photos/valid", "test": "photos/Test"}
    other = task_of(tmp_path, **fields)
    assert other.description["fingerprint"] == task.description["fingerprint"]


def test_folders_are_classes_where_one_of_them_is_called_like_a_split(tmp_path: Path):
    folder_of(tmp_path / "photos")
    os.rename(tmp_path / "photos" / "dog", tmp_path / "photos" / "train")
    assert task_of(tmp_path, data="photos").label_names == ("cat", "emu", "train")


def test_the_library_reads_the_same_classes_from_a_folder(tmp_path: Path):
    folder_of(tmp_path / "photos", ("train", "test"))
    ours = task_of(tmp_path, data="photos")
    theirs = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path / "cache"))
    assert theirs["train"].features["label"].names == list(ours.label_names)
    for name, rows in {"test": ours.report["test"]}.items():
        assert held(rows) == {one["image"].tobytes(): one["label"] for one in theirs[name]}


def test_what_is_no_image_in_a_folder_is_passed_over_with_a_note(tmp_path: Path):
    root = folder_of(tmp_path / "photos")
    for name in (".DS_Store", "cat/Thumbs.db", "cat/.hidden.png", "notes.txt", "emu/list.csv"):
        (root / name).write_bytes(b"nothing")
    (root / "fox").mkdir()
    (root / "cat" / "old").mkdir()
    PICTURES[0].rotate(180).save(root / "cat" / "old" / "a.PNG")
    task = task_of(tmp_path, data="photos")
    assert len(task.train) + len(task.selection) == 13 and task.label_names == CLASSES
    notes = " | ".join(task.notes)
    assert "1 folder without images, no class (first: fox)" in notes
    assert "2 files passed over, no images by their names (first: emu/list.csv)" in notes
    assert "3 hidden files passed over" in notes


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_and_circles_end(tmp_path: Path):
    root = folder_of(tmp_path / "elsewhere")
    (tmp_path / "photos").mkdir()
    for name in CLASSES:
        (tmp_path / "photos" / name).symlink_to(root / name)
    (root / "cat" / "again").symlink_to(root / "cat")
    (tmp_path / "photos" / "all").symlink_to(tmp_path / "photos")
    (root / "dog" / "all").symlink_to(tmp_path / "photos")
    task = task_of(tmp_path, data="photos")
    assert held(task.train) | held(task.selection) == WANTED
    assert task.label_names == CLASSES and len(task.train) + len(task.selection) == 12


def test_numbers_among_names_are_noted(tmp_path: Path):
    folder_of(tmp_path / "files")
    lines = [f"{CLASSES[n % 3]}/{n}.png,{(1, 'bird', 3)[n % 3]}" for n in range(12)]
    (tmp_path / "files" / "rows.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    task = task_of(tmp_path, data="files/rows.csv")
    assert any("labels are numbers ('1' in row 1) and names ('bird' in row 2)" in note for note in task.notes)
    task = task_of(tmp_path, data="files/rows.csv", labels=["1", "bird", "3"])
    assert not any("numbers" in note for note in task.notes)


def test_a_changed_file_is_another_data_set(tmp_path: Path):
    root = folder_of(tmp_path / "photos")
    before = task_of(tmp_path, data="photos").description["fingerprint"]
    assert task_of(tmp_path, data="photos").description["fingerprint"] == before
    path = root / "cat" / "0.png"
    about = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1_000_000))
    assert task_of(tmp_path, data="photos").description["fingerprint"] != before


def test_files_of_one_size_and_time_that_change_places_are_another_data_set(tmp_path: Path):
    root = folder_of(tmp_path / "photos")
    paths = [root / "cat" / name for name in ("0.png", "3.png")]
    for path in paths:
        Image.open(path).copy().save(path, "BMP")
        os.utime(path, ns=(10**18, 10**18))
    before = task_of(tmp_path, data="photos").description["fingerprint"]
    time.sleep(0.02)
    for old, new in ((paths[0], root / "other"), (paths[1], paths[0]), (root / "other", paths[1])):
        old.rename(new)
    assert len({(path.stat().st_size, path.stat().st_mtime_ns) for path in paths}) == 1
    assert task_of(tmp_path, data="photos").description["fingerprint"] != before


def test_the_same_bytes_are_the_same_data_under_any_name(tmp_path: Path):
    found = set()
    for name in ("a.png", "b.png", None):
        images = [{"bytes": encoded(image), "path": name} for image in PICTURES]
        pa.parquet.write_table(
            pa.table({"image": images, "label": [n % 3 for n in range(12)]}), tmp_path / "rows.parquet"
        )
        found.add(task_of(tmp_path, data="rows.parquet").description["fingerprint"])
    assert len(found) == 1


def test_images_of_two_splits_that_are_the_same_are_noted(tmp_path: Path):
    root = folder_of(tmp_path / "photos", ("train", "val"))
    (root / "val" / "dog" / "copy.png").write_bytes((root / "train" / "dog" / "1.png").read_bytes())
    notes = task_of(tmp_path, data="photos").notes
    assert any(
        "1 image of validation is a training image, too (first: " in note and "copy.png" in note for note in notes
    )
    os.remove(root / "val" / "dog" / "copy.png")
    assert not any("too (first" in note for note in task_of(tmp_path, data="photos").notes)


def test_parts_may_have_images_of_other_kinds_of_files(tmp_path: Path):
    first, second = written("folder", tmp_path), written("binary", tmp_path)
    parts = [{"name": "a", **first}, {"name": "b", "data": second["data"], "image": "picture"}]
    section = {"labels": list(CLASSES), "part": parts, "train_samples": 10}
    task = load_task(
        TaskSection.model_validate({"name": "own", "type": "image-classification", **section}),
        EvaluateSection(),
        base=tmp_path,
    )
    assert (len(task.train), sorted(set(task.train["part"])), set(task.report)) == (10, [0, 1], {"a", "b"})


# Headers and decoding


def images_of(*content: Any, **options: Any) -> pa.ChunkedArray:
    return read_images({"image": Column([list(content)])}, "image", "rows", options.pop("notes", []), **options)


def seen(content: bytes) -> Image.Image:
    return decoded({"bytes": content, "path": None})


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_the_camera_was_held(orientation: int):
    tags = Image.Exif()
    tags[0x0112] = orientation
    file = io.BytesIO()
    NOISE.save(file, "PNG", exif=tags)
    assert seen(file.getvalue()).tobytes() == ImageOps.exif_transpose(Image.open(file)).tobytes()
    assert (orientation == 1) == (seen(file.getvalue()).tobytes() == NOISE.tobytes())


def test_damaged_tags_leave_the_pixels_as_they_are():
    file = io.BytesIO()
    NOISE.save(file, "PNG", exif=b"Exif\0\0MM\0*nonsense and more of it")
    assert seen(file.getvalue()).tobytes() == NOISE.tobytes()


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF")]
)
def test_other_pixels_become_what_pillow_makes_of_them(mode: str, form: str):
    image = NOISE.convert(mode)
    content = encoded(image, form)
    assert len(images_of(content)) == 1
    assert seen(content).mode == "RGB" and seen(content).tobytes() == image.convert("RGB").tobytes()
    assert decoded({"bytes": content, "path": None}, mode="L").mode == "L"


def test_sixteen_bits_are_scaled_and_not_cut():
    pixels = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    content = encoded(Image.fromarray(pixels))
    assert len(images_of(content)) == 1
    assert np.asarray(seen(content))[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_of_several_frames_the_first_is_taken_with_a_note():
    frames = [image.resize((8, 8)) for image in PICTURES[:3]]
    notes: list[str] = []
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    images_of(encoded(frames[0]), file.getvalue(), notes=notes)
    assert notes == ["1 image of rows has several frames or pages, of which the first is taken (first: row 2)"]
    assert seen(file.getvalue()).tobytes() == frames[0].tobytes()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_image_that_lacks_its_end_is_found_before_training(form: str):
    whole = encoded(NOISE.resize((64, 48)), form)
    images_of(whole)
    for share in (0.4, 0.7, 0.95):
        with pytest.raises(InputError, match=r"rows: row 2 is (truncated|damaged)"):
            images_of(whole, whole[: int(len(whole) * share)])


def test_rows_are_counted_through_all_slices():
    content = [encoded(NOISE)] * 700
    content[600] = content[600][:-30]
    with pytest.raises(InputError, match="rows: row 601 is truncated"):
        images_of(*content)


def test_what_is_behind_the_end_of_an_image_does_no_harm():
    content = encoded(NOISE, "JPEG") + b"a trailer of some camera" * 10
    assert len(images_of(content)) == 1 and seen(content).size == NOISE.size


def test_an_image_that_is_damaged_after_the_check_is_named(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(NOISE))
    [row] = images_of("a.png", folder=tmp_path).to_pylist()
    assert row["path"] == str(path) and row["bytes"] is None and row["stamp"].startswith(f"{path.stat().st_size}-")
    path.write_bytes(encoded(NOISE)[:-60])
    with pytest.raises(InputError, match=f"{path.name} is truncated"):
        decoded({**row, "stamp": None}, row=3)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} cannot be read any more"):
        decoded(row, row=3)
    with pytest.raises(InputError, match=r"the image of row 4 is no image"):
        decoded({"bytes": b"nothing", "path": None, "stamp": None}, row=3)


def test_a_file_that_takes_the_place_of_the_checked_one_is_not_decoded(tmp_path: Path):
    first, second = tmp_path / "a.bmp", tmp_path / "b.bmp"
    for path, image in ((first, NOISE), (second, ImageOps.flip(NOISE))):
        path.write_bytes(encoded(image, "BMP"))
        os.utime(path, ns=(0, 10**18))
    [row] = images_of("a.bmp", folder=tmp_path).to_pylist()
    assert decoded(row).tobytes() == NOISE.tobytes()
    os.replace(second, first)
    with pytest.raises(InputError, match=r"a\.bmp was changed after it was checked") as told:
        decoded(row)
    assert "run it again" in str(told.value.hint)


# Shapes


@pytest.mark.slow
def test_shapes_are_the_same_in_every_process_and_differ_between_sets_and_seeds():
    code = (
        "import hashlib; from kdcli.data.shapes import SHAPES; "
        "print(hashlib.sha256(repr([c['image'][:20] for c in SHAPES.read(3).values()]).encode()).hexdigest())"
    )
    splits = SHAPES.read(3)
    own = hashlib.sha256(repr([columns["image"][:20] for columns in splits.values()]).encode()).hexdigest()
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == own
    )
    stamps = [{image["stamp"] for image in columns["image"]} for columns in splits.values()]
    assert not stamps[0] & stamps[1] and sum(map(len, stamps)) == sum(SIZES.values())
    assert {name: len(columns["label"]) for name, columns in splits.items()} == SIZES


def test_shapes_are_balanced_and_lighter_than_what_is_behind_them():
    for pixels, labels in shapes(0).values():
        assert np.bincount(labels).tolist() == [len(labels) // len(LABELS)] * len(OUTLINES)
        light = pixels.mean(-1) > 110
        assert light.mean((1, 2)).min() > 0.05 and light.mean((1, 2)).max() < 0.75
        # No shape touches the border.
        assert not light[:, 0].any(1).mean() > 0.02
