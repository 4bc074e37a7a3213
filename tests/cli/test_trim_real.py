"""kdcli trim with real tokenizers on real text of three languages, and how five others fare."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaConfig,
)

from kdcli.cli.app import run
from kdcli.models.save import save_model

pytestmark = [pytest.mark.slow, pytest.mark.data]

KEPT, OTHERS = ("english", "french", "german"), ("arabic", "hindi", "italian", "portuguese", "spanish")
BODY: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_labels": 3,
}
"""Of the small multilingual encoders, but for their depth."""

MODELS = {
    "multilingual-tokenizer": (
        lambda folder: PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            model_max_length=512,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            cls_token="<s>",
            sep_token="</s>",
            mask_token="<mask>",
        ),
        XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, type_vocab_size=1, **BODY),
    ),
    "gpt2-tokenizer": (
        RobertaTokenizer.from_pretrained,
        BertConfig(vocab_size=50264, pad_token_id=50258, type_vocab_size=1, **BODY),
    ),
    "bert-base-uncased-tokenizer": (AutoTokenizer.from_pretrained, BertConfig(vocab_size=30522, **BODY)),
}


@pytest.fixture
def models_dir(data_dir: Path) -> Path:
    """The folder with real tokenizers, beside that of the data."""
    folder = data_dir.parent / "models"
    if not folder.is_dir():
        pytest.skip("there are no real tokenizers beside the data")
    return folder


def pieces_of(words: Any, texts: list[str]) -> list[list[str]]:
    return [words.convert_ids_to_tokens(row) for row in words(texts)["input_ids"]]


@pytest.mark.parametrize("name", MODELS)
def test_real_text_is_cut_as_before_and_most_of_the_megabytes_go(
    name: str, tmp_path: Path, data_dir: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
):
    load, config = MODELS[name]
    words = load(models_dir / name)
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    save_model(AutoModelForSequenceClassification.from_config(config), tmp_path / "model", words)
    tweets = data_dir / "tweet_sentiment"
    text = [part for language in KEPT for part in ("--text", str(tweets / language / "train.parquet"))]
    apart = [part for language in OTHERS for part in ("--held-out", str(tweets / language / "test.parquet"))]
    capsys.readouterr()
    assert run(["trim", str(tmp_path / "model"), *text, *apart, "--out", str(tmp_path / "small"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    corpus = [
        line
        for language in KEPT
        for line in pyarrow.parquet.read_table(tweets / language / "train.parquet")["text"].to_pylist()
    ]
    assert len(corpus) == report["texts"] > 5000
    assert pieces_of(small, corpus) == pieces_of(words, corpus)
    assert report["left_out"] is None and report["max_abs_difference"] <= 1e-5
    assert 0 < report["held_out"]["changed_share"] < 1
    before, after = report["vocabulary_megabytes"]
    assert after < 0.35 * before
    if name == "multilingual-tokenizer":
        assert report["pieces"][0] == 250002 and report["pieces"][1] < 20000 and after < 0.08 * before
