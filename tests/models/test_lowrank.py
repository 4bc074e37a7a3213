"""Low-rank students: optimal factors, exact counts, and the sizes that are refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertForSequenceClassification, PreTrainedModel

from kdcli.errors import InputError
from kdcli.models.blocks import iter_block_matrices
from kdcli.models.counts import count_parameters
from kdcli.models.factoring import has_factors, nearest_ranks
from kdcli.models.lowrank import (
    LowRankEmbedding,
    LowRankLinear,
    break_even_rank,
    factorise,
    merge_low_rank,
    plan_ranks,
    svd_factors,
)
from kdcli.models.overparam import overparameterise
from kdcli.models.probe import probe
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.signals import MatrixKey


def modules_of(model: PreTrainedModel) -> dict[MatrixKey, nn.Module]:
    return {key: matrix.module for key, matrix in iter_block_matrices(model)}


def section(**sizes: object) -> StudentSection:
    return StudentSection(form="low-rank", **sizes)  # type: ignore[arg-type]


def tiny(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def bert_base() -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(BertConfig())


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16)])
def test_the_error_is_what_was_discarded_and_falls_with_the_rank(size: tuple[int, int]):
    weight = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.svdvals(weight).square()
    errors = []
    for rank in range(1, min(size) + 1):
        up, down = svd_factors(weight, rank)
        assert up.shape == (size[0], rank) and down.shape == (rank, size[1])
        errors.append(float((weight - up @ down).square().sum()))
        assert errors[-1] == pytest.approx(float(squares[rank:].sum()), abs=1e-10)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-20


def test_both_factors_carry_the_root_of_the_singular_values():
    weight = torch.randn(10, 14, dtype=torch.float64)
    up, down = svd_factors(weight, 6)
    values = torch.diag(torch.linalg.svdvals(weight)[:6])
    torch.testing.assert_close(up.T @ up, values)
    torch.testing.assert_close(down @ down.T, values)


def test_factors_are_the_same_to_the_bit_each_time():
    weight = torch.randn(10, 14)
    assert all(torch.equal(a, b) for a, b in zip(svd_factors(weight, 6), svd_factors(weight.clone(), 6), strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_a_factored_map_of_full_rank_is_the_map(bias: bool):
    linear = nn.Linear(12, 20, bias=bias)
    factored = LowRankLinear.from_linear(linear, 12)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(factored(x), linear(x), atol=1e-6, rtol=1e-5)
    assert (factored.in_features, factored.out_features, factored.rank) == (12, 20, 12)
    assert (factored.up.bias is not None) == bias and factored.down.bias is None
    merged = factored.merged()
    torch.testing.assert_close(merged.weight, linear.weight, atol=1e-6, rtol=1e-5)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in linear.named_parameters()]


def test_a_student_of_full_rank_is_the_teacher():
    teacher = tiny()
    student = copy.deepcopy(teacher)
    for _, matrix in list(iter_block_matrices(student)):
        linear = matrix.linear()
        assert isinstance(linear, nn.Linear)
        matrix.replace(LowRankLinear.from_linear(linear, min(linear.weight.shape)))
    assert (probe(student) - probe(teacher)).square().mean() < 1e-8


def test_break_even_ranks():
    assert break_even_rank(768, 768) == 384
    assert break_even_rank(768, 3072) == 614.4


@pytest.mark.parametrize(("rank", "total"), [(32, 29_856_000), (256, 67_014_912), (320, 77_631_744)])
def test_totals_of_bert_base_by_rank(rank: int, total: int):
    model = bert_base()
    assert count_parameters(model) == 109_482_240
    factorise(model, section(rank=rank))
    assert count_parameters(model) == total == 165_888 * rank + 119_808 + 23_837_184 + 590_592
    for matrix in modules_of(model).values():
        assert isinstance(matrix, LowRankLinear)
        assert matrix.up.weight.numel() + matrix.down.weight.numel() == rank * (
            matrix.in_features + matrix.out_features
        )


@pytest.mark.parametrize(("rank", "embedding", "total"), [(32, 256, 14_425_344), (64, 96, 14_727_360)])
def test_totals_of_bert_base_with_factored_embeddings(rank: int, embedding: int, total: int):
    model = bert_base()
    factorise(model, section(rank=rank, embedding_rank=embedding))
    assert count_parameters(model) == total


def block_weights(model: PreTrainedModel) -> int:
    return sum(p.numel() for matrix in modules_of(model).values() for p in matrix.parameters() if p.ndim > 1)


@pytest.mark.parametrize(("budget", "rank"), [(0.5, 256), (None, 256), (0.25, 128), (0.125, 64), (0.0625, 32)])
def test_a_budget_of_block_weights_gives_one_rank(budget: float | None, rank: int):
    model = bert_base()
    dense = block_weights(model)
    notes = factorise(model, section(budget=budget))
    assert {m.rank for m in modules_of(model).values() if isinstance(m, LowRankLinear)} == {rank}
    assert block_weights(model) == (budget or 0.5) * dense
    assert f"rank {rank}" in notes[-1]


@pytest.mark.parametrize("budget", [0.1, 0.29, 0.6, 0.7, 0.9])
def test_the_rank_is_the_largest_within_the_budget(budget: float):
    model = bert_base()
    dense = block_weights(model)
    shapes = {key: tuple(m.weight.shape) for key, m in iter_block_matrices(model)}
    ranks = plan_ranks(shapes, section(budget=budget), fixed_params=0)  # type: ignore[arg-type]

    def cost(ranks: dict) -> int:
        return sum(o * i if ranks[k] is None else ranks[k] * (o + i) for k, (o, i) in shapes.items())

    rank = next(r for r in ranks.values() if r is not None)
    assert cost(ranks) <= budget * dense
    more = {k: rank + 1 if rank + 1 < break_even_rank(*s) else None for k, s in shapes.items()}  # type: ignore[misc]
    assert cost(more) > budget * dense


def test_the_whole_budget_leaves_the_model_dense():
    model = tiny()
    factorise(model, section(budget=1.0))
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())


CHAINS = {
    "mpo": OverparamSection(length=3),
    "svd": OverparamSection(factorization="svd"),
    "scale": OverparamSection(scale=2.0),
    "own factors": OverparamSection(factors={"384": [8, 6, 8]}),
    "svd-plain": OverparamSection(factorization="svd-plain"),
}


def six_blocks() -> PreTrainedModel:
    """A 6-layer, 384-wide encoder, in shape only."""
    with torch.device("meta"):
        return AutoModel.from_config(
            BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        )


@pytest.mark.parametrize("chains", CHAINS)
def test_every_budget_gives_a_student_that_chains_fit_and_that_uses_the_budget_up(chains: str):
    overparam = CHAINS[chains]
    shapes = {key: tuple(m.weight.shape) for key, m in iter_block_matrices(six_blocks())}
    dense = sum(o * i for o, i in shapes.values())
    seen = set()
    for hundredth in [*range(2, 100, 5), 30, 35, 45]:
        sizes = section(budget=hundredth / 100)
        free = plan_ranks(shapes, sizes, fixed_params=0)  # type: ignore[arg-type]
        fitting = plan_ranks(shapes, sizes, fixed_params=0, overparam=overparam)  # type: ignore[arg-type]
        assert fitting == plan_ranks(shapes, section(params=int(dense * hundredth / 100 + 1e-6)), fixed_params=0,
                                     overparam=overparam)  # type: ignore[arg-type]  # fmt: skip
        (largest,), (rank,) = ({r for r in ranks.values() if r is not None} for ranks in (free, fitting))
        # The nearest below: nothing between it and what the budget allows has factors.
        assert rank <= largest and not any(has_factors(r, overparam) for r in range(rank + 1, largest + 1))
        seen.add(rank)
    # Each rank once through the real thing, as a recipe would.
    for rank in sorted(seen)[:: 1 if chains == "mpo" else 10]:
        student = six_blocks()
        factorise(student, section(rank=rank), overparam)
        report = overparameterise(student, overparam)
        assert not report.skipped and len(report.rows) > 36


def test_energy_with_chains_keeps_that_share_with_the_smallest_rank_that_fits():
    overparam = OverparamSection(length=1)
    student = tiny()
    weights = {key: m.weight.detach().clone() for key, m in iter_block_matrices(student)}
    factorise(student, section(energy=0.6), overparam)
    ranks = set()
    for key, matrix in modules_of(student).items():
        squares = torch.linalg.svdvals(weights[key].double()).square()
        least = int((squares.cumsum(0) / squares.sum() < 0.6).sum()) + 1
        if isinstance(matrix, LowRankLinear):
            assert matrix.rank >= least and not any(has_factors(r, overparam) for r in range(least, matrix.rank))
            ranks.add((least, matrix.rank))
    assert any(least != rank for least, rank in ranks)
    assert not overparameterise(student, overparam).skipped


def test_a_rank_without_factors_is_refused_with_the_nearest_that_have_some():
    overparam = OverparamSection(length=1)
    with pytest.raises(InputError, match="rank 113") as caught:
        factorise(six_blocks(), section(rank=113), overparam)
    assert caught.value.where == "student.rank" and caught.value.hint == "use rank 112 or 114"
    for rank in nearest_ranks(113, overparam):
        student = six_blocks()
        factorise(student, section(rank=rank), overparam)
        assert len(overparameterise(student, overparam).rows) == 72
    # Where no chain takes the place of the factors, any rank will do.
    attention = OverparamSection(targets=["attention"])
    student = six_blocks()
    factorise(student, section(rank=199), attention)
    assert len(overparameterise(student, attention).rows) == 24


@pytest.mark.parametrize("wanted", ["67.1M", 45_800_000, "30M"])
def test_a_total_is_kept_and_used_up(wanted: str | int):
    model = bert_base()
    factorise(model, section(params=wanted))
    limit = int(float(wanted[:-1]) * 1e6) if isinstance(wanted, str) else wanted
    assert limit - 165_888 < count_parameters(model) <= limit


def test_matrices_stay_dense_where_factors_save_nothing():
    model = bert_base()
    notes = factorise(model, section(rank=400))
    kinds = {key[1]: type(m) for key, m in modules_of(model).items()}
    assert kinds["query"] is nn.Linear and kinds["ffn_in"] is LowRankLinear
    assert "save nothing there: 48 matrices" in notes[-1]


def test_energy_keeps_that_share_with_the_smallest_rank():
    model = tiny()
    weights = {key: m.weight.detach().clone() for key, m in iter_block_matrices(model)}
    factorise(model, section(energy=0.6))
    for key, matrix in modules_of(model).items():
        squares = torch.linalg.svdvals(weights[key].double()).square()
        kept = squares.cumsum(0) / squares.sum()
        if isinstance(matrix, LowRankLinear):
            assert kept[matrix.rank - 1] >= 0.6 and (matrix.rank == 1 or kept[matrix.rank - 2] < 0.6)
        else:
            rank = int((kept < 0.6).sum()) + 1
            assert rank >= break_even_rank(*weights[key].shape)
    assert any(isinstance(m, LowRankLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("sizes", "where"),
    [
        ({"rank": 43}, "student.rank"),
        ({"budget": 0.001}, "student.budget"),
        ({"params": 1000}, "student.params"),
        ({"embedding_rank": 30}, "student.embedding_rank"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes: dict, where: str):
    with pytest.raises(InputError) as caught:
        factorise(tiny(), section(**sizes))
    assert caught.value.where == where


def test_the_students_keys_are_the_original_ones_and_the_factor_pairs():
    teacher = tiny()
    student = copy.deepcopy(teacher)
    factorise(student, section(rank=8))
    extra = set(student.state_dict()) - set(teacher.state_dict())
    assert all(k.endswith((".up.weight", ".up.bias", ".down.weight")) for k in extra)
    assert len(extra) == 12 * 3


def test_merging_gives_the_plain_model_of_the_same_function():
    teacher = tiny()
    student = copy.deepcopy(teacher)
    factorise(student, section(rank=8, embedding_rank=10))
    logits = probe(student)
    merged = merge_low_rank(student)
    torch.testing.assert_close(probe(merged), logits, atol=1e-5, rtol=0)  # type: ignore[arg-type]
    assert list(merged.state_dict()) == list(teacher.state_dict())
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in teacher.state_dict().items()}


def test_a_factored_table_looks_up_the_product():
    table = nn.Embedding(40, 12, padding_idx=0)
    ids = torch.tensor([[0, 3, 39], [5, 5, 1]])
    full = LowRankEmbedding.from_embedding(table, 12)
    torch.testing.assert_close(full(ids), table(ids), atol=1e-6, rtol=1e-5)
    factored = LowRankEmbedding.from_embedding(table, 4)
    torch.testing.assert_close(factored(ids), factored.weight[ids], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(factored.merged()(ids), factored(ids), atol=1e-6, rtol=1e-5)
    assert sum(p.numel() for p in factored.parameters()) == 4 * (40 + 12)
