"""Tokenizers that come as a SentencePiece model alone."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from families import tiny
from transformers import AutoTokenizer

from kdcli.data.reviews import reviews
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model

SPECIAL: dict[str, dict[str, Any]] = {
    "deberta-v2": {
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "bos_piece": "[CLS]",
        "eos_piece": "[SEP]",
        "unk_piece": "[UNK]",
        "pad_piece": "[PAD]",
    },
    "xlm-roberta": {"unk_id": 0, "bos_id": 1, "eos_id": 2},
}
FILES = {"deberta-v2": "spm.model", "xlm-roberta": "sentencepiece.bpe.model"}


@pytest.mark.parametrize("family", sorted(FILES))
def test_a_sentencepiece_model_alone_is_enough(family: str, tmp_path: Path):
    texts = reviews()["train"]["text"][:300]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=150,
        model_type="unigram",
        minloglevel=2,
        num_threads=1,
        **SPECIAL[family],
    )
    save_model(tiny(family), tmp_path)
    (tmp_path / FILES[family]).write_bytes(written.getvalue())
    words = load_tokenizer(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    for text in texts[:20]:
        assert words.tokenize(text) == pieces.encode(text, out_type=str)
    # What is shipped needs no SentencePiece any more.
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    save_model(tiny(family), shipped, words)
    assert (shipped / "tokenizer.json").is_file()
    again = AutoTokenizer.from_pretrained(shipped)
    assert again(texts[:20])["input_ids"] == words(texts[:20])["input_ids"]
    assert again.pad_token_id == words.pad_token_id is not None
