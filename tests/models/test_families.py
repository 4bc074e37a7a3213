"""The table of families: where the matrices are, and that captured signals are the library's own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, tiny
from torch import Tensor, nn
from transformers import BertConfig, BloomConfig, PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, blocks_of, embeddings_of, iter_block_matrices
from kdcli.models.capture import Capture
from kdcli.models.counts import count_parameters
from kdcli.models.families import FAMILIES, family_of
from kdcli.models.lowrank import LowRankLinear, merge_low_rank
from kdcli.models.overparam import contract_model, overparameterise
from kdcli.models.probe import probe
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.models.student import build_student
from kdcli.objectives.attention import attention_kl, attention_mse, attention_request
from kdcli.objectives.base import masked_log_softmax, own_keys
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.signals import Request, Signals
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.heads import load_model

SIDES = {"ffn_in": (64, 32), "ffn_gate": (64, 32), "ffn_out": (32, 64)}
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


def signals_of(model: PreTrainedModel, request: Request) -> Signals:
    capture = Capture(model, request, CLASSIFICATION)
    try:
        with capture:
            return capture.run(batch())
    finally:
        capture.close()


def layers_of(model: PreTrainedModel) -> range:
    """The blocks of a tiny model that have weights of their own."""
    return range(1, len(blocks_of(model)) + 1)


def test_the_matrices_of_every_block_are_linear_maps_of_fitting_shapes(model: PreTrainedModel):
    assert shape_of(model.config).layers == 3
    assert len(blocks_of(model)) == (1 if family_of(model.config).repeated else 3)
    for layer in (1, 2, 3):
        for name in family_of(model.config).matrices:
            matrix = block_matrix(model, layer, name)
            assert isinstance(matrix.module, nn.Linear)
            assert matrix.weight.shape == SIDES.get(name, (32, 32))


def test_blocks_hold_no_other_linear_map(model: PreTrainedModel):
    named = {id(matrix.module): matrix.names for _, matrix in iter_block_matrices(model)}
    assert sum(map(len, named.values())) == len(layers_of(model)) * len(family_of(model.config).matrices)
    others = {
        name.rpartition(".")[2]
        for name, module in blocks_of(model).named_modules()
        if isinstance(module, nn.Linear) and id(module) not in named
    }
    # DeBERTa's maps of relative positions are no part of q, k and v.
    assert others == ({"pos_key_proj", "pos_query_proj"} if model.config.model_type == "deberta-v2" else set())


def test_matrices_are_numbered_from_the_first_block(model: PreTrainedModel):
    keys = [key for key, _ in iter_block_matrices(model)]
    assert keys == [(layer, name) for layer in layers_of(model) for name in family_of(model.config).matrices]
    prefix = f"{model.base_model_prefix}.{family_of(model.config).blocks}.{len(layers_of(model)) // 2}."
    names = {id(module): name for name, module in model.named_modules()}
    assert names[id(block_matrix(model, 2, "query").module)].startswith(prefix)


def test_a_matrix_that_is_put_in_place_is_the_one_that_runs(model: PreTrainedModel):
    changed = copy.deepcopy(model)
    for name in family_of(model.config).matrices:
        matrix = block_matrix(changed, 2, name)
        before = changed(**batch()).logits
        old = matrix.linear()
        matrix.replace(old)
        # A copy of a share of a fused module changes nothing.
        torch.testing.assert_close(changed(**batch()).logits, before, atol=1e-6, rtol=1e-5)
        new = nn.Linear(old.weight.shape[1], old.weight.shape[0])  # type: ignore[union-attr, misc]
        matrix.replace(new)
        assert block_matrix(changed, 2, name).module is new
        assert not torch.allclose(changed(**batch()).logits, before)


def test_captured_hidden_states_are_the_librarys(model: PreTrainedModel):
    with torch.no_grad():
        signals = signals_of(model, Request(logits=True, hidden=frozenset(range(4))))
        expected = model(**batch(), output_hidden_states=True)
    assert len(expected.hidden_states) == 4
    for layer, states in enumerate(expected.hidden_states):
        assert torch.equal(signals.hidden[layer], states)
    assert signals.predictions[0].logits is not None and torch.equal(signals.predictions[0].logits, expected.logits)


def test_hidden_states_alone_are_the_same_as_beside_the_logits(model: PreTrainedModel):
    # Without logits the pass may end early; what was captured until then must not differ.
    with torch.no_grad():
        whole = signals_of(model, Request(logits=True, hidden=frozenset({0, 1, 2})))
        part = signals_of(model, Request(hidden=frozenset({0, 1, 2})))
    assert not part.predictions
    assert all(torch.equal(part.hidden[layer], whole.hidden[layer]) for layer in (0, 1, 2))


def attention_of(signals: Signals, layer: int) -> Tensor:
    """Return the attention that captured queries and keys make, (batch, heads, seq, seq)."""
    keys = own_keys(signals.mask, None, signals.windows.get(layer))
    return masked_log_softmax(signals.attention_scores(layer), keys).exp()


# The terms of positions of other families are no part of q and k.
@pytest.mark.parametrize("family", [name for name in NAMES if FAMILIES[name].attention == "dot-product"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_formed_from_captured_queries_and_keys_is_the_librarys(family: str, kernel: str):
    model = tiny(family, layers=3)
    model.set_attn_implementation(kernel)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        signals = signals_of(model, attention_request([1, 2, 3]) | Request(logits=True))
        expected = eager(**batch(), output_attentions=True)
    torch.testing.assert_close(signals.predictions[0].logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == kernel
    real = signals.mask[:, None, :, None].bool()
    for layer in (1, 2, 3):
        found, wanted = attention_of(signals, layer), expected.attentions[layer - 1]
        torch.testing.assert_close(found * real, wanted * real, atol=1e-5, rtol=1e-5)


def test_a_window_is_that_of_local_attention():
    signals = signals_of(tiny("modernbert", layers=4), attention_request([1, 2, 3, 4]))
    # Every third block attends to all tokens, the others to 3 on either side.
    assert sorted(signals.windows) == [2, 3]
    places = torch.arange(11)
    near = (places[:, None] - places[None, :]).abs() <= 3
    assert torch.equal(signals.windows[2][0, 0], near)


@pytest.mark.parametrize("measure", [attention_kl, attention_mse])
def test_attention_outside_a_window_is_not_compared(measure: Any):
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(2, 3, 5, 5, generator=generator) for _ in range(2))
    mask = torch.ones(2, 5)
    window = torch.ones(5, 5).tril(1).triu(-1).bool().expand(2, 1, 5, 5)
    value = measure(mine, theirs, mask, None, window)
    changed = torch.where(window, theirs, theirs + 7)
    torch.testing.assert_close(measure(mine, changed, mask, None, window), value)
    assert not torch.allclose(measure(mine, changed, mask), measure(mine, theirs, mask))


def test_captured_matrices_are_the_maps_of_their_inputs(model: PreTrainedModel):
    family = family_of(model.config)
    inputs: dict[str, Tensor] = {}
    matrices = {name: block_matrix(model, 2, name) for name in family.matrices}
    hooks = [
        matrix.module.register_forward_hook(
            lambda module, given, output, name=name: inputs.__setitem__(name, given[0])  # type: ignore[misc]
        )
        for name, matrix in matrices.items()
    ]
    # Of a block that is run several times, the last inputs are those of the last time.
    layer = 3 if family.repeated else 2
    signals = signals_of(model, Request(logits=True, matrices=frozenset((layer, name) for name in matrices)))
    for hook in hooks:
        hook.remove()
    for name, matrix in matrices.items():
        expected = matrix.of(matrix.module(inputs[name]))
        found = signals.matrices[(layer, name)]
        assert found.shape == (3, 11, matrix.weight.shape[0])
        if family.rotary and name in ("query", "key"):
            # Rotation keeps the length of each vector.
            found, expected = found.unflatten(-1, (4, 8)).norm(dim=-1), expected.unflatten(-1, (4, 8)).norm(dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_capturing_leaves_the_logits_as_they_are(model: PreTrainedModel, training: bool):
    everything = Request(
        logits=True,
        hidden=frozenset(range(4)),
        matrices=frozenset((layer, name) for layer in (1, 2, 3) for name in family_of(model.config).matrices),
    )
    try:
        model.train(training)
        torch.manual_seed(7)
        expected = model(**batch()).logits
        torch.manual_seed(7)
        signals = signals_of(model, everything)
    finally:
        model.eval()
    assert signals.predictions[0].logits is not None and torch.equal(signals.predictions[0].logits, expected)
    assert len(signals.hidden) == 4 and len(signals.matrices) == 3 * len(family_of(model.config).matrices)


def test_only_what_is_asked_for_is_captured(model: PreTrainedModel):
    signals = signals_of(model, Request(logits=True, hidden=frozenset({2})))
    assert list(signals.hidden) == [2] and signals.matrices == {} and signals.factors == {}


def test_copied_parts_of_a_body_are_captured_as_the_whole_is(model: PreTrainedModel):
    # A new head stands on copies of a body's parts, and each copy has a configuration of its own.
    request = Request(matrices=frozenset((1, name) for name in ("query", "key", "value")))
    parts = copy.deepcopy(model)
    for name, child in list(parts.base_model.named_children()):
        setattr(parts.base_model, name, copy.deepcopy(child))
    with torch.no_grad():
        whole, joined = signals_of(model, request), signals_of(parts, request)
    assert joined.matrices.keys() == whole.matrices.keys() == request.matrices
    assert all(torch.equal(joined.matrices[key], whole.matrices[key]) for key in request.matrices)


def test_a_closed_capture_leaves_no_hook(model: PreTrainedModel):
    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = hooks()
    capture = Capture(
        model, Request(logits=True, hidden=frozenset({0, 1}), matrices=frozenset({(2, "key")})), CLASSIFICATION
    )
    assert hooks() > before
    logits = model(**batch()).logits
    capture.close()
    assert hooks() == before
    assert torch.equal(model(**batch()).logits, logits)


def test_gradients_flow_through_captured_states(model: PreTrainedModel):
    signals = signals_of(model, Request(logits=True, hidden=frozenset({1}), matrices=frozenset({(3, "key")})))
    weight = block_matrix(model, 1, "ffn_out").module.weight
    for states in (signals.hidden[1], signals.matrices[(3, "key")]):
        (gradient,) = torch.autograd.grad(states.square().sum(), weight, retain_graph=True)  # type: ignore[arg-type]
        assert gradient.abs().sum() > 0


def test_wide_embeddings_of_electra_need_no_projection():
    model = tiny("electra", embedding_size=32)
    with torch.no_grad():
        signals = signals_of(model, Request(hidden=frozenset({0})))
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
    with pytest.raises(InputError, match="unknown family 'bloom'; known are albert, ") as caught:
        shape_of(BloomConfig())
    assert all(name in caught.value.message for name in NAMES)
    assert caught.value.hint is not None and "kdcli.families" in caught.value.hint
    assert shape_of(BertConfig()).hidden == 768


def state_shapes(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...]]]:
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def test_full_rank_factors_give_the_same_logits(model: PreTrainedModel):
    factored = copy.deepcopy(model)
    for _, matrix in list(iter_block_matrices(factored)):
        linear = matrix.linear()
        matrix.replace(LowRankLinear.from_linear(linear, min(linear.weight.shape)))  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(probe(factored), probe(model), atol=1e-4, rtol=0)
    merged = merge_low_rank(factored)
    assert state_shapes(merged) == state_shapes(model)  # type: ignore[arg-type]
    torch.testing.assert_close(probe(merged), probe(model), atol=1e-4, rtol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [["attention", "ffn"], ["ffn"]])
def test_a_contracted_model_has_the_keys_the_shapes_and_the_logits_of_before(
    model: PreTrainedModel, targets: list[Any], tmp_path: Path
):
    chained = copy.deepcopy(model)
    report = overparameterise(chained, OverparamSection(length=1, targets=targets))
    inside = [name for name in family_of(model.config).matrices if "attention" in targets or name.startswith("ffn")]
    assert [(row.block, row.matrix) for row in report.rows] == [(k, n) for k in layers_of(model) for n in inside]
    assert report.before == count_parameters(model) < report.after == count_parameters(chained)
    torch.testing.assert_close(probe(chained), probe(model), atol=1e-4, rtol=0)
    save_model(chained, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(probe(loaded), probe(chained))
    contracted = contract_model(loaded)
    assert contracted.after == report.before and (contracted.max_abs_difference or 0) < 1e-4
    assert state_shapes(loaded) == state_shapes(model)
    torch.testing.assert_close(probe(loaded), probe(model), atol=1e-4, rtol=0)


def test_chains_of_factors_of_fused_matrices_come_back_to_the_bit(tmp_path: Path):
    teacher = tiny("modernbert")
    student = build_student(teacher, StudentSection(form="low-rank", rank=12), seed=0).model
    overparameterise(student, OverparamSection(length=1))
    save_model(student, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(probe(loaded), probe(student))
    contract_model(loaded)
    assert {type(matrix.module) for _, matrix in iter_block_matrices(loaded)} == {LowRankLinear}
    assert state_shapes(merge_low_rank(loaded)) == state_shapes(teacher)  # type: ignore[arg-type]


def test_chains_of_repeated_blocks_cannot_leave_one_out():
    with pytest.raises(InputError, match="blocks of ALBERT are one") as caught:
        overparameterise(tiny("albert"), OverparamSection(layers=[0]))
    assert caught.value.where == "overparam.layers"


def test_several_groups_of_repeated_blocks_are_refused(tmp_path: Path):
    save_model(tiny("albert", layers=4, num_hidden_groups=2), tmp_path)
    with pytest.raises(InputError, match="num_hidden_groups is 2; of ALBERT kdcli supports"):
        load_model(tmp_path)
