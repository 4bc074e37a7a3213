"""Which files a model's weights are read from: safetensors inside its folder, and nothing else."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file

from kdcli.errors import InputError
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.heads import load_model

INDEX = "model.safetensors.index.json"


def split(folder: Path, names: list[str]) -> dict[str, str]:
    """Split a folder's weights into files of these names, with an index; return its map."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: names[i % len(names)] for i, key in enumerate(sorted(state))}
    for name in names:
        part = {key: value for key, value in state.items() if places[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    write_index(folder, places)
    return places


def write_index(folder: Path, places: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT in two files."""
    (tmp_path / "model").mkdir()
    save_model(tiny("bert"), tmp_path / "model")
    split(tmp_path / "model", ["one.safetensors", "two.safetensors"])
    return tmp_path / "model"


def test_a_model_in_several_files_is_loaded(folder: Path):
    assert torch.equal(probe(load_model(folder)), probe(tiny("bert")))


def test_a_low_rank_model_in_several_files_is_loaded(tmp_path: Path):
    model = build_student(tiny("bert"), StudentSection(form="low-rank", rank=8), seed=0).model
    save_model(model, tmp_path)
    split(tmp_path, ["a.safetensors", "b.safetensors", "c.safetensors"])
    assert torch.equal(probe(load_model(tmp_path)), probe(model))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.safetensors", "outside the model.s folder"),
        ("sub/../../outside.safetensors", "outside the model.s folder"),
        ("{root}/outside.safetensors", "outside the model.s folder"),
        ("two.bin", r"which is no \.safetensors file"),
        ("../outside.bin", r"which is no \.safetensors file"),
        ("gone.safetensors", "is missing"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(name: str, words: str, folder: Path):
    target = folder.parent / "outside.safetensors"
    shutil.move(folder / "two.safetensors", target)
    torch.save(load_file(target), folder.parent / "outside.bin")
    torch.save(load_file(target), folder / "two.bin")
    (folder / "sub").mkdir()
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    named = name.format(root=folder.parent)
    write_index(folder, {key: named if place == "two.safetensors" else place for key, place in index.items()})
    with pytest.raises(InputError, match=words):
        load_model(folder)


@pytest.mark.parametrize("single", [True, False])
def test_a_link_that_leads_elsewhere_is_refused(single: bool, folder: Path):
    if single:
        save_model(tiny("bert"), folder)
    name = "model.safetensors" if single else "two.safetensors"
    shutil.move(folder / name, folder.parent / "elsewhere.safetensors")
    (folder / name).symlink_to(folder.parent / "elsewhere.safetensors")
    with pytest.raises(InputError, match="lies outside the model's folder"):
        load_model(folder)


@pytest.mark.parametrize("single", [True, False])
def test_the_links_of_the_hubs_cache_are_followed(single: bool, folder: Path):
    if single:
        save_model(tiny("bert"), folder)
    cache = folder.parent / "models--owner--name"
    snapshot = cache / "snapshots" / "0123456789abcdef"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        os.symlink(Path("../../blobs") / str(number), snapshot / file.name)
    assert torch.equal(probe(load_model(snapshot)), probe(tiny("bert")))


@pytest.mark.parametrize("places", [[], {}, {"a": 3}, {"a": ["one.safetensors"]}, None, "one.safetensors"])
def test_an_index_that_is_none_is_refused(places: object, folder: Path):
    write_index(folder, places)
    with pytest.raises(InputError, match="is no index of safetensors files"):
        load_model(folder)


def test_a_weight_in_two_files_is_refused(folder: Path):
    state = load_file(folder / "one.safetensors")
    save_file(state | load_file(folder / "two.safetensors"), folder / "two.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="is in another file of the model, too"):
        load_model(folder)


def test_parts_without_an_index_are_refused(folder: Path):
    (folder / INDEX).unlink()
    (folder / "one.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match=r"parts of a model, but no model\.safetensors\.index\.json"):
        load_model(folder)
