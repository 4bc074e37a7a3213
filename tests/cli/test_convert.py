"""kdcli convert: a pickled model becomes one that every command takes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import World
from families import tiny, tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.tasks.heads import load_model


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickled_model_is_converted_and_scored(shards: int, world: World):
    folder = world.model()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        places = {key: names[i % 2] for i, key in enumerate(state)}
        for name in names:
            torch.save({key: value for key, value in state.items() if places[key] == name}, folder / name)
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "training_args.bin").write_bytes(b"not to be read")
    done = world.call("convert", "./teacher", "--out", "made", "--json")
    assert done.code == 0, done.err
    assert done.json["tensors"] == len(state) and done.json["dtype"] == "float32"
    made = world.folder / "made"
    assert not [path.name for path in made.iterdir() if path.suffix == ".bin" or "index" in path.name]
    written = load_file(made / "model.safetensors")
    assert all(torch.equal(value, written[key]) for key, value in state.items())
    model = AutoModelForSequenceClassification.from_pretrained(made)
    assert torch.equal(probe(model), probe(load_model(made)))
    scored = world.call("eval", "made", "--data", "rows.csv", "--text", "text", "--json")
    assert scored.code == 0, scored.err
    # Nothing is replaced without a word.
    assert world.call("convert", "./teacher", "--out", "made").code == 2
    assert world.call("convert", "./teacher", "--out", "made", "--force").code == 0


def test_tied_weights_are_converted(world: World):
    (world.folder / "old").mkdir()
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny("bert").config).eval()
    save_model(model, world.folder / "old", tokenizer())
    (world.folder / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), world.folder / "old" / "pytorch_model.bin")
    assert world.call("convert", "old", "--out", "made").code == 0
    assert torch.equal(probe(load_model(world.folder / "made")), probe(model))


def test_a_padding_token_that_only_the_tokenizer_knows_is_taken_from_it(world: World):
    words = tokenizer()
    (world.folder / "teacher").mkdir()
    save_model(tiny("roberta", id2label={0: "no", 1: "yes"}, pad_token_id=words.pad_token_id), world.folder / "teacher")
    words.save_pretrained(world.folder / "teacher")
    scores = []
    for pad in (words.pad_token_id, None):
        path = world.folder / "teacher" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": pad}))
        done = world.call("eval", "./teacher", "--data", "rows.csv", "--text", "text", "--json")
        assert done.code == 0, done.err
        scores.append(done.json["metrics"])
    assert scores[0] == scores[1]


def pickled(world: World) -> Path:
    folder = world.model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("name", ["secret.json", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(name: str, world: World):
    folder = pickled(world)
    outside = world.folder / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("a secret")
    (folder / name).symlink_to(outside)
    done = world.call("convert", "./teacher", "--out", "made")
    assert done.code == 2 and name in done.err and "lies outside the model's folder" in done.err
    assert not (world.folder / "made").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json"])
def test_a_model_is_scored_with_the_files_of_its_own_folder_alone(name: str, world: World):
    folder = world.model()
    outside = world.folder / "outside.json"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(outside)
    done = world.call("eval", "./teacher", "--data", "rows.csv", "--text", "text")
    assert done.code == 2 and name in done.err and "lies outside the model's folder" in done.err


def test_a_model_in_the_hubs_cache_is_converted_and_scored(world: World):
    folder = pickled(world)
    cache = world.folder / "models--owner--name"
    snapshot = cache / "snapshots" / "0123456789abcdef"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert world.call("convert", snapshot, "--out", "made").code == 0
    shutil.copy(world.folder / "made" / "model.safetensors", snapshot)
    done = world.call("eval", snapshot, "--data", "rows.csv", "--text", "text")
    assert done.code == 0, done.err


@pytest.mark.parametrize("layout", ["new", "old", "modules alone"])
def test_the_modules_of_a_model_of_embeddings_are_converted(layout: str, world: World):
    folder = world.model("embedder")
    places = [folder / "2_Dense"] if layout == "modules alone" else [folder, folder / "2_Dense"]
    before = load_model(folder)
    for place in places:
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    if layout == "old":
        (folder / "0_Transformer").mkdir()
        for path in [path for path in folder.iterdir() if path.is_file() and path.name != "modules.json"]:
            path.rename(folder / "0_Transformer" / path.name)
        lines = json.loads((folder / "modules.json").read_text())
        (folder / "modules.json").write_text(json.dumps([{**lines[0], "path": "0_Transformer"}, *lines[1:]]))
    done = world.call("convert", "./teacher", "--out", "made", "--json")
    assert done.code == 0, done.err
    assert done.json["tensors"] == len(before.state_dict())
    assert not list((world.folder / "made").rglob("*.bin"))
    assert torch.equal(probe(load_model(world.folder / "made")), probe(before))
