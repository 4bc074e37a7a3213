"""Objectives of embeddings beside plain loops and PyTorch's own, and what a bridge is."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcli.objectives.embedding import (
    EmbeddingObjective,
    SimilarityObjective,
    cosine_distance,
    similarity_kl,
    squared_distance,
)
from kdcli.signals import Prediction, Signals


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signals(embeddings: Tensor) -> Signals:
    return Signals(torch.ones(len(embeddings), 1), 1, predictions=[Prediction(embeddings)])


def plain_similarity_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Return the same by a loop over rows and the others of each."""
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        log_p = [
            torch.log_softmax(
                torch.stack([functional.cosine_similarity(rows[i], rows[j], dim=0) for j in others]) / temperature, 0
            )
            for rows in (student, teacher)
        ]
        total += float((log_p[1].exp() * (log_p[1] - log_p[0])).sum())
    return total / len(student)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_similarities_are_those_of_each_row_to_all_others(temperature: float):
    student, teacher = draw(1, 6, 3).double(), draw(2, 6, 5).double()
    found = similarity_kl(student.float(), teacher.float(), temperature)
    assert found.item() == pytest.approx(plain_similarity_kl(student, teacher, temperature), rel=1e-4)


def test_rows_alike_to_the_others_in_the_same_way_differ_by_nothing():
    teacher = draw(3, 6, 5)
    turned = 4.0 * teacher @ torch.linalg.qr(draw(4, 5, 5))[0]
    assert similarity_kl(turned, teacher, 0.1).item() == pytest.approx(0.0, abs=1e-5)
    assert similarity_kl(teacher[:, :2], teacher, 0.1) > 1e-3


def test_a_row_alone_is_like_no_other_and_has_a_gradient_of_zero():
    student = draw(1, 1, 4).requires_grad_()
    value = similarity_kl(student, draw(2, 1, 4), 0.1)
    value.backward()
    assert value.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_distances_have_one_scale_for_every_width_and_length():
    student, teacher = functional.normalize(draw(1, 5, 8), dim=1), functional.normalize(draw(2, 5, 8), dim=1)
    # Of unit vectors |s - t|^2 = 2 (1 - cos).
    torch.testing.assert_close(squared_distance(student, teacher), 2 * cosine_distance(student, teacher))
    wide = torch.cat([student, student], 1), torch.cat([teacher, teacher], 1)
    torch.testing.assert_close(squared_distance(*wide), squared_distance(student, teacher))
    torch.testing.assert_close(squared_distance(7 * student, 7 * teacher), squared_distance(student, teacher))
    torch.testing.assert_close(cosine_distance(7 * student, teacher), cosine_distance(student, teacher))
    assert squared_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])).item() == 1.0


def test_the_teacher_gets_no_gradient():
    for measure in (squared_distance, cosine_distance, lambda s, t: similarity_kl(s, t, 0.1)):
        student, teacher = draw(1, 4, 3).requires_grad_(), draw(2, 4, 3).requires_grad_()
        measure(student, teacher).backward()
        assert teacher.grad is None and student.grad is not None and student.grad.any()


def test_a_bridge_stands_between_two_widths_and_is_kept_on_request():
    bridge = nn.Linear(3, 5)
    student, teacher = draw(1, 4, 3), draw(2, 4, 5)
    objective = EmbeddingObjective(cosine_distance, bridge=bridge)
    torch.testing.assert_close(
        objective(signals(student), signals(teacher), None), cosine_distance(bridge(student), teacher)
    )
    assert objective.kept is None
    keeping = EmbeddingObjective(squared_distance, bridge=bridge, keep=True)
    assert keeping.kept is bridge and set(dict(keeping.named_parameters())) == {"bridge.weight", "bridge.bias"}
    assert SimilarityObjective(0.1).kept is None


def test_the_temperature_sharpens_what_is_near():
    # Two neighbours at cosines 1 and 0: p = 1 / (1 + exp(-1 / T)).
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    for temperature in (0.5, 2.0):
        p = 1 / (1 + math.exp(-1 / temperature))
        # Row 1: p against 1 - p; row 2 and 3: halves and p, in one direction each.
        rows = [
            p * math.log(p / (1 / 2)) + (1 - p) * math.log((1 - p) / (1 / 2)),
            p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p),
            0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)),
        ]
        assert similarity_kl(student, teacher, temperature).item() == pytest.approx(sum(rows) / 3, rel=1e-5)
