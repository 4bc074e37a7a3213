"""A teacher at a revision of a hub's model, whose newest one has another tokenizer."""

import json
from pathlib import Path

import pytest
from conftest import NAMED, World
from families import tiny, tokenizer

from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer

NAME = "me/clf"
COMMITS = {"v1": "1" * 40, "main": "2" * 40}


@pytest.fixture
def snapshots(world: World) -> dict[str, Path]:
    """Put both revisions into a hub cache; return their folders."""
    world.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    world.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.folder / "hub"))
    cached = world.folder / "hub" / f"models--{NAME.replace('/', '--')}"
    folders = {}
    for revision, words in (("v1", tokenizer()), ("main", train_tokenizer(["quite other words"], 60))):
        (cached / "refs").mkdir(parents=True, exist_ok=True)
        (cached / "refs" / revision).write_text(COMMITS[revision])
        folders[revision] = cached / "snapshots" / COMMITS[revision]
        folders[revision].mkdir(parents=True)
        save_model(tiny("bert", **NAMED), folders[revision], words)
    return folders


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("named", [False, True], ids=["its-own", "named"])
def test_the_tokenizer_is_of_the_same_revision_unless_another_is_named(
    named: bool, world: World, snapshots: dict[str, Path]
):
    teacher = {"model": NAME, "revision": "v1", **({"tokenizer": NAME} if named else {})}
    done = world.call("distill", world.recipe(teacher=teacher), "--json")
    assert done.code == 0, done.err
    student = world.folder / "runs" / "recipe" / "student"
    wanted = load_tokenizer(snapshots["main" if named else "v1"])
    assert load_tokenizer(student).get_vocab() == wanted.get_vocab()
    assert all(word not in (student / "tokenizer_config.json").read_text() for word in ("v1", "1111", NAME))


def test_a_padding_token_that_only_the_tokenizer_names_is_that_of_the_revision(
    world: World, snapshots: dict[str, Path]
):
    change(snapshots["v1"] / "config.json", pad_token_id=None)
    change(snapshots["main"] / "tokenizer_config.json", pad_token="[MASK]")
    done = world.call("distill", world.recipe(teacher={"model": NAME, "revision": "v1"}), "--json")
    assert done.code == 0, done.err
    config = json.loads((world.folder / "runs" / "recipe" / "student" / "config.json").read_text())
    assert config["pad_token_id"] == load_tokenizer(snapshots["v1"]).pad_token_id
