"""The ONNX graph of a model of sentence embeddings: the pooled vector, for any batch and length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, tiny, tokenizer

from kdcli.export.export import export_model
from kdcli.export.graph import export_onnx
from kdcli.export.session import OnnxModel
from kdcli.models.embedding import ASSUMED, POOLING, append_dense, settings_of
from kdcli.models.heads import SENTENCE_EMBEDDING, head_of, with_new_head
from kdcli.models.inputs import model_inputs
from kdcli.models.load import load_model, load_tokenizer
from kdcli.models.sentence_folder import longest_text, prompt_of

TEXTS = ["so dull", "a film that is far better than one might think, with great actors", "not at all a bad one", "no"]


def embedder(family: str, **settings: Any) -> Any:
    """Return a tiny model of sentence embeddings."""
    return with_new_head(tiny(family), SENTENCE_EMBEDDING, {"sentence_embedding": {**ASSUMED, **settings}})


def worst(model: Any, folder: Path) -> float:
    """Return the largest difference of the graph's embeddings on batches of several shapes."""
    session, found = OnnxModel(folder), 0.0
    assert session.outputs == ["sentence_embedding"]
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:2] * 3):
        batch = model_inputs(model, dict(tokenizer()(texts, padding=True, return_tensors="pt")))
        with torch.inference_mode():
            ours = model(**batch).sentence_embedding
        graph = session(**batch).sentence_embedding
        assert graph.shape == ours.shape
        found = max(found, float((graph - ours).abs().max()))
    return found


@pytest.mark.parametrize("family", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "bert")])
def test_the_graph_of_every_family_gives_its_embeddings(family: str, tmp_path: Path):
    model = embedder(family, prompts={"all": "find: "}, default_prompt_name="all", max_seq_length=9)
    append_dense(model, torch.randn(24, 32, generator=torch.Generator().manual_seed(0)) / 6, normalize=True)
    export_onnx(model, tokenizer(), tmp_path, outputs=SENTENCE_EMBEDDING.outputs)
    assert worst(model, tmp_path) < 1e-5
    # What a graph is and how its texts are read stands beside it.
    assert head_of(OnnxModel(tmp_path), [SENTENCE_EMBEDDING]) == SENTENCE_EMBEDDING
    assert settings_of(OnnxModel(tmp_path)) == settings_of(model)
    read = load_tokenizer(tmp_path)
    assert (prompt_of(read), longest_text(read, 100)) == ("find: ", 9)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.slow) for mode in POOLING if mode != "mean"])
def test_every_pooling_is_in_the_graph(mode: str, tmp_path: Path):
    model = embedder("bert", pooling=[mode])
    export_onnx(model, tokenizer(), tmp_path, outputs=SENTENCE_EMBEDDING.outputs)
    assert worst(model, tmp_path) < 1e-5


@pytest.mark.slow
def test_the_real_model_is_exported_with_parity_and_latency(encoder: Path, tmp_path: Path):
    model, words = load_model(encoder, SENTENCE_EMBEDDING), load_tokenizer(encoder)
    result = export_model(model, words, tmp_path / "onnx", task=None, runs=1, teacher=model, batch_sizes=(1,))
    assert result.difference < 1e-5
    assert result.latency is not None and len(result.latency.rows) == 8
