"""Parameter counts of published models to the last digit, from configurations alone."""

import pytest
import torch
from families import NAMES, tiny
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from kdcli.models.blocks import blocks_of, iter_block_matrices
from kdcli.models.counts import count_parameters
from kdcli.models.families import FAMILIES

TOTALS = [
    ("BERT-base", BertConfig(), 109_482_240),
    ("BERT-base, 6 blocks", BertConfig(num_hidden_layers=6), 66_955_008),
    ("BERT-base, 4 blocks", BertConfig(num_hidden_layers=4), 52_779_264),
    (
        "TinyBERT-4",
        BertConfig(num_hidden_layers=4, hidden_size=312, num_attention_heads=12, intermediate_size=1200),
        14_350_248,
    ),
    (
        "MiniLM 6 x 384",
        BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536),
        22_713_216,
    ),
    (
        "MiniLM 12 x 384",
        BertConfig(num_hidden_layers=12, hidden_size=384, num_attention_heads=12, intermediate_size=1536),
        33_360_000,
    ),
    ("DistilBERT", DistilBertConfig(), 66_362_880),
    (
        "RoBERTa-base",
        RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1),
        124_645_632,
    ),
    (
        "XLM-RoBERTa-base",
        XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1),
        278_043_648,
    ),
    ("GPT-2", GPT2Config(), 124_439_808),
    ("GPT-2 medium", GPT2Config(n_embd=1024, n_layer=24, n_head=16), 354_823_168),
    ("GPT-2 large", GPT2Config(n_embd=1280, n_layer=36, n_head=20), 774_030_080),
    ("GPT-2 XL", GPT2Config(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
]


@pytest.mark.parametrize(("config", "total"), [row[1:] for row in TOTALS], ids=[row[0] for row in TOTALS])
def test_published_models_have_their_published_counts(config: PretrainedConfig, total: int):
    with torch.device("meta"):
        assert count_parameters(AutoModel.from_config(config)) == total


def block_weights(model: PreTrainedModel) -> int:
    return sum(matrix.weight.numel() for _, matrix in iter_block_matrices(model))


def test_the_parts_of_bert_base():
    with torch.device("meta"):
        model = AutoModel.from_config(BertConfig())
    assert count_parameters(model.embeddings) == 23_837_184
    assert {count_parameters(block) for block in blocks_of(model)} == {7_087_872}
    assert count_parameters(model.pooler) == 590_592
    assert block_weights(model) == 12 * 7_077_888


@pytest.mark.parametrize("family", NAMES)
def test_block_weights_of_every_family(family: str):
    row = FAMILIES[family]
    block = 4 * 32 * 32 + (2 if row.ffn_gate is None else 3) * 32 * 64
    assert block_weights(tiny(family, layers=3)) == (1 if row.repeated else 3) * block


def test_a_tied_weight_counts_once_and_a_frozen_one_is_not_trainable():
    model = tiny("bert")
    count, table = count_parameters(model), model.bert.embeddings.word_embeddings.weight
    first, second = blocks_of(model)
    second.output.dense.weight = first.output.dense.weight
    assert count_parameters(model) == count - 32 * 64
    table.requires_grad_(False)
    assert count_parameters(model, trainable_only=True) == count - 32 * 64 - 220 * 32
