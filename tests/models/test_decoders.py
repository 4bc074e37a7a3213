"""Decoders: captured signals are the library's own, and a model survives every change of its matrices' form."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdcli.models.blocks import block_matrix, blocks_of, iter_block_matrices
from kdcli.models.capture import Capture
from kdcli.models.families import FAMILIES, family_of
from kdcli.models.fused import merge_split
from kdcli.models.heads import CAUSAL_LM
from kdcli.models.load import load_model
from kdcli.models.lowrank import LowRankLinear, merge_low_rank
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.objectives.attention import AttentionObjective
from kdcli.objectives.base import common_window, masked_log_softmax, own_keys
from kdcli.objectives.relation import RelationObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import Request, Signals
from kdcli.tasks.causal_lm import KIND

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DECODERS},
    "opt with narrow embeddings and no final norm": (
        "opt",
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2 without a feed-forward size": ("gpt2", {"n_inner": None, "scale_attn_by_inverse_layer_idx": True}),
    "llama with biases, untied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
}
"""Families, and what of them depends on a setting."""


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, settings = VARIANTS[request.param]
    return tiny(family, **settings)


def batch(rows: int = 3, width: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids with padding of different lengths at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, width - 2 * row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


REAL = batch()["attention_mask"].bool()


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """Return the logits of all real tokens, (n, vocabulary)."""
    logits: Tensor = model(**batch()).logits
    return logits[REAL]


def signals_of(model: PreTrainedModel, request: Request) -> Signals:
    capture = Capture(model, request, KIND)
    try:
        with torch.no_grad(), capture:
            return capture.run(batch())
    finally:
        capture.close()


def all_of(model: PreTrainedModel) -> Request:
    """Return the request for all hidden states, queries, keys and values."""
    blocks = range(1, shape_of(model.config).layers + 1)
    names = ("query", "key", "value")
    return Request(hidden=frozenset((0, *blocks)), matrices=frozenset((k, name) for k in blocks for name in names))


def state_of(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...]]]:
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose attention weights the library gives."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


def test_hidden_states_are_the_librarys_own(model: PreTrainedModel) -> None:
    with torch.no_grad():
        theirs = model(**batch(), output_hidden_states=True).hidden_states
    ours = signals_of(model, all_of(model)).hidden
    # After its last block the library maps states to the width of narrow embeddings, where kdcli compares blocks.
    for layer, state in enumerate(theirs):
        if state.shape == ours[layer].shape:
            torch.testing.assert_close(ours[layer][REAL], state[REAL], atol=1e-5, rtol=0)
    assert sum(state.shape == ours[layer].shape for layer, state in enumerate(theirs)) >= len(theirs) - 1


def test_attention_of_captured_queries_and_keys_is_the_librarys_own(model: PreTrainedModel) -> None:
    with torch.no_grad():
        theirs = eager(model)(**batch(), output_attentions=True).attentions
    for runs in (model, eager(model)):
        signals = signals_of(runs, all_of(model))
        for layer, weights in enumerate(theirs, start=1):
            keys = own_keys(signals.mask, None, common_window((signals, [layer])))
            ours = masked_log_softmax(signals.attention_scores(layer), keys).exp()
            torch.testing.assert_close(ours.transpose(1, 2)[REAL], weights.transpose(1, 2)[REAL], atol=1e-5, rtol=0)


def test_fused_and_transposed_matrices_as_layers_of_their_own_change_nothing(model: PreTrainedModel) -> None:
    split = copy.deepcopy(model)
    for key, matrix in list(iter_block_matrices(split)):
        matrix.replace(matrix.linear())
        assert not matrix.is_view and torch.equal(matrix.weight, block_matrix(model, *key).weight)
    before, after = (signals_of(one, all_of(model)) for one in (model, split))
    for layer, state in before.hidden.items():
        torch.testing.assert_close(after.hidden[layer][REAL], state[REAL], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(split), logits_of(model), atol=1e-5, rtol=0)
    merge_split(split)
    assert state_of(split) == state_of(model)
    assert all(torch.equal(value, split.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits_of(split), logits_of(model))


def test_full_rank_factors_are_restored_and_merge_into_the_librarys_own(model: PreTrainedModel, tmp_path: Path) -> None:
    factored = copy.deepcopy(model)
    for _, matrix in list(iter_block_matrices(factored)):
        linear: Any = matrix.linear()
        matrix.replace(LowRankLinear.from_linear(linear, min(linear.weight.shape)))
    torch.testing.assert_close(logits_of(factored), logits_of(model), atol=1e-4, rtol=0)
    save_model(factored, tmp_path)
    loaded = load_model(tmp_path, CAUSAL_LM)
    assert torch.equal(logits_of(loaded), logits_of(factored))
    merge_low_rank(loaded)
    assert state_of(loaded) == state_of(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [["attention", "ffn"], ["ffn"]])
def test_a_contracted_decoder_is_a_plain_folder_of_the_library(
    model: PreTrainedModel, targets: list[Any], tmp_path: Path
) -> None:
    chained = copy.deepcopy(model)
    overparameterise(chained, OverparamSection(length=1, targets=targets))
    torch.testing.assert_close(logits_of(chained), logits_of(model), atol=1e-4, rtol=0)
    save_model(chained, tmp_path)
    loaded = load_model(tmp_path, CAUSAL_LM)
    assert torch.equal(logits_of(loaded), logits_of(chained))
    assert (contract_model(loaded).max_abs_difference or 0) < 1e-4
    assert state_of(loaded) == state_of(model)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_model(loaded, plain)
    theirs = AutoModelForCausalLM.from_pretrained(plain).eval()
    assert type(theirs) is type(model) and state_of(theirs) == state_of(model)
    torch.testing.assert_close(logits_of(theirs), logits_of(model), atol=1e-4, rtol=0)
    assert torch.equal(logits_of(load_model(plain, CAUSAL_LM)), logits_of(theirs))


@pytest.mark.parametrize("family", DECODERS)
def test_attention_is_compared_over_the_keys_that_each_token_attends_to(family: str) -> None:
    student, teacher = (eager(tiny(family, seed=seed)) for seed in (0, 1))
    with torch.no_grad():
        own, given = (one(**batch(), output_attentions=True).attentions[1] for one in (student, teacher))
    rows = torch.where(given > 0, given * (given.clamp(min=1e-30).log() - own.clamp(min=1e-30).log()), 0.0).sum(-1)
    expected = torch.stack([values[:, real].mean() for values, real in zip(rows, REAL, strict=True)]).mean()
    pairs = [(2, 2)]
    gradients = []
    for objective in (AttentionObjective(pairs), RelationObjective(pairs, relations={("query", "key"): 1.0})):
        signals = signals_of(student, objective.student_request()), signals_of(teacher, objective.teacher_request())
        vectors = [signals[0].matrices[(2, name)].requires_grad_() for name in ("query", "key")]
        value = objective(*signals, batch())
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
        gradients.append(torch.autograd.grad(value, vectors))
    # Autograd's own, and the one that is formed along with the value.
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_relation_of_a_decoder_runs_over_earlier_tokens_alone(name: str) -> None:
    objective = RelationObjective([(2, 2)], relations={(name, name): 1.0})
    student, teacher = (signals_of(tiny("llama", seed=seed), objective.student_request()) for seed in (0, 1))
    heads = student.heads_of(name)
    assert heads == (4 if name == "query" else 2)
    total = 0.0
    for row, real in enumerate(REAL):
        length = int(real.sum())
        for token in range(length):
            for head in range(heads):
                p, q = (
                    (vectors[token] @ vectors[: token + 1].T / 8**0.5).softmax(-1)
                    for vectors in (one.split_heads(2, name)[row, head] for one in (teacher, student))
                )
                total += float((p * (p / q).log()).sum()) / (heads * length * len(REAL))
    assert float(objective(student, teacher, batch())) == pytest.approx(total, rel=1e-4)


def test_blocks_of_decoders_hold_no_other_linear_map(model: PreTrainedModel) -> None:
    named = {id(matrix.module): matrix.names for _, matrix in iter_block_matrices(model)}
    assert sum(map(len, named.values())) == 2 * len(family_of(model.config).matrices)
    maps = [module for module in blocks_of(model).modules() if getattr(module, "weight", torch.zeros(1)).ndim == 2]
    assert {id(module) for module in maps} == set(named)


def test_every_decoder_says_that_it_is_one() -> None:
    for name in DECODERS:
        model = tiny(name)
        assert family_of(model.config) is FAMILIES[name] and shape_of(model.config).kv_heads in (2, 4)
        # The library's own word: a later token changes nothing before it.
        ids = batch(rows=1)["input_ids"]
        changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
        with torch.no_grad():
            first, second = (model(input_ids=one).logits[:, :-1] for one in (ids, changed))
        assert torch.equal(first, second)
