"""What kinds of tasks answer to examples without gold answers: the same as they are scored by, in words and numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from families import tiny, tokenizer
from transformers import AutoModelForMaskedLM

from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.errors import InputError
from kdcli.tasks import registry
from kdcli.tasks.predict import predict

TEXTS = ["a fine film", "a dull film , and so long", "dark"]


def replies(kind: Any, model: Any, texts: dict[str, list[str]], *, top: int | None = None) -> list[dict[str, Any]]:
    fields = kind.fields(text=list(texts) if len(texts) > 1 else next(iter(texts)))
    columns = {name: Column.of(values) for name, values in texts.items()}
    rows = dataset_of(kind.read_inputs(columns, fields, "here", []))
    return kind.replies(model, rows, tokenizer(), top=top, max_length=32, ask=predict)


def logits(model: Any, *texts: str) -> np.ndarray:
    with torch.no_grad():
        return model(**tokenizer()(*texts, return_tensors="pt")).logits[0].double().numpy()


def test_a_classifier_answers_its_label_with_the_probability_of_it():
    kind, model = registry.get("classification"), tiny("bert", labels=3, id2label={0: "no", 1: "so", 2: "yes"})
    found = replies(kind, model, {"text": TEXTS}, top=9)
    for text, reply in zip(TEXTS, found, strict=True):
        shares = torch.softmax(torch.tensor(logits(model, text)), -1)
        assert reply["label"] == ["no", "so", "yes"][int(shares.argmax())]
        assert reply["probability"] == pytest.approx(float(shares.max()), abs=1e-6)
        assert [entry["label"] for entry in reply["top"]] == [["no", "so", "yes"][i] for i in shares.argsort().flip(0)]
        assert sum(entry["probability"] for entry in reply["top"]) == pytest.approx(1.0)
    plain = replies(kind, model, {"text": TEXTS})
    assert plain == [{key: reply[key] for key in ("label", "probability")} for reply in found]
    assert kind.show(plain[0]) == f"{plain[0]['label']} {plain[0]['probability']:.3f}"
    assert kind.beside(plain[0], found[0]) == {"agree": True}


def test_a_pair_is_read_as_a_pair_and_in_its_order():
    kind, model = registry.get("regression"), tiny("bert", labels=1)
    [one, other] = (replies(kind, model, {"a": [x], "b": [y]}) for x, y in (TEXTS[:2], TEXTS[1::-1]))
    assert one == [{"score": pytest.approx(float(logits(model, *TEXTS[:2])[0]), abs=1e-6)}]
    assert other == [{"score": pytest.approx(float(logits(model, *TEXTS[1::-1])[0]), abs=1e-6)}]
    assert kind.beside(one[0], other[0]) == {"difference": one[0]["score"] - other[0]["score"]} != {"difference": 0.0}


def test_several_labels_are_those_from_the_models_own_thresholds():
    kind = registry.get("multi-label")
    settings: Any = {"id2label": {0: "joy", 1: "fear", 2: "anger"}, "problem_type": "multi_label_classification"}
    model = tiny("bert", labels=3, **settings)
    shares = 1 / (1 + np.exp(-logits(model, TEXTS[0])))
    model.config.kdcli_thresholds = [shares[0] - 1e-3, shares[1] + 1e-3, shares[2] - 1e-3]
    [reply] = replies(kind, model, {"text": TEXTS[:1]}, top=2)
    assert reply["labels"] == ["joy", "anger"]
    assert reply["probabilities"] == pytest.approx([shares[0], shares[2]], abs=1e-6)
    assert [entry["probability"] for entry in reply["top"]] == pytest.approx(sorted(shares)[:0:-1], abs=1e-6)
    model.config.kdcli_thresholds = [1.0, 1.0, 1.0]
    assert kind.show(replies(kind, model, {"text": TEXTS[:1]})[0]) == "(no label)"


def near(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply to compare with, whose probabilities may be a little different."""
    shares = pytest.approx(reply["probabilities"], abs=1e-6)
    top = [{**entry, "probability": pytest.approx(entry["probability"], abs=1e-6)} for entry in reply["top"]]
    return {**reply, "probabilities": shares, "top": top}


def test_a_masked_language_model_answers_the_words_at_the_masks():
    torch.manual_seed(0)
    kind, words = registry.get("text"), tokenizer()
    model = AutoModelForMaskedLM.from_config(tiny("bert").config).eval()
    texts = ["a [MASK] film , so [MASK]", "the [MASK]", "[MASK] ."] * 4
    found = replies(kind, model, {"text": texts}, top=2)
    for text, reply in zip(texts, found, strict=True):
        inputs = words(text.replace("[MASK]", words.mask_token), return_tensors="pt")
        with torch.no_grad():
            shares = model(**inputs).logits[inputs["input_ids"] == words.mask_token_id].softmax(-1)
        assert reply["probabilities"] == pytest.approx(shares.max(-1).values.tolist(), abs=1e-6)
        assert reply["words"] == [words.decode([i]) for i in shares.argmax(-1).tolist()]
        assert [entry["mask"] for entry in reply["top"]] == sorted([1, 2][: len(shares)] * 2)
        filled = text
        for word in reply["words"]:
            filled = filled.replace("[MASK]", word, 1)
        assert reply["text"] == filled
    assert len(set(found[0]["words"])) == 2 and found[9:] == [near(reply) for reply in found[:3]]
    with pytest.raises(InputError, match=r"no \[MASK\] within 32 tokens of 'a film'"):
        replies(kind, model, {"text": ["a film"]})


def test_rows_need_no_gold_answers_and_lose_them_where_they_have_some():
    kind = registry.get("classification")
    columns = {"text": Column.of(TEXTS), "label": Column.of(["x", None, "y"])}
    rows = kind.read_inputs(columns, kind.fields(), "here", [])
    assert rows.column_names == ["text"] and "labels" not in kind.encode(dataset_of(rows), tokenizer(), 16).column_names
    with pytest.raises(InputError, match="here: 1 row without text, the first is row 2"):
        kind.read_inputs({"text": Column.of(["a", " "])}, kind.fields(), "here", [])
