"""Decoders: captured signals are the library's own, and a model survives every change of its matrices' form."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, tiny, tokenizer
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, blocks_of, iter_block_matrices, module_at
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
from kdcli.tasks.classification import KIND as CLASSIFICATION

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt with narrow embeddings and no final norm": (
        "opt",
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2 without a feed-forward size": ("gpt2", {"n_inner": None, "scale_attn_by_inverse_layer_idx": True}),
    "llama with biases, untied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text both ways": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
}
"""What of a family depends on a setting."""


@pytest.fixture(scope="module", params=[*DECODERS, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, settings = VARIANTS.get(request.param, (request.param, {}))
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
PREDICTED = {
    "predicted_positions": torch.tensor([0, 3, 14, 15, 23]),
    "targets": torch.tensor([7, 8, 9, 10, 11]),
    "prediction_weights": torch.full((5,), 0.2),
}
"""Some positions whose next token is predicted."""


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


def test_a_share_of_a_fused_matrix_is_the_one_that_its_name_says(model: PreTrainedModel) -> None:
    matrices = family_of(model.config).matrices
    request = Request(
        linear=frozenset((2, name) for name in matrices), matrices=frozenset({(2, "value"), (2, "ffn_out")})
    )
    signals = signals_of(model, request)
    # Values are neither rotated nor normalised on their way to the attention function.
    torch.testing.assert_close(signals.linear[(2, "value")][1], signals.matrices[(2, "value")], atol=1e-6, rtol=0)
    if "ffn_gate" in matrices:
        config = model.config
        act = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]
        gated = act(signals.linear[(2, "ffn_gate")][1]) * signals.linear[(2, "ffn_in")][1]
        torch.testing.assert_close(gated, signals.linear[(2, "ffn_out")][0], atol=1e-5, rtol=1e-5)
    assert all(x.shape[:2] == REAL.shape for pair in signals.linear.values() for x in pair)


def test_predictions_are_differentiated_by_what_the_first_block_gets(model: PreTrainedModel) -> None:
    capture = Capture(model, Request(logits=True, gradients=1), KIND)
    with capture:
        signals = capture.run({**batch(), **PREDICTED})
        (ours,) = torch.autograd.grad(signals.predictions[0].table.square().sum(), signals.hidden[0])
    capture.close()
    embedded = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=batch()["attention_mask"]).logits
    (theirs,) = torch.autograd.grad(logits.flatten(0, 1)[PREDICTED["predicted_positions"]].square().sum(), embedded)
    if (projection := module_at(model, family_of(model.config).projection)) is not None:
        ours = ours @ projection.get_parameter("weight")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("targets", [["attention", "ffn"], pytest.param(["ffn"], marks=pytest.mark.slow)])
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


def test_a_file_without_the_bodys_name_and_with_old_masks_is_loaded(tmp_path: Path) -> None:
    # As GPT-2's own: no "transformer." before the names, the triangular masks of attention among the weights.
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    state = {
        key.removeprefix("transformer."): value for key, value in model.state_dict().items() if "lm_head" not in key
    }
    for block in (0, 1):
        state[f"h.{block}.attn.bias"] = torch.ones(1, 1, 130, 130).tril()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(load_model(tmp_path, CAUSAL_LM)), logits_of(model))
    state["h.0.attn.c_other.weight"] = torch.ones(2)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has 1 weight \(first: h.0.attn.c_other.weight\) for which"):
        load_model(tmp_path, CAUSAL_LM)


@pytest.mark.parametrize("padding", [None, 5])
def test_a_decoder_needs_a_padding_token_as_a_classifier_only(padding: int | None, tmp_path: Path) -> None:
    model = tiny("llama", pad_token_id=padding)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, CAUSAL_LM).config.pad_token_id == padding
    labelled = {"num_labels": 3}
    if padding is None:
        with pytest.raises(InputError, match="no tokenizer beside it has a padding token"):
            load_model(tmp_path, CLASSIFICATION.head, new_head=labelled)
        tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, CLASSIFICATION.head, new_head=labelled)(**batch()).logits.shape == (3, 3)


@pytest.mark.data
def test_a_trained_llama_is_captured_as_the_library_runs_it(data_dir: Path) -> None:
    model = load_model(data_dir.parent / "models" / "stories260K", CAUSAL_LM)
    shape = shape_of(model.config)
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head) == (5, 8, 4, 8)
    with torch.no_grad():
        found = eager(model)(**batch(), output_hidden_states=True, output_attentions=True)
    signals = signals_of(model, all_of(model))
    for layer, state in enumerate(found.hidden_states):
        torch.testing.assert_close(signals.hidden[layer][REAL], state[REAL], atol=1e-4, rtol=0)
    for layer, weights in enumerate(found.attentions, start=1):
        keys = own_keys(signals.mask, None, common_window((signals, [layer])))
        ours = masked_log_softmax(signals.attention_scores(layer), keys).exp()
        torch.testing.assert_close(ours.transpose(1, 2)[REAL], weights.transpose(1, 2)[REAL], atol=1e-5, rtol=0)
