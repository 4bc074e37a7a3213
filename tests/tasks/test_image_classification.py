"""The kind of classifiers of images: its rows, its features and batches, its answers, and what it shares with texts."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from families import IMAGES, tiny
from image_rows import encoded, pictures, rows_of, task_of

from kdcli.data.columns import Column
from kdcli.errors import InputError
from kdcli.models.heads import IMAGE_CLASSIFICATION, head_of
from kdcli.models.inputs import inputs_of, main_input, mask_of, model_inputs
from kdcli.models.probe import probe
from kdcli.models.processors import check_processor, hash_of_processor, load_processor, new_image_processor
from kdcli.models.save import save_model
from kdcli.tasks import registry
from kdcli.tasks.classification import KIND as TEXTS
from kdcli.tasks.heads import heads, kind_of_model
from kdcli.tasks.predict import predict

KIND = registry.get("image-classification")
NAMES = ("a", "b", "c")


def columns(images: list[bytes], labels: list[object]) -> dict[str, Column]:
    cells = pa.array([{"bytes": each, "path": None} for each in images])
    return {"image": Column([cells]), "label": Column([labels])}


def test_a_model_of_images_is_of_this_kind_and_of_no_other():
    model = tiny("vit", labels=3)
    assert head_of(model, heads()) == IMAGE_CLASSIFICATION
    assert kind_of_model(model, "it", "MODEL", processor=new_image_processor(16, 16)).name == KIND.name
    with pytest.raises(InputError, match="not one for classification"):
        kind_of_model(model, "it", "MODEL", wanted="classification")
    assert kind_of_model(tiny("bert"), "it", "MODEL").name == TEXTS.name


def test_classes_are_read_as_those_of_texts_are():
    images = [encoded(image) for image in pictures(4)]
    labels = ["b", "a", "c", "a"]
    rows, names = KIND.read(columns(images, labels), KIND.fields(), "here", [])
    texts = {"text": Column([["one", "two", "three", "four"]]), "label": Column([labels])}
    others, expected = TEXTS.read(texts, TEXTS.fields(text="text"), "here", [])
    assert names == expected == NAMES and rows.column("label").equals(others.column("label"))
    assert rows.column("image").combine_chunks().field("bytes").to_pylist() == images
    answers = np.array([1, 0, 0, 0])
    metrics = ("accuracy", "f1", "mcc", "balanced_accuracy")
    assert KIND.score(answers, rows, names, metrics) == TEXTS.score(answers, others, names, metrics)


def test_batches_have_pixels_and_no_tokens():
    rows, processor = rows_of(pictures(5)), new_image_processor(16, 16)
    features = KIND.encode(rows, processor, 128)
    batch = KIND.collator(processor)(list(features))
    assert not {"input_ids", "attention_mask"} & batch.keys()
    assert batch["pixel_values"].shape == (5, 3, 16, 16) and set(features["length"]) == {1}
    model = tiny("vit", labels=3)
    assert inputs_of(model.config) == ("pixel_values",) and list(model_inputs(model, batch)) == ["pixel_values"]
    assert main_input(batch) is batch["pixel_values"]
    assert torch.equal(mask_of(batch, torch.zeros(5, 17, 8)), torch.ones(5, 17, dtype=torch.long))
    [prediction] = KIND.predictions(model(**model_inputs(model, batch)), batch)
    assert prediction.logits.shape == (5, 3) and prediction.target is batch["labels"]
    found = predict(model, features, KIND.collator(processor), batch_size=2)["logits"]
    assert np.allclose(found, prediction.logits.detach().numpy(), atol=1e-5)


def test_replies_are_the_most_probable_classes():
    rows, processor = rows_of(pictures(5)), new_image_processor(16, 16)
    model = tiny("vit", labels=3, id2label=dict(enumerate(NAMES)))
    kind = task_of(rows, rows).kind
    replies = kind.replies(model, rows, processor, top=3, max_length=128, ask=predict)
    with torch.no_grad():
        pixels = processor(pictures(5), return_tensors="pt")["pixel_values"]
        shares = model(pixels).logits.softmax(-1)
    assert [reply["label"] for reply in replies] == [NAMES[place] for place in shares.argmax(-1).tolist()]
    for reply, row in zip(replies, shares, strict=True):
        assert reply["probability"] == pytest.approx(row.max().item(), abs=1e-5)
        assert [entry["probability"] for entry in reply["top"]] == pytest.approx(
            sorted(row.tolist(), reverse=True), abs=1e-5
        )


def test_a_processor_is_named_by_what_it_does_and_is_that_of_the_folder(tmp_path):
    one = new_image_processor(16, 16)
    save_model(tiny("vit"), tmp_path, one)
    again = load_processor(tmp_path)
    assert hash_of_processor(again) == hash_of_processor(one) != hash_of_processor(new_image_processor(16, 8))
    again.image_mean = [0.5, 0.5, 0.4]
    assert hash_of_processor(again) != hash_of_processor(one)
    check_processor(tiny("vit"), one)
    with pytest.raises(InputError, match="a model of the family BERT reads by a tokenizer"):
        check_processor(tiny("bert"), one)


@pytest.mark.parametrize("family", IMAGES)
def test_a_model_in_half_precision_reads_pixels(family: str):
    model = tiny(family, labels=3).bfloat16()
    batch = {"pixel_values": torch.rand(2, 3, 16, 16)}
    assert model_inputs(model, batch)["pixel_values"].dtype == torch.bfloat16 and probe(model).dtype == torch.float32
