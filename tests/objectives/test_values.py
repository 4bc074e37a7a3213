"""Values that can be worked out on paper, and plain loops that are obviously right."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from objectives.worlds import answered, asked, captured, mask_of
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from kdcli.models.capture import Capture
from kdcli.objectives.attention import AttentionObjective, attention_kl, attention_mse
from kdcli.objectives.attribution import attribution_loss, saliency
from kdcli.objectives.base import example_mean, token_mean
from kdcli.objectives.cosine import CosineObjective, cosine_distance
from kdcli.objectives.distribution import Categorical, Normal, row_weights
from kdcli.objectives.gold import GoldObjective, gold_loss
from kdcli.objectives.hidden import HiddenObjective, token_mse
from kdcli.objectives.matrix import MatrixObjective
from kdcli.objectives.output import OutputObjective, output_loss
from kdcli.objectives.relation import (
    SELF_RELATIONS,
    DirectRelationObjective,
    RelationKL,
    RelationObjective,
    relation_kl,
)
from kdcli.objectives.transport import cheap_weights, transport_plan
from kdcli.signals import Prediction, Request, Signals
from kdcli.tasks.masked_lm import KIND as MASKED_LM

LENGTHS = [5, 9, 2, 7]


def approx(value: float, rel: float = 1e-5) -> object:
    return pytest.approx(value, rel=rel, abs=1e-6)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logit_signals(logits: list[list[float]], target: Tensor | None = None) -> Signals:
    found = torch.tensor(logits)
    return Signals(torch.ones(len(found), 1), 1, predictions=[Prediction(found, target=target)])


# --- output and task -------------------------------------------------------------------------------------------------


def test_kl_of_a_quarter_against_a_half():
    # At T = 2 the teacher's logits (2 ln 3, 0) are the probabilities 3/4 and 1/4, and equal logits are halves.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert Categorical().divergence(student, teacher, temperature=2.0).item() == approx(4 * divergence)
    assert Categorical().divergence(student, teacher, temperature=2.0, scale=False).item() == approx(divergence)
    assert Categorical().nll(student / 2.0, (teacher / 2.0).softmax(-1)).item() == approx(math.log(2))
    # The other way round it is another number: the teacher's probabilities weigh.
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert Categorical().divergence(teacher, student, temperature=2.0, scale=False).item() == approx(backward)


def test_kl_is_a_mean_over_examples_and_a_sum_over_classes():
    teacher, student = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]]), torch.zeros(2, 2)
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert Categorical().divergence(student, teacher).item() == approx(first / 2)


def test_a_constant_added_to_logits_changes_nothing():
    student, teacher = draw(1, 4, 5), draw(2, 4, 5)
    shifted = Categorical().divergence(student + 3.0, teacher - 40.0, temperature=2.0)
    torch.testing.assert_close(
        shifted, Categorical().divergence(student, teacher, temperature=2.0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("classes", [2, 5])
def test_a_high_temperature_compares_centred_logits(classes):
    student, teacher = draw(1, 6, classes).double(), draw(2, 6, classes).double()
    difference = student - teacher
    difference = difference - difference.mean(-1, keepdim=True)
    limit = difference.square().sum(-1).mean() / (2 * classes)
    assert Categorical().divergence(student, teacher, temperature=100.0).item() == pytest.approx(limit.item(), rel=0.05)


def test_regression_compares_predictions_by_their_squared_difference():
    student = logit_signals([[1.0], [2.0], [0.0]], torch.tensor([3.0, 2.0, 1.0]))
    teacher = logit_signals([[3.0], [2.0], [1.0]])
    assert OutputObjective(Normal())(student, teacher, {}).item() == approx(5 / 3)
    assert GoldObjective(Normal())(student, teacher, {}).item() == approx(5 / 3)


def test_the_task_loss_is_the_mean_negative_log_probability():
    student = logit_signals([[math.log(3), 0.0], [0.0, 0.0]], torch.tensor([1, 0]))
    found = GoldObjective(Categorical())(student, student, {})
    assert found.item() == approx((math.log(4) + math.log(2)) / 2)


def test_several_tables_of_predictions_count_the_same():
    # As of an extractive answer, which has a start and an end.
    own, other = (
        [Prediction(draw(seed + k, 4, 3 + k), target=torch.tensor([0, 2, 1, 1])) for k in (0, 1)] for seed in (1, 5)
    )
    alone = [Categorical().nll(table.logits, table.target) for table in own]
    torch.testing.assert_close(gold_loss(own, Categorical()), torch.stack(alone).mean())
    apart = [Categorical().divergence(a.logits, b.logits, temperature=2.0) for a, b in zip(own, other, strict=True)]
    torch.testing.assert_close(output_loss(own, other, Categorical(), 2.0), torch.stack(apart).mean())


def test_tinyberts_prediction_loss_is_the_soft_cross_entropy_over_classes():
    student, teacher = draw(1, 4, 3).requires_grad_(), draw(2, 4, 3)
    # There the mean runs over classes, too.
    theirs = -(teacher.softmax(-1) * student.log_softmax(-1)).mean()
    torch.testing.assert_close(Categorical().nll(student, teacher.softmax(-1)) / 3, theirs)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()
    divergence = Categorical().divergence(student, teacher)
    torch.testing.assert_close((divergence + entropy) / 3, theirs)
    (own,) = torch.autograd.grad(divergence / 3, student)
    (other,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


# --- reductions, hidden states, matrices -----------------------------------------------------------------------------


def test_every_example_counts_the_same_whatever_its_length():
    values = torch.tensor([[4.0, 99.0, 99.0], [1.0, 2.0, 3.0]])
    mask = mask_of([1, 3])
    assert example_mean(values, mask).tolist() == [4.0, 2.0]
    assert token_mean(values, mask).item() == approx(3.0)


STUDENT = torch.tensor([[[1.0, 2.0], [9.0, 9.0]], [[0.0, 0.0], [1.0, 1.0]]])
TEACHER = torch.tensor([[[3.0, 2.0], [0.0, 5.0]], [[2.0, 0.0], [1.0, 5.0]]])


def test_squared_differences_by_hand():
    # First example: ((1 - 3)^2 + 0) / 2 = 2 at its only token. Second: 4 / 2 = 2 and 16 / 2 = 8, so 5.
    assert token_mse(STUDENT, TEACHER, mask_of([1, 2])).item() == approx((2 + 5) / 2)


def test_relative_squared_differences_by_hand():
    # Mean squares of the teacher: (9 + 4) / 2 = 6.5; (4 / 2 + 26 / 2) / 2 = 7.5.
    found = token_mse(STUDENT, TEACHER, mask_of([1, 2]), match_norm=True)
    assert found.item() == approx((2 / 6.5 + 5 / 7.5) / 2)
    # Token by token, as decoders are compared: the second example's have 2 and 13.
    found = token_mse(STUDENT, TEACHER, mask_of([1, 2]), match_norm=True, by_token=True)
    assert found.item() == approx((2 / 6.5 + (2 / 2 + 8 / 13) / 2) / 2)


def test_a_relative_difference_does_not_notice_a_common_scale():
    mask = mask_of(LENGTHS)
    student, teacher = draw(1, 4, 9, 6), draw(2, 4, 9, 6)
    plain = token_mse(student, teacher, mask, match_norm=True)
    torch.testing.assert_close(token_mse(50 * student, 50 * teacher, mask, match_norm=True), plain)
    assert token_mse(torch.zeros_like(teacher), teacher, mask, match_norm=True).item() == approx(1.0)


def test_a_silent_teacher_does_not_divide_by_zero():
    mask = mask_of([1, 2])
    student = torch.zeros_like(STUDENT).requires_grad_()
    found = token_mse(student, torch.zeros_like(TEACHER), mask, match_norm=True)
    found.backward()
    assert found.item() == 0.0 and torch.isfinite(student.grad).all()


def test_hidden_and_matrix_objectives_are_means_over_pairs_and_names():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask), captured(2, mask)
    pairs = [(1, 2), (3, 3), (3, 1)]
    expected = [token_mse(student.hidden[s], teacher.hidden[t], mask) for s, t in pairs]
    torch.testing.assert_close(HiddenObjective(pairs)(student, teacher, {}), torch.stack(expected).mean())
    names = ("query", "ffn_out")
    expected = [
        token_mse(student.matrices[(s, n)], teacher.matrices[(t, n)], mask, match_norm=True)
        for s, t in pairs
        for n in names
    ]
    torch.testing.assert_close(MatrixObjective(pairs, names)(student, teacher, {}), torch.stack(expected).mean())


def test_a_bridge_is_a_linear_map_before_the_comparison():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=8), captured(2, mask, width=16)
    for shared in (False, True):
        objective = HiddenObjective([(0, 0), (3, 3)], widths=(8, 16), bridge=True, shared=shared)
        maps = [objective.bridges["shared" if shared else name] for name in ("0", "3")]
        assert len(objective.bridges) == (1 if shared else 2)
        expected = []
        for layer, linear in zip((0, 3), maps, strict=True):
            state = student.hidden[layer] @ linear.weight.T
            state = state + linear.bias if shared else state
            expected.append(token_mse(state, teacher.hidden[layer], mask))
        torch.testing.assert_close(objective(student, teacher, {}), torch.stack(expected).mean())


def test_redrawn_pairs_are_those_of_the_epoch():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask), captured(2, mask)
    draws = [[(1, 1), (2, 2)], [(1, 2), (2, 3)]]
    objective = HiddenObjective(draws[0], redraw=lambda epoch: draws[epoch], teacher_layers=range(1, 4))
    assert objective.teacher_request().hidden == {1, 2, 3} and objective.student_request().hidden == {1, 2}
    for epoch in (0, 1, 0):
        objective.begin_epoch(epoch, 2)
        torch.testing.assert_close(objective(student, teacher, {}), HiddenObjective(draws[epoch])(student, teacher, {}))


# --- attention -------------------------------------------------------------------------------------------------------


def scores_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[None, None]


def test_attention_divergence_by_hand_with_a_padded_token():
    third = 50.0  # what stands at padding does not matter
    teacher = scores_of([[math.log(3), 0.0, third], [1.0, 1.0, third], [third, 0.0, 0.0]])
    student = scores_of([[0.0, 0.0, -third], [7.0, 7.0, third], [0.0, third, 0.0]])
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert attention_kl(student, teacher, mask_of([2], seq=3)).item() == approx(first / 2)


def test_attention_score_difference_by_hand_with_a_padded_token():
    third = 50.0
    teacher = scores_of([[3.0, 0.0, third], [1.0, 1.0, third], [third, 0.0, 0.0]])
    student = scores_of([[1.0, 0.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    # Squares 4, 0, 0, 9 over the four real pairs.
    assert attention_mse(student, teacher, mask_of([2], seq=3)).item() == approx(13 / 4)


def test_attention_terms_are_means_over_heads_and_examples():
    mask = mask_of(LENGTHS)
    student, teacher = draw(1, 4, 3, 9, 9), draw(2, 4, 3, 9, 9)
    divergences, squares = [], []
    for b, n in enumerate(LENGTHS):
        for h in range(3):
            own, other = student[b, h, :n, :n], teacher[b, h, :n, :n]
            target = other.softmax(-1)
            divergences.append((target * (target.log() - own.log_softmax(-1))).sum(-1).mean())
            squares.append((own - other).square().mean())
    torch.testing.assert_close(attention_kl(student, teacher, mask), torch.stack(divergences).mean())
    torch.testing.assert_close(attention_mse(student, teacher, mask), torch.stack(squares).mean())


def test_a_constant_added_to_a_row_of_scores_does_not_change_where_heads_look():
    mask = mask_of(LENGTHS)
    student, teacher = draw(1, 4, 3, 9, 9), draw(2, 4, 3, 9, 9)
    torch.testing.assert_close(
        attention_kl(student + draw(3, 4, 3, 9, 1), teacher, mask),
        attention_kl(student, teacher, mask),
        rtol=1e-4,
        atol=1e-6,
    )


def test_scores_are_scaled_products_of_the_heads_queries_and_keys():
    mask = mask_of(LENGTHS)
    signals = captured(1, mask, width=16, heads=4)
    query, key = signals.matrices[(2, "query")], signals.matrices[(2, "key")]
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        expected = query[:, :, part] @ key[:, :, part].mT / 2.0
        torch.testing.assert_close(signals.attention_scores(2)[:, head], expected)


# --- relations -------------------------------------------------------------------------------------------------------


def relation_rows(x: Tensor, y: Tensor) -> Tensor:
    """Return log-softmax of x y^T / sqrt(width); x, y: (tokens, width of one head)."""
    return torch.log_softmax(x @ y.T / math.sqrt(x.shape[1]), dim=-1)


def relation_by_loop(
    student: Tensor,
    teacher: Tensor,
    lengths: list[int],
    heads: int,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
) -> Tensor:
    """The relation loss one example, head and row at a time; real tokens are cut out, nothing is masked."""
    columns = student if student_columns is None else student_columns
    targets = teacher if teacher_columns is None else teacher_columns
    own_size, other_size = student.shape[-1] // heads, teacher.shape[-1] // heads
    examples = []
    for b, n in enumerate(lengths):
        total = torch.zeros((), dtype=student.dtype)
        for h in range(heads):
            own, other = slice(h * own_size, (h + 1) * own_size), slice(h * other_size, (h + 1) * other_size)
            found = relation_rows(student[b, :n, own], columns[b, :n, own])
            wanted = relation_rows(teacher[b, :n, other], targets[b, :n, other])
            for row in range(n):
                total = total + (wanted[row].exp() * (wanted[row] - found[row])).sum()
        examples.append(total / (heads * n))
    return torch.stack(examples).mean()


def vectors(widths: tuple[int, int] = (16, 24), count: int = 4) -> Iterator[Tensor]:
    for seed in range(count):
        yield draw(seed, 4, 9, widths[seed % 2]).requires_grad_()


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("crossed", [False, True])
def test_relations_agree_with_a_plain_loop_in_value_and_gradient(heads, crossed):
    student, teacher, columns, targets = vectors()
    mask = mask_of(LENGTHS)
    extra = {"student_columns": columns, "teacher_columns": targets} if crossed else {}
    found = relation_kl(student, teacher, mask, heads, **extra)
    expected = relation_by_loop(student, teacher, LENGTHS, heads, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    wanted = [student, columns] if crossed else [student]
    for own, other in zip(
        torch.autograd.grad(3.0 * found, wanted), torch.autograd.grad(3.0 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)
        assert own[mask == 0].abs().max() == 0.0
    found = relation_kl(student, teacher, mask, heads, **extra)
    assert torch.autograd.grad(found, teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 100])
def test_working_chunk_by_chunk_changes_neither_value_nor_gradient(chunk):
    student, teacher, columns, targets = vectors()
    mask = mask_of(LENGTHS)

    def run(size: int) -> list[Tensor]:
        found = relation_kl(student, teacher, mask, 8, student_columns=columns, teacher_columns=targets, chunk=size)
        return [found, *torch.autograd.grad(found, [student, columns])]

    for own, other in zip(run(chunk), run(8), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-8)


def test_the_hand_written_gradient_is_the_derivative():
    mask = mask_of([3, 5])
    generator = torch.Generator().manual_seed(0)

    def heads_of(size: int) -> Tensor:
        return torch.randn(2, 4, 5, size, generator=generator, dtype=torch.float64)

    query, key = heads_of(3).requires_grad_(), heads_of(3).requires_grad_()
    other_query, other_key = heads_of(2), heads_of(2)
    for chunk in (1, 3, 4):
        assert torch.autograd.gradcheck(
            lambda q, k, chunk=chunk: RelationKL.apply(q, k, other_query, other_key, mask, chunk), (query, key)
        )
        segments = torch.tensor([0, 0, 1, 1, 1]).expand(2, 5)
        assert torch.autograd.gradcheck(
            lambda q, k, s=segments, chunk=chunk: RelationKL.apply(q, k, other_query, other_key, mask, chunk, s),
            (query, key),
        )
        # The same tensor on both sides gets both gradients.
        assert torch.autograd.gradcheck(
            lambda q, chunk=chunk: RelationKL.apply(q, q, other_query, other_key, mask, chunk), (query,)
        )


def test_value_relations_by_hand():
    # One head, width 1, two tokens. Teacher (1, 0): rows softmax(1, 0) and softmax(0, 0); student: all zero.
    teacher, student = torch.tensor([[[1.0], [0.0]]]), torch.zeros(1, 2, 1)
    p = 1 / (1 + math.exp(-1.0))
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert relation_kl(student, teacher, mask_of([2]), 1).item() == approx(first / 2)
    # Twice the width, each number twice: the product doubles, the scale only takes the root of two.
    p = 1 / (1 + math.exp(-math.sqrt(2)))
    first = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    wide = teacher.repeat(1, 1, 2)
    assert relation_kl(student, wide, mask_of([2]), 1).item() == approx(first / 2)


def test_minilm_compares_models_of_different_widths_head_by_head():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=16, heads=4), captured(2, mask, width=24, heads=4, layers=5)
    found = RelationObjective([(3, 5)], relations={("value", "value"): 1.0})(student, teacher, {})
    expected = relation_by_loop(student.matrices[(3, "value")], teacher.matrices[(5, "value")], LENGTHS, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_relations_of_queries_and_keys_in_the_models_own_heads_are_attention():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=16, heads=4), captured(2, mask, width=24, heads=4)
    pairs = [(1, 2), (3, 3)]
    found = RelationObjective(pairs, relations={("query", "key"): 1.0})(student, teacher, {})
    torch.testing.assert_close(found, AttentionObjective(pairs)(student, teacher, {}), rtol=1e-5, atol=1e-6)


def test_minilmv2_is_the_sum_of_three_relations_and_the_mean_over_pairs():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=16, heads=4), captured(2, mask, width=24, heads=3)
    found = RelationObjective([(3, 2), (2, 1)], heads=8)(student, teacher, {})
    parts = [
        relation_by_loop(student.matrices[(s, name)], teacher.matrices[(t, name)], LENGTHS, 8)
        for s, t in ((3, 2), (2, 1))
        for name in ("query", "key", "value")
    ]
    torch.testing.assert_close(found, torch.stack(parts).sum() / 2, rtol=1e-5, atol=1e-6)
    assert set(SELF_RELATIONS.values()) == {1.0}


def test_relations_are_weighted_and_those_of_no_weight_not_even_captured():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask), captured(2, mask)
    weights = {("query", "query"): 0.5, ("key", "value"): 2.0, ("attention_output", "attention_output"): 0.0}
    objective = RelationObjective([(3, 3)], relations=weights, heads=4)
    assert objective.student_request().matrices == {(3, name) for name in ("query", "key", "value")}
    own, other = student.matrices, teacher.matrices
    expected = 0.5 * relation_by_loop(own[(3, "query")], other[(3, "query")], LENGTHS, 4)
    expected = expected + 2.0 * relation_by_loop(
        own[(3, "key")], other[(3, "key")], LENGTHS, 4, own[(3, "value")], other[(3, "value")]
    )
    torch.testing.assert_close(objective(student, teacher, {}), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [(1, 2), (2, 16), (8, 4)])
def test_the_models_own_heads_do_not_matter_to_minilmv2(heads):
    mask = mask_of(LENGTHS)
    objective = RelationObjective([(3, 3)], heads=8)
    plain = objective(captured(1, mask, heads=4), captured(2, mask, heads=4), {})
    assert objective(captured(1, mask, heads=heads[0]), captured(2, mask, heads=heads[1]), {}).item() == plain.item()


def test_permuting_relation_heads_in_both_models_changes_nothing():
    student, teacher, *_ = vectors()
    mask, order = mask_of(LENGTHS), torch.tensor([3, 0, 2, 1])

    def permuted(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, -1))[:, :, order].flatten(2)

    plain = relation_kl(student, teacher, mask, 4)
    torch.testing.assert_close(relation_kl(permuted(student), permuted(teacher), mask, 4), plain)
    assert abs(relation_kl(permuted(student), teacher, mask, 4) - plain) > 1e-3


def test_the_depth_of_either_model_does_not_matter_to_relations():
    mask = mask_of(LENGTHS)
    deep, flat = captured(1, mask, layers=6), captured(1, mask, layers=3)
    objective = RelationObjective([(3, 2)], heads=8)
    teacher = captured(2, mask)
    assert objective(deep, teacher, {}).item() == objective(flat, teacher, {}).item()


def test_heads_that_do_not_divide_a_width_are_refused():
    student, teacher, *_ = vectors()
    mask = mask_of(LENGTHS)
    with pytest.raises(ValueError, match="5 relation heads do not divide a width of 16"):
        relation_kl(student, teacher, mask, 5)
    with pytest.raises(ValueError, match="12 relation heads do not divide the widths 16 and 24"):
        DirectRelationObjective([(1, 1)], widths={"query": (16, 24)}, heads=12)
    with pytest.raises(ValueError, match="not 4, 2"):
        RelationObjective([(1, 1)])(captured(1, mask, heads=4), captured(2, mask, heads=2), {})


@pytest.mark.parametrize("widths", [(16, 24), (24, 16), (16, 16)])
def test_directly_matched_vectors_go_through_a_map_of_each_head(widths):
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=widths[0]), captured(2, mask, width=widths[1])
    objective = DirectRelationObjective(
        [(3, 2)], widths=dict.fromkeys(("query", "value"), widths), heads=8, names={"query": 1.0, "value": 0.5}
    )
    own_size, other_size = widths[0] // 8, widths[1] // 8
    total = torch.zeros(())
    for name, weight in (("query", 1.0), ("value", 0.5)):
        bridges = objective.bridges[f"3_{name}"]
        for head in range(8):
            own = student.matrices[(3, name)][:, :, head * own_size : (head + 1) * own_size] @ bridges[head]
            other = teacher.matrices[(2, name)][:, :, head * other_size : (head + 1) * other_size]
            total = total + weight * token_mse(own, other, mask) / 8
    torch.testing.assert_close(objective(student, teacher, {}), total)
    for parameter in objective.parameters():
        assert parameter.shape == (8, own_size, other_size)
        small = parameter if own_size <= other_size else parameter.mT
        torch.testing.assert_close(small @ small.mT, torch.eye(min(own_size, other_size)).expand(8, -1, -1))


# --- cosine ----------------------------------------------------------------------------------------------------------


def test_cosine_distance_of_known_angles():
    mask = mask_of([1, 2])
    teacher = torch.tensor([[[2.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])
    student = torch.tensor([[[1.0, math.sqrt(3)], [5.0, 5.0]], [[0.0, 7.0], [0.0, -0.1]]])
    # 60 degrees, padding; 90 degrees, 180 degrees.
    assert cosine_distance(student, teacher, mask).item() == approx((0.5 + (1.0 + 2.0) / 2) / 2)


def test_cosine_distance_does_not_notice_lengths():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask), captured(2, mask)
    plain = CosineObjective([(3, 3), (2, 1)])(student, teacher, {})
    student.hidden = {layer: 40.0 * x for layer, x in student.hidden.items()}
    teacher.hidden = {layer: 0.1 * x for layer, x in teacher.hidden.items()}
    torch.testing.assert_close(CosineObjective([(3, 3), (2, 1)])(student, teacher, {}), plain)


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_position_weights_by_hand():
    # Examples of 4 tokens: positions 1 and 3 of the first, none of the second, 0 of the third.
    weights = row_weights(torch.tensor([1, 3, 8]), 3, 4)
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 6, 1 / 3]))
    full = row_weights(torch.tensor([1, 3, 4, 8]), 3, 4)
    assert full.sum().item() == approx(1.0)


def words() -> tuple[Signals, Signals, dict[str, Tensor]]:
    """Two examples of 2 and 3 real tokens, a vocabulary of 5; masked are (0, 1), (1, 0) and (1, 2)."""
    mask = mask_of([2, 3])
    labels = torch.full((2, 3), -100)
    labels[0, 1], labels[1, 0], labels[1, 2] = 4, 0, 2
    return captured(1, mask, vocabulary=5), captured(2, mask, vocabulary=5), asked(mask, labels)


def divergence_at(student: Signals, teacher: Signals, places: list[tuple[int, int]], t: float) -> Tensor:
    rows = []
    own, other = (signals.predictions[0].logits for signals in (student, teacher))
    for b, s in places:
        wanted = (other[b, s] / t).softmax(-1)
        rows.append((wanted * (wanted.log() - (own[b, s] / t).log_softmax(-1))).sum() * t**2)
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_vocabulary_term_at_masked_and_at_all_real_positions(temperature):
    student, teacher, batch = words()
    a, b, c = divergence_at(student, teacher, [(0, 1), (1, 0), (1, 2)], temperature)
    pair = (answered(signals, batch) for signals in (student, teacher))
    torch.testing.assert_close(OutputObjective(Categorical(), temperature)(*pair, batch), (a + (b + c) / 2) / 2)
    first = divergence_at(student, teacher, [(0, 0), (0, 1)], temperature).mean()
    second = divergence_at(student, teacher, [(1, 0), (1, 1), (1, 2)], temperature).mean()
    pair = (answered(signals, batch, everywhere=True) for signals in (student, teacher))
    found = OutputObjective(Categorical(), temperature, all_positions=True)(*pair, batch)
    torch.testing.assert_close(found, (first + second) / 2)


def test_the_plain_vocabulary_divergence_is_the_mean_over_positions():
    student, teacher, _ = words()
    rows = divergence_at(student, teacher, [(0, 1), (1, 0), (1, 2)], 2.0)
    picked = [signals.predictions[0].logits[[0, 1, 1], [1, 0, 2]] for signals in (student, teacher)]
    plain = Categorical().divergence(*picked, temperature=2.0)
    torch.testing.assert_close(plain, rows.mean())
    weights = torch.tensor([0.5, 0.3, 0.1])
    torch.testing.assert_close(Categorical().divergence(*picked, weights, 2.0), (rows * weights).sum())
    # With equal weights the large table's way gives what the plain one does, and the same gradient.
    own, other = (picked[0].detach().requires_grad_() for _ in range(2))
    Categorical().divergence(own, picked[1], torch.full((3,), 1 / 3), 2.0).backward()
    Categorical().divergence(other, picked[1], temperature=2.0).backward()
    torch.testing.assert_close(own.grad, other.grad)


def test_logits_of_single_positions_give_what_all_logits_give():
    student, teacher, batch = words()
    for everywhere, name in ((False, "masked_positions"), (True, "real_positions")):
        objective = OutputObjective(Categorical(), 2.0)
        found = []
        for flat in (False, True):
            pair = []
            for signals in (student, teacher):
                logits = signals.predictions[0].logits
                # As a head that runs at these positions alone gives them.
                chosen = logits.flatten(0, 1)[batch[name]][None] if flat else logits
                given = Signals(signals.mask, 1, predictions=[Prediction(chosen)])
                pair.append(answered(given, batch, everywhere=everywhere))
            found.append(torch.stack([objective(*pair, batch), GoldObjective(Categorical())(*pair, batch)]))
        torch.testing.assert_close(*found)


def test_the_gold_loss_is_of_the_masked_tokens_wherever_else_is_predicted():
    student, _, batch = words()
    gold = GoldObjective(Categorical())
    alone, among = (answered(student, batch, everywhere=everywhere) for everywhere in (False, True))
    torch.testing.assert_close(gold(among, among, batch), gold(alone, alone, batch))


def test_a_batch_in_which_nothing_is_masked_costs_nothing():
    student, teacher, batch = words()
    batch = asked(student.mask, torch.full_like(batch["labels"], -100))
    for objective in (OutputObjective(Categorical()), GoldObjective(Categorical())):
        found = objective(answered(student, batch), answered(teacher, batch), batch)
        found.backward()
        assert found.item() == 0.0


@pytest.fixture(scope="module")
def language_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ).eval()


def masked_batch() -> dict[str, Tensor]:
    mask = mask_of(LENGTHS)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, mask.shape, generator=generator) * mask
    labels = torch.full_like(ids, -100)
    for b, s, word in ((0, 0, 7), (0, 3, 9), (1, 8, 59), (1, 2, 0), (1, 4, 30), (2, 1, 5), (3, 6, 11)):
        labels[b, s] = word
    return {"input_ids": ids, "attention_mask": mask, **asked(mask, labels)}


def test_the_masked_word_loss_is_the_librarys_own(language_model):
    batch = masked_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with Capture(language_model, Request(logits=True), MASKED_LM) as capture:
        signals = capture.run(batch)
    capture.close()
    (table,) = signals.predictions
    assert table.logits.shape == (7, 60)
    # The library takes the mean over all masked words of the batch.
    theirs = language_model(**inputs, labels=batch["labels"]).loss
    torch.testing.assert_close(Categorical().nll(table.logits, table.target), theirs)
    # The objective takes it of each example first.
    alone = [
        language_model(**{k: v[b : b + 1] for k, v in inputs.items()}, labels=batch["labels"][b : b + 1]).loss
        for b in range(4)
    ]
    torch.testing.assert_close(GoldObjective(Categorical())(signals, signals, batch), torch.stack(alone).mean())


def test_only_wanted_positions_are_captured_and_they_are_the_librarys(language_model):
    batch = masked_batch()
    everything = language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for every, name in ((False, "masked_positions"), (True, "real_positions")):
        with Capture(language_model, Request(logits=True, all_positions=every), MASKED_LM) as capture:
            signals = capture.run(batch)
        capture.close()
        torch.testing.assert_close(signals.predictions[0].logits, everything.flatten(0, 1)[batch[name]])


def test_segments_reach_objectives_and_never_the_model(language_model):
    batch = masked_batch()
    segments = (torch.arange(9) > 3).long().expand(4, 9)
    request = Request(logits=True, matrices=frozenset({(2, "value")}))
    with Capture(language_model, request, MASKED_LM) as capture:
        plain, packed = capture.run(batch), capture.run({**batch, "segments": segments})
    capture.close()
    assert plain.segments is None and torch.equal(packed.segments, segments)
    # The model attends over the whole block, and would not know a further input.
    assert torch.equal(packed.predictions[0].logits, plain.predictions[0].logits)
    objective = RelationObjective([(2, 2)], relations={("value", "value"): 1.0}, heads=8)
    teacher = captured(1, batch["attention_mask"], width=32)
    assert abs(objective(packed, teacher, batch) - objective(plain, teacher, batch)) > 1e-3


# --- attribution -----------------------------------------------------------------------------------------------------


def test_saliency_is_the_length_of_gradient_times_input_over_the_largest_features():
    gradient, embedding = torch.tensor([[[1.0, 2.0, -1.0, 0.0]]]), torch.tensor([[[3.0, -2.0, 1.0, 9.0]]])
    # Products 3, -4, -1, 0.
    assert saliency(gradient, embedding).item() == approx(math.sqrt(26))
    assert saliency(gradient, embedding, 2).item() == approx(5.0)
    assert saliency(gradient, embedding, 1).item() == approx(4.0)
    assert saliency(gradient, embedding, 4).item() == approx(math.sqrt(26))


def test_attribution_maps_are_compared_at_length_one():
    teacher, student = torch.tensor([[3.0, 4.0, 9.0]]), torch.tensor([[10.0, 0.0, 7.0]])
    # Over two real tokens: (0.6, 0.8) against (1, 0).
    found = attribution_loss(student, teacher, mask_of([2], seq=3))
    assert found.item() == approx((0.16 + 0.64) / 2)
    scaled = attribution_loss(0.01 * student, 100 * teacher, mask_of([2], seq=3))
    torch.testing.assert_close(scaled, found)
    assert attribution_loss(torch.zeros(1, 3), teacher, mask_of([2], seq=3)).item() == approx(0.5)


# --- transport -------------------------------------------------------------------------------------------------------


def test_weights_are_inverse_to_costs_down_to_a_thousandth_of_the_highest():
    weights = np.array([0.5, 0.25, 0.25])
    # A unit of flow costs 0, 1 and 4; nothing counts as 0.004. Inverses: 250, 1 and 1/4.
    found = cheap_weights(np.array([0.0, 0.25, 1.0]), weights)
    assert found == pytest.approx(np.array([250.0, 1.0, 0.25]) / 251.25)
    assert cheap_weights(np.zeros(3), weights) == pytest.approx(weights)
    assert cheap_weights(np.array([0.1, np.nan, 0.2]), weights) == pytest.approx(weights)


def test_a_plan_by_hand():
    # The teacher's two layers want 0.5 each; the dear pair (0, 1) is used for no more than must be.
    cost = np.array([[1.0, 10.0], [2.0, 3.0]])
    flow = transport_plan(cost, np.array([0.7, 0.3]), np.array([0.5, 0.5]))
    assert flow == pytest.approx(np.array([[0.5, 0.2], [0.0, 0.3]]), abs=1e-9)
    # One student layer in three goes to half of a teacher layer: thirds are shared out in sixths.
    even = transport_plan(np.array([[0.0, 9.0], [1.0, 1.0], [9.0, 0.0]]), np.ones(3), np.ones(2))
    assert even == pytest.approx(np.array([[2, 0], [1, 1], [0, 2]]) / 6)
