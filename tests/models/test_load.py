"""Model folders: what is saved comes back to the bit, and what cannot be loaded says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import NAMES, matrices, tiny, tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BloomConfig,
    BloomForSequenceClassification,
    PreTrainedModel,
)

from kdcli.errors import InputError
from kdcli.models.heads import BASE
from kdcli.models.load import check_tokenizer, has_head, load_tokenizer
from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear
from kdcli.models.overparam import overparameterise
from kdcli.models.probe import probe
from kdcli.models.save import save_model, structure_of
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tasks.classification import KIND as LABELS
from kdcli.tasks.heads import load_model
from kdcli.tasks.labels import class_names_of
from kdcli.tasks.text_inputs import SEQUENCE_CLASSIFICATION as CLASSIFIER
from kdcli.tensors.parametrization import is_overparameterised

NAMED = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}


def low_rank(model: PreTrainedModel, **sizes: object) -> PreTrainedModel:
    section = StudentSection(form="low-rank", **(sizes or {"rank": 8}))  # type: ignore[arg-type]
    return build_student(model, section, seed=0).model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT with its tokenizer."""
    save_model(tiny("bert"), tmp_path, tokenizer())
    return tmp_path


@pytest.mark.parametrize("family", NAMES)
def test_a_plain_model_comes_back_to_the_bit(family: str, tmp_path: Path):
    model = tiny(family, labels=3, problem_type="single_label_classification", **NAMED)
    save_model(model, tmp_path)
    assert structure_of(model) == {}
    loaded = load_model(tmp_path)
    assert not loaded.training and type(loaded) is type(model)
    assert torch.equal(probe(loaded), probe(model))
    assert class_names_of(loaded.config) == ["no", "yes", "maybe"]
    assert loaded.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("family", NAMES)
def test_a_low_rank_model_comes_back_to_the_bit(family: str, tmp_path: Path):
    model = low_rank(tiny(family, labels=3, **NAMED), rank=8, embedding_rank=6)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert sum(isinstance(m, LowRankLinear) for m in loaded.modules()) == matrices(family)
    assert sum(isinstance(m, LowRankEmbedding) for m in loaded.modules()) == 1
    assert torch.equal(probe(loaded), probe(model)) and not loaded.training
    assert class_names_of(loaded.config) == ["no", "yes", "maybe"]
    assert loaded.config.model_type == family
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("family", NAMES)
def test_an_over_parameterised_model_comes_back_to_the_bit(family: str, tmp_path: Path):
    model = tiny(family, labels=3, **NAMED)
    overparameterise(model, OverparamSection(length=1))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert is_overparameterised(loaded)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(probe(loaded), probe(model))
    assert class_names_of(loaded.config) == ["no", "yes", "maybe"]


def test_chains_of_low_rank_factors_come_back_to_the_bit(tmp_path: Path):
    model = low_rank(tiny("bert"))
    overparameterise(model, OverparamSection(length=1))
    save_model(model, tmp_path)
    assert torch.equal(probe(load_model(tmp_path)), probe(model))


def test_saving_what_was_loaded_writes_the_same_files(tmp_path: Path):
    for name, model in (("plain", tiny("bert")), ("low-rank", low_rank(tiny("bert")))):
        first, second = tmp_path / name, tmp_path / f"{name}-again"
        first.mkdir()
        second.mkdir()
        save_model(model, first)
        save_model(load_model(first), second)
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
        assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())


def test_half_precision_weights_are_loaded_as_fp32(tmp_path: Path):
    model = tiny("bert").to(torch.bfloat16)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_a_base_model_gets_a_new_head_of_the_wanted_size_only_where_one_is_asked_for(tmp_path: Path):
    model = tiny("bert")
    save_model(model.bert, tmp_path)
    assert not has_head(tmp_path, CLASSIFIER)
    with pytest.raises(InputError, match=r"no trained head for classifying texts \(it is a base model\)"):
        load_model(tmp_path, CLASSIFIER.name)
    torch.manual_seed(0)
    loaded = load_model(tmp_path, CLASSIFIER.name, new_head=LABELS.configure(["a", "b", "c"]))
    assert loaded.classifier.weight.shape == (3, 32) and class_names_of(loaded.config) == ["a", "b", "c"]
    state = model.bert.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.bert.state_dict().items())
    bare = load_model(tmp_path)
    assert bare.base_model is bare and bare.config.model_type == "bert"


def test_a_trained_head_is_kept_and_replaced_only_where_a_new_one_is_asked_for(folder: Path):
    assert has_head(folder, CLASSIFIER)
    assert torch.equal(probe(load_model(folder)), probe(tiny("bert")))
    for labels in (2, 5):
        new = load_model(folder, CLASSIFIER.name, new_head={"num_labels": labels})
        assert new.classifier.weight.shape == (labels, 32)
        assert torch.equal(new.bert.pooler.dense.weight, tiny("bert").bert.pooler.dense.weight)
        assert not torch.equal(new.classifier.weight[:2], tiny("bert").classifier.weight)
    with pytest.raises(ValueError, match="which head is the new one"):
        load_model(folder, new_head={"num_labels": 5})


def test_the_real_encoder_loads_and_is_no_classifier(encoder: Path):
    assert not has_head(encoder, CLASSIFIER)
    assert type(load_model(encoder)).__name__ == "BertForSentenceEmbedding"
    model = load_model(encoder, BASE.name)
    reference = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    inputs = load_tokenizer(encoder)(["a small test of a real model"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, reference(**inputs).last_hidden_state)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut_in_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_config(**values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return apply


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("config.json"), r"has no config\.json"),
        (overwrite("config.json", b"{"), r"config\.json is not valid JSON"),
        (overwrite("config.json", b"\xff\xfe"), r"config\.json is not valid JSON"),
        (overwrite("config.json", b"[]"), "names no model_type"),
        (overwrite("config.json", b"{}"), "names no model_type"),
        (change_config(model_type="bloom"), "unknown family 'bloom'; known are albert, "),
        (remove("model.safetensors"), r"has no model\.safetensors"),
        (only_a_pickle, r"only as a pickle \(pytorch_model\.bin\)"),
        (overwrite("model.safetensors", b""), "not a readable safetensors file"),
        (overwrite("model.safetensors", b"\x00" * 64), "not a readable safetensors file"),
        (cut_in_half, "not a readable safetensors file"),
        (change_weights(lambda state: state.pop(QUERY)), rf"is missing 1 weight \(first: {QUERY}\)"),
        (change_weights(dict.clear), r"says 2 blocks \(num_hidden_layers\), the file holds 0"),
        (change_weights(lambda state: state.pop("bert.embeddings.LayerNorm.bias")), "is missing 1 weight "),
        (change_weights(lambda state: state.update({QUERY: torch.zeros(8, 8)})), "is 8 x 8, and 32 x 32 by its config"),
        (
            change_config(hidden_size=48, intermediate_size=96),
            "48.* by its config",
        ),
        (change_config(num_hidden_layers=3), r"config\.json says 3 blocks .*, the file holds 2"),
        (change_config(num_hidden_layers=1), r"has 16 weights \(first: bert.encoder.layer.1.* no place"),
        (change_weights(lambda state: state.update(extra=torch.zeros(3))), r"has 1 weight \(first: extra\)"),
        (change_weights(lambda state: state.pop("bert.pooler.dense.weight")), "is missing 1 weight .*pooler"),
        (change_weights(lambda state: state.pop("classifier.bias")), "is missing 1 weight .*classifier.bias"),
        (change_weights(lambda state: state.pop("classifier.weight")), "is missing 1 weight .*classifier.weight"),
        (change_config(id2label={"0": "a", "1": "b", "2": "c"}), "weights have 2 outputs .*, config.json says 3"),
        (change_config(id2label=["no", "yes"]), "id2label is an array"),
        (change_config(id2label={"0": "no", "2": "yes"}), "does not number the classes from 0"),
        (change_config(num_attention_heads=5), "hidden_size 32 is not divisible by num_attention_heads 5"),
        (change_config(num_hidden_layers="two"), r"config\.json: num_hidden_layers is 'two'"),
        (change_config(num_attention_heads=0), r"config\.json: num_attention_heads is 0"),
        (change_config(model_type=["bert"]), "model_type"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(folder: Path, spoil: Callable[[Path], object], words: str):
    spoil(folder)
    with pytest.raises(InputError, match=words):
        load_model(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_in_half, "not a readable safetensors file"),
        (change_weights(lambda state: state.pop(QUERY.replace(".weight", ".up.weight"))), "is missing 1 weight "),
        (change_weights(lambda state: state.update(other=torch.zeros(1))), "has 1 weight .* no place"),
        (change_config(hidden_size=48), "by its config"),
        (change_config(kdcli={"base_model_type": "bloom"}), "family 'bloom'"),
        (change_config(kdcli={}), "family 'kdcli'"),
        (change_config(kdcli=None), "family 'kdcli'"),
        (change_config(kdcli={"base_model_type": ["bert"]}), "unknown family"),
        (change_config(kdcli={"base_model_type": "bert", "low_rank": [1]}), "cannot be restored"),
        (change_config(kdcli={"base_model_type": "bert", "low_rank": {"bert.nothing": 3}}), "cannot be restored"),
        (
            change_config(kdcli={"base_model_type": "bert", "low_rank": {QUERY.removesuffix(".weight"): 2**31}}),
            "says rank 2147483648",
        ),
        (change_config(kdcli={"base_model_type": "bert"}), "is missing 24 weights"),
    ],
)
def test_a_broken_low_rank_folder_says_what_is_wrong(tmp_path: Path, spoil: Callable[[Path], object], words: str):
    save_model(low_rank(tiny("bert")), tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=words):
        load_model(tmp_path)


def test_weights_in_several_files_are_read_and_a_missing_one_is_noticed(tmp_path: Path):
    model = tiny("bert")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(probe(load_model(tmp_path)), probe(model))
    shards[-1].unlink()
    with pytest.raises(InputError):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no model folder at"),
        ("/no/such/folder", "no model folder at"),
        ("~/no/such/folder", "no model folder at"),
        ("a/b/c", "no model folder at"),
        ("owner/no-such-model", "there is no such folder"),
        ("no spaces allowed", "neither a folder nor a hub name"),
    ],
)
def test_a_model_that_is_not_there_is_an_input_error(name: str, words: str):
    for load in (load_model, load_tokenizer, lambda name: has_head(name, BASE)):
        with pytest.raises(InputError, match=words):
            load(name)


def test_a_file_is_no_model(folder: Path):
    with pytest.raises(InputError, match="is a file; a model is a folder"):
        load_model(folder / "config.json")


def test_a_model_of_an_unknown_family_is_refused_with_the_way_to_add_one(tmp_path: Path):
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    BloomForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"known are albert, .*bert, camembert") as caught:
        load_model(tmp_path)
    assert caught.value.hint is not None and "kdcli.families" in caught.value.hint


@pytest.mark.parametrize("structured", [False, True])
def test_a_tokenizer_comes_back_with_the_model(structured: bool, tmp_path: Path):
    model, words = tiny("bert"), tokenizer()
    save_model(low_rank(model) if structured else model, tmp_path, words)
    loaded = load_tokenizer(tmp_path)
    texts = ["the film was not at all dull", "Ein Wort, das es nicht gibt"]
    assert dict(loaded(texts)) == dict(words(texts))
    assert (loaded.pad_token_id, loaded.sep_token) == (words.pad_token_id, words.sep_token)
    assert len(loaded) == len(words)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer files") as caught:
        load_tokenizer(folder)
    assert caught.value.hint is not None and "teacher.tokenizer" in caught.value.hint


@pytest.mark.parametrize("structured", [False, True])
def test_a_broken_tokenizer_is_an_input_error(structured: bool, folder: Path):
    if structured:
        save_model(low_rank(tiny("bert")), folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused():
    words = tokenizer()
    check_tokenizer(tiny("bert", vocab_size=len(words)), words)
    with pytest.raises(InputError, match=f"{len(words)} tokens, but the model has embeddings for {len(words) - 1}"):
        check_tokenizer(tiny("bert", vocab_size=len(words) - 1), words)
    words.add_tokens(["[EXTRA]"])
    with pytest.raises(InputError) as caught:
        check_tokenizer(tiny("bert", vocab_size=len(words) - 1), words)
    assert caught.value.where == "teacher.tokenizer"


def test_a_tokenizer_without_padding_is_refused():
    words = tokenizer()
    words.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        check_tokenizer(tiny("bert"), words)


def test_moving_a_folder_does_not_matter(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    moved = tmp_path_factory.mktemp("moved") / "with spaces and ü"
    shutil.copytree(folder, moved)
    assert torch.equal(probe(load_model(moved)), probe(tiny("bert")))
    assert torch.equal(probe(load_model(str(moved))), probe(tiny("bert")))


def test_a_weight_of_a_layer_that_a_model_has_nothing_in_place_of_is_refused(tmp_path: Path):
    # The first block's norm of a ModernBERT is an identity: with a weight for it the file is another model's.
    save_model(tiny("modernbert"), tmp_path)
    change_weights(lambda state: state.update({"model.layers.0.attn_norm.weight": torch.full((32,), 3.0)}))(tmp_path)
    with pytest.raises(InputError, match=r"has 1 weight \(first: model.layers.0.attn_norm.weight\) .* no place"):
        load_model(tmp_path)
