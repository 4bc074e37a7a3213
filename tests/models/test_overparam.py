"""Over-parameterising a model changes its parameters and nothing else; contracting brings it back."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chains import factors_of
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, BertConfig, BertForSequenceClassification, PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix
from kdcli.models.counts import count_parameters
from kdcli.models.factoriser import Factoriser
from kdcli.models.lowrank import LowRankLinear, factorise
from kdcli.models.overparam import (
    contract_model,
    linears_of,
    overparam_state,
    overparameterise,
    restore_overparam,
    teacher_factors,
)
from kdcli.models.probe import probe, probe_batch
from kdcli.models.statistics import collect_statistics
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.tensors.mpo import contract, decompose
from kdcli.tensors.parametrization import chain_of, is_overparameterised

FORMS = [
    OverparamSection(length=0),
    OverparamSection(length=3),
    OverparamSection(scale=2.5),
    OverparamSection(factorization="svd"),
    OverparamSection(factorization="svd-plain"),
    OverparamSection(gauge="left", length=1),
    OverparamSection(factors={"32": [4, 2, 2, 2], "64": [4, 2, 2, 4]}),
    OverparamSection(targets=["ffn"], layers=[1], svd_dtype="float32"),
]


def tiny(layers: int = 2, hidden: int = 32, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=120,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def low_rank(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    student = copy.deepcopy(model)
    factorise(student, StudentSection(form="low-rank", rank=rank))
    return student


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    yield tiny()


@pytest.mark.parametrize("section", FORMS, ids=lambda s: str(s.model_dump(exclude_defaults=True)))
def test_the_function_stays_and_the_plain_model_comes_back(model: PreTrainedModel, section: OverparamSection):
    plain = copy.deepcopy(model)
    logits, state, count = probe(model), model.state_dict(), count_parameters(model)
    report = overparameterise(model, section)
    assert is_overparameterised(model)
    assert report.before == count and report.after == count_parameters(model)
    assert report.after - report.before == sum(row.chain - row.dense for row in report.rows)
    torch.testing.assert_close(probe(model), logits, atol=1e-4, rtol=0)
    contraction = contract_model(model)
    assert contraction.max_abs_difference is not None and contraction.max_abs_difference < 1e-6
    torch.testing.assert_close(probe(model), logits, atol=1e-4, rtol=0)
    assert list(model.state_dict()) == list(state)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert count_parameters(model) == count
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(model.state_dict(), strict=True)


def test_only_the_six_matrices_of_each_block_become_chains(model: PreTrainedModel):
    report = overparameterise(model, OverparamSection())
    assert [(row.block, row.matrix) for row in report.rows] == [
        (layer, name) for layer in (1, 2) for name in ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
    ]
    chained = {name for name, _ in model.named_parameters() if "parametrizations" in name}
    assert all(".weight.original" in name for name in chained)
    assert len(chained) == 12 * 5
    assert report.skipped == []


def test_targets_and_layers_choose(model: PreTrainedModel):
    report = overparameterise(model, OverparamSection(targets=["attention"], layers=[1]))
    assert {row.block for row in report.rows} == {2}
    assert [row.matrix for row in report.rows] == ["query", "key", "value", "attention_output"]


@pytest.mark.parametrize(
    ("section", "total"),
    [
        (OverparamSection(factorization="svd"), 90_842_880),
        (OverparamSection(length=0), 90_842_880),
        (OverparamSection(length=3), 162_506_496),
        (OverparamSection(length=8), 66_955_008 + 6 * 35_831_808),
    ],
)
def test_totals_of_the_published_student(section: OverparamSection, total: int):
    with torch.device("meta"):
        student = AutoModel.from_config(BertConfig(num_hidden_layers=6))
    report = overparameterise(student, section)
    assert (report.before, report.after) == (66_955_008, total)
    contract_model(student, check=False)
    assert count_parameters(student) == 66_955_008


def test_a_training_step_changes_the_weight_and_contraction_keeps_it(model: PreTrainedModel):
    overparameterise(model, OverparamSection(length=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    linear = block_matrix(model, 1, "query").module
    before = linear.weight.detach().clone()  # type: ignore[union-attr, operator]
    for _ in range(3):
        model(**probe_batch(model), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    logits, last = probe(model), linear.weight.detach().clone()  # type: ignore[union-attr, operator]
    assert not torch.equal(last, before)
    torch.testing.assert_close(contract(factors_of(model)[(1, "query")]), last, atol=1e-6, rtol=1e-5)
    contract_model(model)
    assert torch.equal(block_matrix(model, 1, "query").module.weight, last)  # type: ignore[arg-type]
    assert torch.equal(probe(model), logits)


def test_every_tensor_gets_a_gradient(model: PreTrainedModel):
    overparameterise(model, OverparamSection(length=2))
    model.train()
    model(**probe_batch(model), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    for key, chain in factors_of(model).items():
        for tensor in chain:
            assert tensor.grad is not None and tensor.grad.abs().max() > 0, key


def test_contracting_a_dense_model_is_the_identity(model: PreTrainedModel):
    state = copy.deepcopy(model.state_dict())
    report = contract_model(model)
    assert report.matrices == [] and report.max_abs_difference == 0.0 and report.before == report.after
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_contracting_twice_does_nothing_more(model: PreTrainedModel):
    overparameterise(model, OverparamSection())
    contract_model(model)
    state = copy.deepcopy(model.state_dict())
    assert contract_model(model).matrices == []
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_contracted_weight_has_memory_of_its_own(model: PreTrainedModel):
    overparameterise(model, OverparamSection(factorization="svd-plain"))
    contract_model(model)
    places = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert all(p.is_leaf and p.is_contiguous() and p.requires_grad for p in model.parameters())


def test_a_frozen_weight_stays_frozen(model: PreTrainedModel):
    linear = block_matrix(model, 1, "key").module
    linear.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    overparameterise(model, OverparamSection())
    assert not any(t.requires_grad for t in factors_of(model)[(1, "key")])
    contract_model(model)
    assert not linear.weight.requires_grad  # type: ignore[union-attr]
    assert block_matrix(model, 1, "query").module.weight.requires_grad  # type: ignore[union-attr]


def test_a_shared_layer_gets_one_chain(model: PreTrainedModel):
    shared = block_matrix(model, 1, "ffn_in").module
    block_matrix(model, 2, "ffn_in").replace(shared)
    logits, count = probe(model), count_parameters(model)
    report = overparameterise(model, OverparamSection())
    assert len(report.rows) == 11 and report.skipped == ["2.ffn_in (shares the chain of 1.ffn_in)"]
    assert report.after - count == sum(row.chain - row.dense for row in report.rows)
    torch.testing.assert_close(probe(model), logits, atol=1e-4, rtol=0)
    contract_model(model)
    assert block_matrix(model, 1, "ffn_in").module is block_matrix(model, 2, "ffn_in").module
    assert count_parameters(model) == count
    torch.testing.assert_close(probe(model), logits, atol=1e-4, rtol=0)


def test_a_weight_that_two_layers_share_stays_shared(model: PreTrainedModel):
    first, second = block_matrix(model, 1, "query").module, block_matrix(model, 2, "key").module
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    second.weight = first.weight
    keys, count, logits = list(model.state_dict()), count_parameters(model), probe(model)
    report = overparameterise(model, OverparamSection())
    assert len(report.rows) == 11
    assert chain_of(first) is chain_of(second)
    assert report.after - count == sum(row.chain - row.dense for row in report.rows)

    twin = tiny()
    a, b = block_matrix(twin, 1, "query").module, block_matrix(twin, 2, "key").module
    b.weight = a.weight  # type: ignore[assignment, union-attr]
    restore_overparam(twin, json.loads(json.dumps(overparam_state(model))))
    twin.load_state_dict(model.state_dict())
    assert chain_of(a) is chain_of(b)
    assert torch.equal(probe(twin), probe(model))

    contract_model(model)
    assert first.weight is second.weight
    assert list(model.state_dict()) == keys and count_parameters(model) == count
    torch.testing.assert_close(probe(model), logits, atol=1e-4, rtol=0)


def test_a_weight_that_another_part_shares_stays_dense(model: PreTrainedModel):
    value = block_matrix(model, 1, "value").module
    model.bert.pooler.dense.weight = value.weight  # type: ignore[union-attr, assignment]
    report = overparameterise(model, OverparamSection())
    assert len(report.rows) == 11 and report.skipped == ["1.value (shared with another part of the model)"]
    assert chain_of(value) is None
    assert model.bert.pooler.dense.weight is value.weight  # type: ignore[union-attr]


def test_a_description_restores_the_same_model(model: PreTrainedModel):
    overparameterise(model, OverparamSection(length=2))
    state = json.loads(json.dumps(overparam_state(model)))
    twin = tiny(seed=1)
    restore_overparam(twin, state)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(probe(twin), probe(model))
    assert overparam_state(twin) == state


@pytest.mark.parametrize(
    "state",
    [
        {"bert.encoder.layer.0.attention.self.query": {"out_factors": [8, 8], "in_factors": [8, 4]}},
        {"bert.pooler": {"out_factors": [8, 4], "in_factors": [8, 4]}},
    ],
)
def test_a_description_that_does_not_fit_is_refused(model: PreTrainedModel, state: dict):
    with pytest.raises(ValueError, match="chain"):
        restore_overparam(model, state)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (OverparamSection(layers=[2]), "blocks 0 to 1, not 2"),
        (OverparamSection(factors={"33": [11, 3]}), "no matrix has a side of 33; there are 32, 64"),
        (OverparamSection(targets=[]), "no matrix is left"),
        (OverparamSection(layers=[]), "no matrix is left"),
    ],
)
def test_sections_that_do_not_fit_are_refused(model: PreTrainedModel, section: OverparamSection, words: str):
    with pytest.raises(InputError, match=words):
        overparameterise(model, section)
    assert not is_overparameterised(model)


def test_a_model_of_prime_width_is_refused_and_stays_as_it_is():
    model = tiny(hidden=4 * 29)
    model.config.intermediate_size = 2 * 4 * 29
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(InputError, match="116"):
        overparameterise(model, OverparamSection())
    assert [n for n, _ in model.named_parameters()] == names


def test_over_parameterising_twice_is_refused(model: PreTrainedModel):
    overparameterise(model, OverparamSection())
    with pytest.raises(InputError, match="already"):
        overparameterise(model, OverparamSection())


def test_both_factors_of_a_low_rank_student_become_chains(model: PreTrainedModel):
    student = low_rank(model, 12)
    logits, keys = probe(student), list(student.state_dict())
    report = overparameterise(student, OverparamSection(length=1))
    assert len(report.rows) == 24 and report.rows[0].matrix == "query.down" and report.rows[1].matrix == "query.up"
    torch.testing.assert_close(probe(student), logits, atol=1e-4, rtol=0)
    contract_model(student)
    assert list(student.state_dict()) == keys
    torch.testing.assert_close(probe(student), logits, atol=1e-4, rtol=0)


def test_low_rank_factors_of_a_prime_rank_stay_dense(model: PreTrainedModel):
    student = low_rank(model, 12)
    linear = block_matrix(model, 1, "query").module
    assert isinstance(linear, nn.Linear)
    block_matrix(student, 1, "query").replace(LowRankLinear.from_linear(linear, 13))
    report = overparameterise(student, OverparamSection())
    assert len(report.rows) == 22 and len(report.skipped) == 2
    assert report.skipped[0].startswith("1.query.down (13 cannot be split")


def test_low_rank_factors_of_a_prime_rank_everywhere_are_refused(model: PreTrainedModel):
    with pytest.raises(InputError, match="no matrix is left") as caught:
        overparameterise(low_rank(model, 13), OverparamSection())
    assert caught.value.hint is not None and "are 12 and 14" in caught.value.hint


def test_teacher_tensors_are_those_of_the_paired_block():
    teacher = tiny(layers=4)
    student = tiny(layers=2, seed=1)
    section = OverparamSection(length=1)
    overparameterise(student, section)
    found, skipped = teacher_factors(teacher, student, [(1, 2), (2, 4)], section)
    assert not skipped and set(found) == set(factors_of(student))
    linears = dict(linears_of(student))
    for (layer, name), chain in found.items():
        weight = block_matrix(teacher, 2 * layer, name).module.weight
        torch.testing.assert_close(contract(chain), weight, atol=1e-5, rtol=1e-4)
        assert not any(t.requires_grad for t in chain)
        own = chain_of(linears[layer, name])
        assert own is not None
        expected = decompose(weight, own.shape)
        assert all(torch.equal(a, b) for a, b in zip(chain, expected, strict=True))


def test_unpaired_blocks_and_other_shapes_are_skipped():
    teacher, student, section = tiny(layers=4, hidden=64), tiny(layers=2), OverparamSection(length=1)
    overparameterise(student, section)
    found, skipped = teacher_factors(teacher, student, [(1, 2), (2, 4)], section)
    assert not found and len(skipped) == 12
    found, skipped = teacher_factors(tiny(layers=4), student, [(1, 2)], section)
    assert len(found) == 6 and all(name.startswith("2.") for name in skipped)


def test_truncation_compares_tensors_of_equal_factors():
    # 32 = 8x4 and 64 = 8x8: the first tensors have the same factors, the last do not.
    section = OverparamSection(length=1, aux_mismatch="truncate")
    student = tiny(layers=2)
    overparameterise(student, section)
    found, skipped = teacher_factors(tiny(layers=2, hidden=64), student, [(1, 1), (2, 2)], section)
    # 64 x 32 = (8x8, 8x4) and 128 x 64 = (16x8, 8x8) have no tensor in common.
    assert skipped == ["1.ffn_in", "1.ffn_out", "2.ffn_in", "2.ffn_out"]
    assert found[(1, "query")][0].shape == (1, 8, 8, 64)
    assert factors_of(student)[(1, "query")][0].shape == (1, 8, 8, 16)


def test_a_low_rank_student_is_paired_with_the_teachers_factors_of_its_rank(model: PreTrainedModel):
    student, section = low_rank(model, 12), OverparamSection(length=1)
    overparameterise(student, section)
    found, skipped = teacher_factors(model, student, [(1, 1), (2, 2)], section)
    assert not skipped and set(found) == set(factors_of(student))
    for key, chain in factors_of(student).items():
        assert all(torch.equal(a, b) for a, b in zip(chain, found[key], strict=True)), key


@pytest.mark.parametrize("sequential", [False, True])
def test_a_low_rank_students_chains_start_as_the_teachers_whatever_its_factors_start_from(
    model: PreTrainedModel, sequential: bool
):
    """The teacher's matrix is factored as the student's was: the loss between the chains starts at zero."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 120, (8, 12), generator=generator)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    def loss(batch: Any) -> Tensor:
        return functional.cross_entropy(model(**batch).logits, torch.arange(8) % 2)

    def again(student: PreTrainedModel, layer: int) -> Any:
        return collect_statistics(student, batches, layer=layer)

    statistics = collect_statistics(model, batches, loss)
    factoriser = Factoriser(True, True, statistics, again if sequential else None)
    student, section = copy.deepcopy(model), OverparamSection(length=1)
    factorise(student, StudentSection(form="low-rank", rank=12), section, factoriser)
    assert not torch.allclose(probe(student), probe(low_rank(model, 12)), atol=1e-3)
    expected = probe(student)
    overparameterise(student, section)
    torch.testing.assert_close(probe(student), expected, atol=1e-4, rtol=1e-4)
    found, skipped = teacher_factors(model, student, [(1, 1), (2, 2)], section, factoriser)
    assert not skipped
    for key, chain in factors_of(student).items():
        assert all(torch.equal(a, b) for a, b in zip(chain, found[key], strict=True)), key


def test_the_encoder_keeps_its_outputs(encoder):  # type: ignore[no-untyped-def]
    from kdcli.tasks.heads import load_model

    real = load_model(encoder, "base")
    hidden = probe(real)
    overparameterise(real, OverparamSection(layers=[0, 5], svd_dtype="float32"))
    torch.testing.assert_close(probe(real), hidden, atol=1e-4, rtol=0)
    assert contract_model(real).max_abs_difference == 0.0
    torch.testing.assert_close(probe(real), hidden, atol=1e-4, rtol=0)
    assert count_parameters(real) == 22_713_216
