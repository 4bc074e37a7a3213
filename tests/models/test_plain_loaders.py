"""kdcli's own folders in plain transformers: loaded once kdcli is imported, else refused with the package's name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import NAMES, tiny, tokenizer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

from kdcli.models.overparam import overparameterise
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection

IDS = torch.arange(5, 17)[None]
CLASSES = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}


def low_rank(model: PreTrainedModel) -> PreTrainedModel:
    return build_student(model, StudentSection(form="low-rank", rank=8), seed=0).model


@pytest.mark.parametrize("family", NAMES)
def test_a_low_rank_student_loads_through_the_auto_classes_and_a_pipeline(family: str, tmp_path: Path):
    model = low_rank(tiny(family, **CLASSES))
    save_model(model, tmp_path, tokenizer())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(probe(loaded), probe(model))
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state
        assert torch.equal(states, model.base_model(IDS).last_hidden_state)
    texts = ["a fine and moving film", "dull"]
    answers = pipeline("text-classification", str(tmp_path))(texts, top_k=None)
    batch = AutoTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
    batch = {key: value for key, value in batch.items() if key != "token_type_ids" or family in ("bert", "electra")}
    with torch.no_grad():
        wanted = model(**batch).logits.softmax(-1)
    for answer, row in zip(answers, wanted, strict=True):
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(
            {"no": float(row[0]), "yes": float(row[1])}, abs=1e-5
        )


def test_a_masked_language_model_and_its_type_come_back(tmp_path: Path):
    torch.manual_seed(0)
    model = low_rank(AutoModelForMaskedLM.from_config(tiny("bert").config).eval())
    model.config.dtype = torch.bfloat16
    save_model(model, tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    full = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert full.dtype == torch.float32
    torch.testing.assert_close(full(IDS).logits, model(IDS).logits, atol=0.1, rtol=0.1)


def test_chains_load_too_and_the_name_that_earlier_versions_gave(tmp_path: Path):
    model = tiny("bert")
    overparameterise(model, OverparamSection(length=1))
    save_model(model, tmp_path)
    assert torch.equal(probe(AutoModelForSequenceClassification.from_pretrained(tmp_path)), probe(model))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "kdcli"}))
    assert torch.equal(probe(AutoModelForSequenceClassification.from_pretrained(tmp_path)), probe(model))


SCRIPT = """
import json, sys
{first}
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import AutoModelForSequenceClassification, pipeline
print(json.dumps(pipeline("text-classification", sys.argv[1])("a fine film")))
"""


@pytest.mark.parametrize("known", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_in_a_program_of_ones_own(known: bool, tmp_path: Path):
    save_model(low_rank(tiny("bert", **CLASSES)), tmp_path, tokenizer())
    script = SCRIPT.format(first="import kdcli" if known else "")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    if known:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["label"] in ("no", "yes")
    else:
        assert done.returncode == 1
        assert "pip install kdcli, then import kdcli" in done.stderr
