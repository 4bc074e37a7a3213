"""Pixels that are kept: the same as those decoded anew, made again when damaged, and never the reason of a failure."""

import multiprocessing
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from image_rows import encoded, pictures, rows_of, task_of
from transformers import ViTImageProcessor

from kdcli.errors import InputError
from kdcli.models.hashing import hash_of_dataset

SIZE = {"height": 16, "width": 16}
USAGE = namedtuple("USAGE", "total used free")


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size=SIZE)


def prepared(train=None, selection=None, **fields):
    train = train if train is not None else rows_of(pictures(70))
    selection = selection if selection is not None else rows_of(pictures(5, seed=1))
    task = task_of(train, selection, **fields)
    return task.kind.prepare(task, processor(), 128, seed=3)


def files(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "pixels").rglob("*.bin"))


def pixels(encoded_task) -> list[torch.Tensor]:
    encoded_task.collator.begin_epoch(4)
    return [
        encoded_task.collator(list(rows.select(order)))["pixel_values"]
        for rows, order in ((encoded_task.train, [65, 3, 37]), (encoded_task.selection, [4, 0]))
    ]


@pytest.mark.parametrize("fields", [{}, {"flip": True, "crop": 2, "mixup": 0.2}], ids=["plain", "augmented"])
def test_kept_pixels_are_those_that_are_decoded(own_cache: Path, fields):
    fresh = prepared(**fields)
    assert not (own_cache / "pixels").exists()
    kept = prepared(cache_pixels=True, **fields)
    [file] = files(own_cache)
    assert file.stat().st_size == 75 * 3 * 16 * 16
    assert all(map(torch.equal, pixels(kept), pixels(fresh)))
    # The images themselves are not read any more, and what the teacher says has the same name.
    assert "image" not in kept.train.column_names
    assert hash_of_dataset(kept.train) == hash_of_dataset(fresh.train)
    other = pickle.loads(pickle.dumps(kept.collator))
    assert len(pickle.dumps(kept.collator)) < 20_000
    assert torch.equal(other(list(kept.selection))["pixel_values"], kept.collator(list(kept.selection))["pixel_values"])


def test_pixels_are_made_once_for_the_same_images(own_cache: Path):
    prepared(cache_pixels=True)
    [file] = files(own_cache)
    made = file.stat().st_mtime_ns
    prepared(cache_pixels=True, flip=True)
    assert [path.stat().st_mtime_ns for path in files(own_cache)] == [made]
    prepared(rows_of(pictures(70, seed=2)), cache_pixels=True)
    assert len(files(own_cache)) == 2


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "pixels.bin").read_bytes())
    content[1000] ^= 1
    (folder / "pixels.bin").write_bytes(content)


def cut(folder: Path) -> None:
    content = (folder / "pixels.bin").read_bytes()
    (folder / "pixels.bin").write_bytes(content[:-1])


def change_the_record(folder: Path) -> None:
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text(text.replace("75", "74"))


DAMAGE = [
    flip_a_bit,
    cut,
    change_the_record,
    lambda folder: (folder / "record.json").write_text("[]"),
    lambda folder: (folder / "pixels.bin").unlink(),
    lambda folder: (folder / "record.json").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=["bit", "cut", "record", "json", "no-table", "no-record"])
def test_damaged_pixels_are_made_again(own_cache: Path, capfd, damage):
    expected = pixels(prepared(cache_pixels=True))
    [file] = files(own_cache)
    before = file.read_bytes()
    capfd.readouterr()
    damage(file.parent)
    assert all(map(torch.equal, pixels(prepared(cache_pixels=True)), expected))
    assert "is made again" in capfd.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize("problem", ["full", "file"])
def test_without_room_images_are_decoded_in_every_epoch(own_cache: Path, monkeypatch, capfd, problem):
    expected = pixels(prepared())
    if problem == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**9, 10**9, 1000))
    else:
        (own_cache / "pixels").write_text("in the way")
    kept = prepared(cache_pixels=True)
    assert "pixels cannot be kept" in capfd.readouterr().err
    assert all(map(torch.equal, pixels(kept), expected))
    assert files(own_cache) == []


def test_an_image_that_cannot_be_decoded_leaves_nothing_behind(own_cache: Path, capfd):
    content = [encoded(each) for each in pictures(70)]
    content[66] = content[66][:60]
    with pytest.raises(InputError, match="row 67"):
        prepared(rows_of(content), cache_pixels=True)
    assert list((own_cache / "pixels").rglob("*")) == [] and "decoded once" not in capfd.readouterr().err


def make(cache: str) -> None:
    import os

    os.environ["KDCLI_CACHE"] = cache
    prepared(cache_pixels=True)


def test_of_several_processes_one_makes_them(own_cache: Path, capfd):
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=make, args=(str(own_cache),)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert capfd.readouterr().err.count("decoded once") == 1
    assert len(files(own_cache)) == 1
    assert all(map(torch.equal, pixels(prepared(cache_pixels=True)), pixels(prepared())))
