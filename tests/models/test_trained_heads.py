"""A random head never passes as a trained one: which head a file has, and how many outputs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import NAMES, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.heads import BASE
from kdcli.models.load import has_head
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.tasks.heads import head_named, heads, load_model

HEADS = [head_named(name) for name in ("sequence-classification", "masked-lm", "base")]


def headed(family: str, kind: str, **settings: object) -> PreTrainedModel:
    """Return a tiny model of a class of the library: AutoModelFor + `kind`."""
    config = tiny(family, **settings).config
    torch.manual_seed(1)
    return getattr(transformers, f"AutoModel{kind}").from_config(config).eval()


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def unnamed(folder: Path) -> None:
    edit(folder, lambda config: config.pop("architectures"))


@pytest.mark.parametrize("architectures", [True, False])
@pytest.mark.parametrize("family", NAMES)
def test_a_token_classifier_is_no_classifier_of_texts(family: str, architectures: bool, tmp_path: Path):
    if family == "modernbert" and not architectures:
        pytest.skip("its classifiers of tokens and of texts have the same weights")
    save_model(headed(family, "ForTokenClassification"), tmp_path)
    if not architectures:
        unnamed(tmp_path)
    assert [has_head(tmp_path, head) for head in HEADS] == [False, False, True]
    kind = r"it is a token classifier" if architectures else "it is a base model"
    with pytest.raises(InputError, match=rf"no trained head for classifying texts \({kind}\)"):
        load_model(tmp_path, "sequence-classification")


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForMaskedLM", ""])
def test_a_head_is_known_without_architectures_when_all_of_its_weights_are_there(
    family: str, kind: str, tmp_path: Path
):
    model = headed(family, kind)
    save_model(model, tmp_path)
    unnamed(tmp_path)
    head = {"ForSequenceClassification": HEADS[0], "ForMaskedLM": HEADS[1], "": BASE}[kind]
    assert [one for one in HEADS if has_head(tmp_path, one)] == list(dict.fromkeys([head, BASE]))
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("ForQuestionAnswering", "a question-answering model"),
        ("ForMultipleChoice", "a multiple-choice model"),
        ("ForMaskedLM", "a masked language model"),
    ],
)
def test_models_of_other_tasks_are_named(kind: str, title: str, tmp_path: Path):
    save_model(headed("bert", kind), tmp_path)
    with pytest.raises(InputError, match=f"no trained head for classifying texts .it is {title}"):
        load_model(tmp_path, "sequence-classification")


@pytest.mark.parametrize("family", NAMES)
def test_each_parameter_of_a_classifiers_head_must_be_in_the_file(family: str, tmp_path: Path):
    model = tiny(family)
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    blocks = {key for key in state if ".layer." in key or "embeddings" in key}
    heads = sorted(set(state) - blocks)
    assert len(heads) >= 4
    for key in heads:
        rest = {name: value for name, value in state.items() if name != key}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"is missing 1 weight \(first: {key}\)"):
            load_model(tmp_path)
        unnamed_folder = tmp_path / "unnamed"
        unnamed_folder.mkdir(exist_ok=True)
        save_file(rest, unnamed_folder / "model.safetensors", metadata={"format": "pt"})
        (unnamed_folder / "config.json").write_text((tmp_path / "config.json").read_text())
        unnamed(unnamed_folder)
        assert not has_head(unnamed_folder, HEADS[0])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("outputs", [1, 5])
def test_a_model_without_names_has_as_many_outputs_as_its_file(family: str, outputs: int, tmp_path: Path):
    model = tiny(family, labels=outputs)
    save_model(model, tmp_path)

    def forget(config: dict) -> None:
        for key in ("id2label", "label2id", "num_labels", "problem_type"):
            config.pop(key, None)

    edit(tmp_path, forget)
    loaded = load_model(tmp_path)
    assert loaded.config.num_labels == outputs
    assert torch.equal(probe(loaded), probe(model))


@pytest.mark.parametrize("stated", [1, 2, 4])
def test_a_number_of_classes_that_the_file_contradicts_is_refused(stated: int, tmp_path: Path):
    save_model(tiny("roberta", labels=3), tmp_path)
    edit(tmp_path, lambda config: config.update(id2label={str(i): f"c{i}" for i in range(stated)}))
    with pytest.raises(InputError, match=f"the weights have 3 outputs .*, config.json says {stated}"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", NAMES)
def test_a_body_without_a_pooler_is_loaded_without_one(family: str, tmp_path: Path):
    model = headed(family, "ForMaskedLM")
    save_model(model, tmp_path)
    torch.manual_seed(2)
    body = load_model(tmp_path, "base")
    saved = {key.removeprefix(f"{model.base_model_prefix}.") for key in model.state_dict()}
    assert set(body.state_dict()) <= saved
    (tmp_path / "bare").mkdir()
    save_model(model.base_model, tmp_path / "bare")
    again = load_model(tmp_path / "bare", "base")
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in body.state_dict().items()
    }


def test_what_pretraining_left_beside_a_classifier_does_no_harm(tmp_path: Path):
    model = tiny("roberta")
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    extra = {
        "roberta.pooler.dense.weight": torch.zeros(32, 32),
        "roberta.pooler.dense.bias": torch.zeros(32),
        "roberta.embeddings.position_ids": torch.arange(130)[None],
        "lm_head.bias": torch.zeros(220),
    }
    save_file(state | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(probe(load_model(tmp_path)), probe(model))


def test_names_of_old_checkpoints_are_understood(tmp_path: Path):
    model = tiny("bert")
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    assert set(old) != set(state)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(probe(load_model(tmp_path)), probe(model))


TYPES = ("SequenceClassification", "MaskedLM", "TokenClassification", "QuestionAnswering", "MultipleChoice", "CausalLM")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_a_model_is_loaded_as_what_it_is_or_refused(family: str, kind: str, tmp_path: Path):
    try:
        model = headed(family, f"For{kind}")
    except ValueError:
        pytest.skip("the library has no such model")
    save_model(model, tmp_path)
    own = next((head for head in heads() if head.is_of(type(model).__name__)), None)
    ids = torch.arange(5, 17)[None, None] if kind == "MultipleChoice" else torch.arange(5, 17)[None]
    for name in (None, *(head.name for head in heads() if not head.on_any_body)):
        if own is not None and own.causal and name in (None, own.name):
            # The library makes decoders of encoders; all tokens see each other there, unless config.json says more.
            with pytest.raises(InputError, match="whose tokens see those that come after them"):
                load_model(tmp_path, name)
        elif own is not None and name in (None, own.name):
            loaded = load_model(tmp_path, name)
            assert type(loaded) is type(model)
            with torch.no_grad():
                assert all(torch.equal(loaded(ids)[output], model(ids)[output]) for output in own.outputs)
        else:
            with pytest.raises(InputError, match="kdcli knows a causal" if name is None else "no trained head for"):
                load_model(tmp_path, name)
    # Its body is its own, whatever its head.
    body, state = load_model(tmp_path, "base").state_dict(), model.base_model.state_dict()
    assert body and all(torch.equal(value, state[key]) for key, value in body.items())
