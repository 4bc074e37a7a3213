"""Models with fewer pieces: in every family, with every head, the outputs for the same text stay."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import NAMES, tiny, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kdcli.data.reviews import reviews
from kdcli.errors import RunError
from kdcli.models.counts import count_parameters
from kdcli.models.lowrank import factorise
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer
from kdcli.models.vocabulary import Trimming, check_outputs, trim_vocabulary, trimmed, vocabulary_megabytes
from kdcli.recipe.schema import StudentSection
from kdcli.tasks.heads import load_model

TEXTS: list[str] = reviews()["train"]["text"]
CORPUS = TEXTS[:20]
ROWS = 220
"""Rows of the embeddings of tiny models: more than their tokenizer has pieces, and no other size of theirs."""


def masked_lm(family: str, **extra: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny(family, **extra).config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at zero, which any row of theirs would give.
            if parameter.shape == (ROWS,):
                parameter.normal_()
            elif "word_embeddings" in name or "tok_embeddings" in name:
                parameter.mul_(4.0)
    return model


def trim(model: PreTrainedModel, words: Any, **options: Any) -> tuple[PreTrainedModel, Trimming]:
    trimming = trim_vocabulary(words, model.config, CORPUS, **options)
    return trimmed(model, trimming.kept), trimming


@torch.inference_mode()
def logits(model: PreTrainedModel, words: Any, texts: list[str] = CORPUS) -> torch.Tensor:
    """Return a model's first output by the library's own call of tokenizer and model."""
    batch = words(texts, padding=True, return_tensors="pt")
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]


@pytest.mark.parametrize("family", NAMES)
def test_outputs_stay_in_every_family(family: str, tmp_path: Path):
    words = tokenizer()
    for model in (tiny(family), masked_lm(family)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        small, trimming = trim(model, words)
        assert ROWS not in {length for tensor in small.state_dict().values() for length in tensor.shape}
        old, new = logits(model, words), logits(small, trimming.tokenizer)
        if old.shape != new.shape:
            old = old[..., torch.from_numpy(trimming.kept)]
        assert torch.allclose(old, new, atol=1e-5)
        # The model itself is as it was, and what stays tied is one tensor.
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        row = count_parameters(model) - count_parameters(small)
        assert row % (ROWS - len(trimming.kept)) == 0
        folder = tmp_path / type(model).__name__
        folder.mkdir()
        save_model(small, folder, trimming.tokenizer)
        assert torch.equal(logits(load_model(folder), AutoTokenizer.from_pretrained(folder)), new)
        config = load_model(folder).config
        assert config.vocab_size == len(trimming.kept)
        named = {key: value for key, value in model.config.to_dict().items() if key.endswith("_token_id")}
        for key, value in named.items():
            if value is not None and value < ROWS:
                assert trimming.kept[getattr(config, key)] == value


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_positions_stay_where_they_count_from_the_padding_token(family: str):
    words = train_tokenizer(TEXTS[:200], 200, padding=1)
    model = tiny(family, pad_token_id=1)
    small, trimming = trim(model, words)
    assert small.config.pad_token_id == trimming.tokenizer.pad_token_id == 1
    assert torch.allclose(logits(model, words), logits(small, trimming.tokenizer), atol=1e-6)


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_what_stands_before_the_padding_token_stays(family: str):
    # Positions are counted from its number on, whatever is below it, and in no text.
    own = list(tokenizer().get_vocab())
    pieces = ["qqqq", "[PAD]", *(piece for piece in own if piece != "[PAD]")]
    made = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    model = tiny(family, pad_token_id=1, bos_token_id=None, eos_token_id=None)
    small, trimming = trim(model, words)
    assert "qqqq" in trimming.tokenizer.get_vocab() and trimming.tokenizer.pad_token_id == 1
    assert torch.allclose(logits(model, words), logits(small, trimming.tokenizer), atol=1e-6)


@pytest.mark.parametrize("rank", [None, 8])
def test_a_padding_token_behind_all_others_moves(rank: int | None):
    words = tokenizer()
    words.add_special_tokens({"pad_token": "<padding>"})
    model = tiny("bert", pad_token_id=words.pad_token_id)
    if rank is not None:
        factorise(model, StudentSection(form="low-rank", rank=4, embedding_rank=rank))
    small, trimming = trim(model, words)
    assert small.config.pad_token_id == trimming.tokenizer.pad_token_id == len(trimming.kept) - 1
    table = small.get_input_embeddings()
    assert table.padding_idx == getattr(table, "down", table).padding_idx == len(trimming.kept) - 1
    assert table.num_embeddings == getattr(table, "down", table).num_embeddings == len(trimming.kept)
    assert torch.allclose(logits(model, words), logits(small, trimming.tokenizer), atol=1e-6)


def test_factors_of_embeddings_and_their_output_layer_shrink():
    model, words = masked_lm("bert", hidden=32), tokenizer()
    factorise(model, StudentSection(form="low-rank", rank=4, embedding_rank=8))
    small, trimming = trim(model, words)
    old = logits(model, words)[..., torch.from_numpy(trimming.kept)]
    assert torch.allclose(old, logits(small, trimming.tokenizer), atol=1e-5)
    assert count_parameters(model) - count_parameters(small) == (ROWS - len(trimming.kept)) * (8 + 1)


def test_an_output_layer_that_is_given_the_embeddings_shrinks():
    model, words = masked_lm("deberta-v2", legacy=False), tokenizer()
    small, trimming = trim(model, words)
    assert ROWS not in {length for tensor in small.state_dict().values() for length in tensor.shape}
    old = logits(model, words)[..., torch.from_numpy(trimming.kept)]
    assert torch.allclose(old, logits(small, trimming.tokenizer), atol=1e-5)


def test_an_output_layer_of_its_own_shrinks_beside_the_embeddings(tmp_path: Path):
    model, words = masked_lm("bert", tie_word_embeddings=False), tokenizer()
    small, trimming = trim(model, words)
    old = logits(model, words)[..., torch.from_numpy(trimming.kept)]
    assert torch.allclose(old, logits(small, trimming.tokenizer), atol=1e-5)
    assert count_parameters(model) - count_parameters(small) == (ROWS - len(trimming.kept)) * (32 + 32 + 2)
    assert vocabulary_megabytes(small) == round(len(trimming.kept) * 66 * 4 / 1e6, 3)
    # Where nothing is tied, the head has a second bias, which its layer does not use.
    assert ROWS not in {length for tensor in small.state_dict().values() for length in tensor.shape}
    save_model(small, tmp_path, trimming.tokenizer)
    assert torch.equal(logits(load_model(tmp_path), trimming.tokenizer), logits(small, trimming.tokenizer))


def test_a_head_of_the_same_size_as_the_vocabulary_keeps_its_rows():
    config = tiny("bert", labels=ROWS).config
    model, words = AutoModelForTokenClassification.from_config(config).eval(), tokenizer()
    small, trimming = trim(model, words)
    assert small.classifier.weight.shape == (ROWS, 32)
    assert torch.allclose(logits(model, words), logits(small, trimming.tokenizer), atol=1e-6)


def test_a_wrong_row_is_noticed():
    model, words = tiny("bert"), tokenizer()
    small, trimming = trim(model, words)
    both = (words, trimming.tokenizer)
    assert check_outputs(model, small, both, CORPUS, trimming.kept, ["logits"]) <= 1e-5
    wrong = trimming.kept.copy()
    wrong[-1] += 1
    with pytest.raises(RunError, match="changes the outputs"):
        check_outputs(model, trimmed(model, np.roll(wrong, 1)), both, CORPUS, trimming.kept, ["logits"])


def test_what_is_told_of_text():
    model, words = tiny("bert"), tokenizer()
    _, trimming = trim(model, words)
    assert trimming.left_out is None and trimming.held_out is not None
    assert trimming.held_out.texts == 2
    notes = "\n".join(trimming.notes)
    assert f"{len(trimming.kept)} of {len(words)} pieces stay, from 20 texts" in notes
    assert f"{ROWS - len(words)} rows of embeddings without a piece: left out" in notes
    assert "of every 10th text" in notes
    _, trimming = trim(model, words, held_out=TEXTS[300:400], keep=95, characters=False)
    assert trimming.held_out is not None and trimming.held_out.texts == 100
    assert trimming.left_out is not None and 0 < trimming.left_out.changed_texts < 20
    # Only what is read as before can be compared: whole texts, and parts of the others.
    assert len(trimming.sample) == 20 - trimming.left_out.changed_texts
    assert len(trimming.parts) == trimming.left_out.changed_texts
    assert re.search(r"of the held-out text, \d+\.\d\d% of .* words are cut otherwise", "\n".join(trimming.notes))
