"""The table of families: where the matrices are, and that captured signals are the library's own."""

import copy

import pytest
import torch
from families import NAMES, tiny
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, blocks_of, embeddings_of, iter_block_matrices, set_block_matrix
from kdcli.models.families import BLOCK_MATRICES, anatomy_of
from kdcli.models.shape import shape_of
from kdcli.signals import Signals, Wants
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.training.capture import Capture

SIDES = {"ffn_in": (64, 32), "ffn_out": (32, 64)}
"""(out, in) of the tiny models' matrices; the four of attention are square."""


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param, layers=3)


def batch(rows: int = 3, width: int = 11) -> dict[str, Tensor]:
    """Return token ids with padding of different lengths at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, width - 2 * row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def heard(model: PreTrainedModel, wants: Wants) -> Signals:
    capture = Capture(model, wants, CLASSIFICATION)
    try:
        with capture:
            return capture.run(batch())
    finally:
        capture.close()


def test_the_six_matrices_of_every_block_are_linear_maps_of_fitting_shapes(model: PreTrainedModel):
    assert len(blocks_of(model)) == shape_of(model.config).layers == 3
    for layer in (1, 2, 3):
        for name in BLOCK_MATRICES:
            matrix = block_matrix(model, layer, name)
            assert isinstance(matrix, nn.Linear)
            assert matrix.weight.shape == SIDES.get(name, (32, 32)) and matrix.bias is not None


def test_blocks_hold_no_other_linear_map(model: PreTrainedModel):
    named = {id(module) for _, module in iter_block_matrices(model)}
    assert len(named) == 18
    others = {
        name.rpartition(".")[2]
        for name, module in blocks_of(model).named_modules()
        if isinstance(module, nn.Linear) and id(module) not in named
    }
    # DeBERTa's maps of relative positions are no part of q, k and v.
    assert others == ({"pos_key_proj", "pos_query_proj"} if model.config.model_type == "deberta-v2" else set())


def test_matrices_are_numbered_from_the_first_block(model: PreTrainedModel):
    keys = [key for key, _ in iter_block_matrices(model)]
    assert keys == [(layer, name) for layer in (1, 2, 3) for name in BLOCK_MATRICES]
    prefix = f"{model.base_model_prefix}.{anatomy_of(model.config).blocks}.1."
    names = {id(module): name for name, module in model.named_modules()}
    assert names[id(block_matrix(model, 2, "query"))].startswith(prefix)


def test_a_matrix_that_is_put_in_place_is_the_one_that_runs(model: PreTrainedModel):
    changed = copy.deepcopy(model)
    for name in BLOCK_MATRICES:
        old = block_matrix(changed, 2, name)
        assert isinstance(old, nn.Linear)
        before = changed(**batch()).logits
        new = nn.Linear(old.in_features, old.out_features)
        set_block_matrix(changed, 2, name, new)
        assert block_matrix(changed, 2, name) is new
        assert not torch.equal(changed(**batch()).logits, before)


def test_captured_hidden_states_are_the_librarys(model: PreTrainedModel):
    with torch.no_grad():
        signals = heard(model, Wants(logits=True, hidden=frozenset(range(4))))
        expected = model(**batch(), output_hidden_states=True)
    assert len(expected.hidden_states) == 4
    for layer, states in enumerate(expected.hidden_states):
        assert torch.equal(signals.hidden[layer], states)
    assert signals.predictions[0].logits is not None and torch.equal(signals.predictions[0].logits, expected.logits)


def test_hidden_states_alone_are_the_same_as_beside_the_logits(model: PreTrainedModel):
    # Without logits the pass may end early; what was heard until then must not differ.
    with torch.no_grad():
        whole = heard(model, Wants(logits=True, hidden=frozenset({0, 1, 2})))
        part = heard(model, Wants(hidden=frozenset({0, 1, 2})))
    assert not part.predictions
    assert all(torch.equal(part.hidden[layer], whole.hidden[layer]) for layer in (0, 1, 2))


# DeBERTa adds terms of content and position to q k^T (disentangled attention), so that scores of captured
# queries and keys are only a part of its own.
@pytest.mark.parametrize("family", [name for name in NAMES if name != "deberta-v2"])
def test_attention_formed_from_captured_queries_and_keys_is_the_librarys(family: str):
    model = tiny(family)
    names = ("query", "key")
    wants = Wants(logits=True, matrices=frozenset((layer, name) for layer in (1, 2) for name in names))
    eager = AutoModelForSequenceClassification.from_config(model.config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        signals = heard(model, wants)
        expected = eager(**batch(), output_attentions=True)
    torch.testing.assert_close(signals.predictions[0].logits, expected.logits, atol=1e-5, rtol=1e-5)
    bias = (1 - signals.mask[:, None, None, :]) * torch.finfo(torch.float32).min
    for layer in (1, 2):
        probabilities = torch.softmax(signals.attention_scores(layer) + bias, -1)
        torch.testing.assert_close(probabilities, expected.attentions[layer - 1], atol=1e-5, rtol=1e-5)


def test_captured_matrices_are_the_maps_of_their_inputs(model: PreTrainedModel):
    signals = heard(model, Wants(hidden=frozenset({0, 1}), matrices=frozenset({(1, "value"), (2, "query")})))
    for below, key in ((0, (1, "value")), (1, (2, "query"))):
        expected = block_matrix(model, *key)(signals.hidden[below])
        torch.testing.assert_close(signals.matrices[key], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_listening_leaves_the_logits_as_they_are(model: PreTrainedModel, training: bool):
    everything = Wants(
        logits=True,
        hidden=frozenset(range(4)),
        matrices=frozenset((layer, name) for layer in (1, 2, 3) for name in BLOCK_MATRICES),
    )
    try:
        model.train(training)
        torch.manual_seed(7)
        expected = model(**batch()).logits
        torch.manual_seed(7)
        signals = heard(model, everything)
    finally:
        model.eval()
    assert signals.predictions[0].logits is not None and torch.equal(signals.predictions[0].logits, expected)
    assert len(signals.hidden) == 4 and len(signals.matrices) == 18


def test_only_what_is_asked_for_is_captured(model: PreTrainedModel):
    signals = heard(model, Wants(logits=True, hidden=frozenset({2})))
    assert list(signals.hidden) == [2] and signals.matrices == {} and signals.factors == {}


def test_a_closed_capture_leaves_no_hook(model: PreTrainedModel):
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    wants = Wants(logits=True, hidden=frozenset({0, 1}), matrices=frozenset({(2, "key")}))
    capture = Capture(model, wants, CLASSIFICATION)
    assert hooks() > before
    logits = model(**batch()).logits
    capture.close()
    assert hooks() == before
    assert torch.equal(model(**batch()).logits, logits)


def test_gradients_flow_through_captured_states(model: PreTrainedModel):
    signals = heard(model, Wants(logits=True, hidden=frozenset({1}), matrices=frozenset({(3, "key")})))
    weight = block_matrix(model, 1, "ffn_out").weight
    for states in (signals.hidden[1], signals.matrices[(3, "key")]):
        (gradient,) = torch.autograd.grad(states.square().sum(), weight, retain_graph=True)  # type: ignore[arg-type]
        assert gradient.abs().sum() > 0


def test_wide_embeddings_of_electra_need_no_projection():
    model = tiny("electra", embedding_size=32)
    with torch.no_grad():
        signals = heard(model, Wants(hidden=frozenset({0})))
        expected = model(**batch(), output_hidden_states=True).hidden_states
    assert torch.equal(signals.hidden[0], expected[0])
    assert embeddings_of(model) is model.electra.embeddings
    assert embeddings_of(tiny("electra")).weight.shape == (32, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", NAMES)
def test_sizes_have_one_name_in_every_family(family: str):
    shape = shape_of(tiny(family, layers=2).config)
    assert (shape.family, shape.layers, shape.hidden, shape.heads) == (family, 2, 32, 4)
    assert (shape.intermediate, shape.vocab, shape.max_positions) == (64, 220, 130)


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'gpt2' are not known") as caught:
        shape_of(GPT2Config())
    assert all(name in caught.value.message for name in NAMES)
    assert caught.value.hint is not None and "anatomy.py" in caught.value.hint
    assert shape_of(BertConfig()).hidden == 768
