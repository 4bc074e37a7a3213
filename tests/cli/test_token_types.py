"""Pairs of texts whose tokenizer gives types of tokens that the model does not have."""

from pathlib import Path

import pytest
import torch
from conftest import World
from families import NAMES, tiny, tokenizer
from transformers import AutoTokenizer, pipeline

from kdcli.export.session import OnnxModel
from kdcli.models.inputs import model_inputs
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model
from kdcli.tasks.heads import load_model

CLASSES = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}

EXPORT = {"onnx": True, "runs": 1, "batch_sizes": [1], "sequence_lengths": [8], "threads": 1}


@pytest.fixture
def pairs(world: World) -> World:
    """Put pairs of sentences with labels into `pairs.csv`."""
    rows = [("a fine film", "so moving", "yes"), ("a dull film", "the film is fine", "no")] * 12
    world.write("pairs.csv", "a,b,label\n" + "".join(f"{a},{b},{label}\n" for a, b, label in rows))
    return world


def keep(world: World, family: str, **settings: object) -> Path:
    """Put a tiny classifier with the tokenizer of a BERT, which knows two types, into `teacher`."""
    (world.folder / "teacher").mkdir()
    save_model(tiny(family, **CLASSES, **settings), world.folder / "teacher")
    # As others save it: its types with it.
    tokenizer().save_pretrained(world.folder / "teacher")
    return world.folder / "teacher"


def agree(model: Path, graph: Path) -> None:
    """Check that a graph takes a pair as the tokenizer gives it, and says what the model says."""
    words, own, session = load_tokenizer(model), load_model(model), OnnxModel(graph)
    batch = words(["a fine film", "dull"], ["so moving", "the film"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = own(**model_inputs(own, batch)).logits
    feed = {name: batch[name].numpy() for name in session.inputs}
    assert torch.allclose(torch.from_numpy(session.session.run(None, feed)[0]), wanted, atol=1e-4)


@pytest.mark.slow
def test_a_roberta_with_the_tokenizer_of_a_bert_is_scored_distilled_and_exported(pairs: World):
    keep(pairs, "roberta")
    scored = pairs.call("eval", "./teacher", "--data", "pairs.csv", "--text", "a,b", "--json")
    assert scored.code == 0, scored.err
    recipe = pairs.recipe(task={"data": "pairs.csv", "text": ["a", "b"]}, export=EXPORT)
    done = pairs.call("distill", recipe, "--json")
    assert done.code == 0, done.err
    run = pairs.folder / "runs" / "recipe"
    agree(run / "student", run / "onnx")
    assert list(AutoTokenizer.from_pretrained(run / "onnx")("a fine film", "so moving")) == [
        "input_ids",
        "attention_mask",
    ]
    again = pairs.call("eval", run / "onnx", "--json")
    assert again.code == 0, again.err
    assert again.json["score"] == done.json["student"]["score"]


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_without_a_task_the_graph_is_checked_on_pairs_where_there_are_types(family: str, pairs: World):
    folder = keep(pairs, family, **({"type_vocab_size": 2} if family == "deberta-v2" else {}))
    exported = pairs.call("export", "./teacher", "--onnx", "--out", "graph", "--no-latency", "--json")
    assert exported.code == 0, exported.err
    typed = "token_type_ids" in OnnxModel(pairs.folder / "graph").inputs
    assert typed == (family in ("bert", "electra", "deberta-v2"))
    assert ("pairs" in exported.json["parity"]["inputs"]) == typed
    agree(folder, pairs.folder / "graph")


def test_what_is_kept_reads_pairs_in_the_library_alone(pairs: World):
    keep(pairs, "bert", type_vocab_size=1)
    # A fine-tuned teacher is kept in the cache.
    recipe = pairs.recipe(
        task={"data": "pairs.csv", "text": ["a", "b"]},
        teacher={"finetune": {"max_steps": 1}},
    )
    done = pairs.call("distill", recipe, "--json")
    assert done.code == 0, done.err
    run = pairs.folder / "runs" / "recipe"
    assert pairs.call("overparam", run / "student", "--out", "wide", "--length", "1").code == 0
    assert pairs.call("contract", "wide", "--out", "plain").code == 0
    pair = {"text": "a fine film", "text_pair": "so moving"}
    teacher = Path(done.json["teacher_path"])
    for folder in (run / "student", pairs.folder / "plain", teacher):
        assert set(pipeline("text-classification", str(folder))(pair)) == {"label", "score"}
    for folder in (run / "student", pairs.folder / "wide", pairs.folder / "plain", teacher):
        batch = AutoTokenizer.from_pretrained(folder)(pair["text"], pair["text_pair"])
        assert list(batch) == ["input_ids", "attention_mask"]


def test_a_tokenizer_in_use_is_not_changed_by_saving_it(tmp_path: Path):
    words = tokenizer()
    before = words("a fine film", "so moving")
    save_model(tiny("roberta"), tmp_path, words)
    assert dict(words("a fine film", "so moving")) == dict(before)
    assert 1 in before["token_type_ids"]


def test_a_student_with_types_keeps_them_beside_a_teacher_without(pairs: World):
    keep(pairs, "bert", type_vocab_size=1)
    (pairs.folder / "start").mkdir()
    save_model(tiny("bert", **CLASSES), pairs.folder / "start", tokenizer())
    recipe = pairs.recipe(
        "student",
        task={"data": "pairs.csv", "text": ["a", "b"]},
        teacher={"finetune": {"max_steps": 1}},
        student={"form": "checkpoint", "model": "./start"},
    )
    found = []
    for place in ("first", "second"):
        done = pairs.call("distill", recipe, "--output", place)
        assert done.code == 0, done.err
        assert ("fine-tuned before" in done.err) == (place == "second")
        folder = pairs.folder / place / "recipe" / "student"
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("a fine film", "so moving")
    assert found[0] == found[1]


def test_a_type_beyond_the_models_becomes_the_first(pairs: World):
    model = tiny("bert")
    ids = torch.arange(5, 13)[None]
    batch = {"input_ids": ids, "token_type_ids": torch.tensor([[0, 0, 1, 1, 2, 2, 0, 1]]), "labels": torch.zeros(1)}
    taken = model_inputs(model, batch)
    assert set(taken) == {"input_ids", "token_type_ids"}
    assert taken["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0, 0, 1]]
    assert set(model_inputs(tiny("roberta"), batch)) == set(model_inputs(tiny("distilbert"), batch)) == {"input_ids"}
