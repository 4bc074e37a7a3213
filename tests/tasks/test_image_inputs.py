"""From images to batches: what the library's processor gives for one image, whatever the batch and the process."""

import os
import pickle
import time

import numpy as np
import pytest
import torch
from image_rows import encoded, pictures, rows_of, task_of
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    DINOv3ViTImageProcessor,
    ViTImageProcessor,
)

from kdcli.errors import InputError
from kdcli.models.hashing import hash_of_dataset
from kdcli.models.processors import hash_of_processor
from kdcli.tasks.image_inputs import LARGE

SIZE = {"height": 16, "width": 16}
SMALL = {"size": {"shortest_edge": 20}, "crop_size": SIZE}
EVERYTHING = {"flip": True, "crop": 2, "rand_augment": True, "mixup": 0.3}


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size=SIZE)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size=SIZE),
        ViTImageProcessor(size=SIZE, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
        ViTImageProcessor(size=SIZE, do_normalize=False),
        ViTImageProcessor(size=SIZE, image_mean=[0.5], image_std=[0.5]),
        DeiTImageProcessor(**SMALL),
        BeitImageProcessor(size=SIZE, do_center_crop=False),
        CLIPImageProcessor(**SMALL),
        BitImageProcessor(**SMALL),
        DINOv3ViTImageProcessor(size=SIZE),
    ],
    ids=["vit", "own-scale", "unscaled", "grey", "deit", "beit", "clip", "bit", "dinov3"],
)
def test_pixels_are_those_of_the_processor_on_one_image(processor):
    mode = "L" if len(processor.image_mean) == 1 else "RGB"
    images = pictures(7, mode=mode)
    kind = task_of(rows_of(images), rows_of(images)).kind
    features = kind.encode(rows_of(images), processor, 128)
    batch = kind.collator(processor)(list(features))
    alone = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"], alone)
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert batch["index"].tolist() == list(range(7))


def test_large_images_are_those_of_the_processor_in_their_order(processor):
    noise = np.random.default_rng(0).integers(0, 256, (6, 300, 280, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in noise]
    rows = rows_of(images)
    kind = task_of(rows, rows).kind
    features = list(kind.encode(rows, processor, 128))
    assert sum(len(row["image"]["bytes"]) for row in features) > LARGE
    alone = [processor(image, return_tensors="pt").pixel_values for image in images]
    assert torch.equal(kind.collator(processor)(features)["pixel_values"], torch.cat(alone))
    features[4]["image"]["bytes"] = features[4]["image"]["bytes"][:1000]
    with pytest.raises(InputError, match="row 5"):
        kind.collator(processor)(features)


def test_a_colour_image_is_grey_for_a_model_of_one_channel():
    processor = ViTImageProcessor(size=SIZE, image_mean=[0.5], image_std=[0.5])
    images = pictures(3)
    kind = task_of(rows_of(images), rows_of(images)).kind
    batch = kind.collator(processor)(list(kind.encode(rows_of(images), processor, 128)))
    alone = [processor(image.convert("L"), return_tensors="pt").pixel_values for image in images]
    assert torch.equal(batch["pixel_values"], torch.cat(alone))


def batches(encoded_task, rows, workers: int, epoch: int, order: list[int]) -> list[dict]:
    encoded_task.collator.begin_epoch(epoch)
    loader = DataLoader(rows, batch_size=4, sampler=order, collate_fn=encoded_task.collator, num_workers=workers)
    return list(loader)


def test_batches_do_not_depend_on_the_number_of_workers(processor):
    rows = rows_of(pictures(12))
    task = task_of(rows, rows, **EVERYTHING)
    order = [3, 1, 4, 11, 5, 9, 2, 6, 0, 7, 8, 10]
    found = [
        batches(encoded_task, encoded_task.train, workers, epoch, order)
        for workers, epoch in ((0, 2), (2, 2), (2, 1))
        for encoded_task in [task.kind.prepare(task, processor, 128, seed=7)]
    ]
    for alone, by_others, other_epoch in zip(*found, strict=True):
        assert alone.keys() == by_others.keys() == {"pixel_values", "labels", "index"}
        assert all(torch.equal(alone[name], by_others[name]) for name in alone)
        assert alone["labels"].shape == (4, 3)
        assert not torch.equal(alone["pixel_values"], other_epoch["pixel_values"])


def test_a_collator_is_the_same_after_pickling(processor):
    rows = rows_of(pictures(4))
    task = task_of(rows, rows, **EVERYTHING)
    prepared = task.kind.prepare(task, processor, 128, seed=7)
    prepared.collator.begin_epoch(3)
    other = pickle.loads(pickle.dumps(prepared.collator))
    batch = list(prepared.train)
    assert torch.equal(prepared.collator(batch)["pixel_values"], other(batch)["pixel_values"])


class AtOnce(ViTImageProcessor):
    """Scales pixels whatever it is asked for."""

    def __call__(self, images, **options):
        return super().__call__(images, return_tensors="pt")


@pytest.mark.parametrize("field", ["flip", "cache_pixels"])
def test_what_works_on_bytes_is_refused_where_a_processor_gives_none(field: str, own_cache):
    rows = rows_of(pictures(4))
    task, plain = task_of(rows, rows, **{field: True}), task_of(rows, rows)
    processor = AtOnce(size=SIZE)
    for refused in (task.kind.check, task.kind.prepare):
        with pytest.raises(InputError, match=f"{field} works on images as bytes, and AtOnce") as told:
            refused(task, processor, 128)
        assert told.value.where == f"task.{field}"
    assert not list(own_cache.rglob("pixels.bin"))
    prepared = plain.kind.prepare(plain, processor, 128)
    pixels = prepared.collator(list(prepared.train))["pixel_values"]
    assert torch.equal(pixels, torch.cat([processor(image).pixel_values for image in pictures(4)]))


def test_only_training_images_change(processor):
    rows = rows_of(pictures(8))
    task = task_of(rows, rows, **EVERYTHING)
    plain = task_of(rows, rows)
    assert task.kind.inputs_change and not plain.kind.inputs_change
    prepared, scored = task.kind.prepare(task, processor, 128), plain.kind.prepare(plain, processor, 128)
    expected = scored.collator(list(scored.selection))
    for epoch in (0, 5):
        prepared.collator.begin_epoch(epoch)
        held = prepared.collator(list(prepared.selection))
        assert torch.equal(held["pixel_values"], expected["pixel_values"])
        assert torch.equal(held["labels"], expected["labels"])
        changed = prepared.collator(list(prepared.train))["pixel_values"]
        assert (changed != expected["pixel_values"]).flatten(1).any(1).sum() >= 6
    # What is looked at once before training, and what is scored.
    sample = task.kind.prepare_sample(task, processor, 128)
    assert torch.equal(sample.collator(list(sample.train))["pixel_values"], expected["pixel_values"])


def test_features_are_named_by_their_images_and_what_reads_them(processor):
    images = pictures(4)
    kind = task_of(rows_of(images), rows_of(images)).kind

    def name(pictures_, by=processor) -> str:
        return hash_of_dataset(kind.encode(rows_of(pictures_), by, 128))

    assert name(images) == name(images)
    others = [
        name([*images[:3], images[0]]),
        name(images[::-1]),
        name(images, ViTImageProcessor(size=SIZE, resample=3)),
        name(images, ViTImageProcessor(size=SIZE, image_std=[0.4, 0.5, 0.5])),
    ]
    assert len({name(images), *others}) == 5
    assert hash_of_processor(processor) == hash_of_processor(ViTImageProcessor(size=SIZE))


def test_the_same_file_with_other_content_is_another_image(tmp_path, processor):
    path = tmp_path / "one.bmp"
    kind = task_of(rows_of(pictures(1)), rows_of(pictures(1))).kind

    def name() -> str:
        rows = rows_of(pictures(1)).remove_columns("image")
        rows = rows.add_column("image", [{"bytes": None, "path": str(path)}])
        return hash_of_dataset(kind.encode(rows, processor, 128))

    pictures(1)[0].save(path)
    first, about = name(), path.stat()
    assert name() == first
    time.sleep(0.02)
    pictures(1, seed=1)[0].save(path)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size and name() != first


def test_an_image_that_cannot_be_decoded_is_told_with_its_row(processor):
    whole = encoded(pictures(1)[0])
    rows = rows_of([whole, whole[: len(whole) // 2]])
    kind = task_of(rows, rows).kind
    with pytest.raises(InputError, match="row 2"):
        kind.collator(processor)(list(kind.encode(rows, processor, 128)))


@pytest.mark.parametrize(("fields", "said"), [({"flip": True}, "flip changes"), (EVERYTHING, "and mixup change")])
def test_a_note_names_what_changes_images(fields, said, processor):
    task = task_of(rows_of(pictures(4)), rows_of(pictures(4)), **fields)
    assert [note for note in task.kind.remarks(task, processor, 128) if f"{said} training images" in note]


def test_what_works_on_bytes_is_refused_where_a_processor_has_no_bytes():
    processor = DINOv3ViTImageProcessor(size=SIZE)
    rows = rows_of(pictures(2))
    for fields, where in (({"flip": True}, "task.flip"), ({"cache_pixels": True}, "task.cache_pixels")):
        task = task_of(rows, rows, **fields)
        with pytest.raises(InputError, match="DINOv3ViTImageProcessor") as caught:
            task.kind.check(task, processor, 128)
        assert caught.value.where == where
    task = task_of(rows, rows)
    task.kind.check(task, processor, 128)


def test_mixed_labels_are_shares_that_the_gold_loss_takes(processor):
    rows = rows_of(pictures(6))
    task = task_of(rows, rows, mixup=0.5)
    prepared = task.kind.prepare(task, processor, 128, seed=1)
    batch = prepared.collator(list(prepared.train))
    logits = torch.randn(6, 3, requires_grad=True)
    loss = task.kind.distribution.nll(logits, batch["labels"])
    expected = -(batch["labels"] * logits.log_softmax(-1)).sum(-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert np.allclose(batch["labels"].sum(1), 1.0)
