"""Distributions beside PyTorch's own: likelihoods, divergences, weights and temperatures."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributions
from torch.nn.functional import one_hot

from kdcli.objectives.distribution import Bernoulli, Categorical, Direction, Distribution, Normal


def draw(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
LABELS = torch.tensor([0, 3, 1, 1, 2])
SEVERAL = (draw(3, 5, 4) > 0).float()


def categorical(logits: Tensor) -> distributions.Distribution:
    return distributions.Categorical(logits=logits)


def bernoulli(logits: Tensor) -> distributions.Distribution:
    return distributions.Bernoulli(logits=logits)


CASES = [(Categorical(), categorical, LABELS), (Bernoulli(), bernoulli, SEVERAL)]
IDS = ["categorical", "bernoulli"]
Make = Callable[[Tensor], distributions.Distribution]


def rows(values: Tensor) -> Tensor:
    """Return a value a row: of several labels the mean."""
    return values if values.ndim == 1 else values.mean(-1)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighed"])
@pytest.mark.parametrize(("own", "make", "target"), CASES, ids=IDS)
def test_the_likelihood_is_the_librarys(own: Distribution, make: Make, target: Tensor, weights: Tensor | None):
    logits = draw(1, 5, 4)
    expected = rows(-make(logits).log_prob(target))
    expected = expected.mean() if weights is None else (expected * weights).sum()
    torch.testing.assert_close(own.nll(logits, target, weights), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighed"])
@pytest.mark.parametrize(("own", "make", "target"), CASES, ids=IDS)
def test_the_divergence_is_the_librarys_and_only_the_student_learns(
    own: Distribution, make: Make, target: Tensor, weights: Tensor | None, temperature: float
):
    student, teacher = draw(1, 5, 4).requires_grad_(), draw(2, 5, 4).requires_grad_()
    expected = rows(distributions.kl_divergence(make(teacher / temperature), make(student / temperature)))
    expected = expected.mean() if weights is None else (expected * weights).sum()
    plain = own.divergence(student, teacher, weights, temperature, scale=False)
    torch.testing.assert_close(plain, expected)
    scaled = own.divergence(student, teacher, weights, temperature)
    torch.testing.assert_close(scaled, expected * temperature**2)
    scaled.backward()
    (gradient,) = torch.autograd.grad(expected * temperature**2, student)
    torch.testing.assert_close(student.grad, gradient)
    assert teacher.grad is None
    assert own.divergence(teacher, teacher, weights, temperature).item() == pytest.approx(0.0, abs=1e-6)


def test_numbers_differ_by_their_square_and_without_the_scale_by_that_of_z_over_t():
    student, teacher = draw(1, 5, 1), draw(2, 5, 1)
    squares = (student - teacher).square().flatten()
    torch.testing.assert_close(Normal().divergence(student, teacher, temperature=3.0), squares.mean())
    torch.testing.assert_close(Normal().divergence(student, teacher, WEIGHTS), (squares * WEIGHTS).sum())
    torch.testing.assert_close(Normal().divergence(student, teacher, temperature=3.0, scale=False), squares.mean() / 9)
    torch.testing.assert_close(Normal().nll(student, teacher.flatten(), WEIGHTS), (squares * WEIGHTS).sum())


def test_views_are_scores_of_rows_that_do_not_see_each_other():
    logits = draw(1, 5, 4)
    of_classes = [score(logits) for score in Categorical().views(4, LABELS)]
    torch.testing.assert_close(torch.stack(of_classes), -logits.log_softmax(-1).sum(0))
    of_labels = [score(logits) for score in Bernoulli().views(4, SEVERAL)]
    torch.testing.assert_close(torch.stack(of_labels), -torch.sigmoid(logits).log().sum(0))
    (of_two,) = Categorical().views(2, LABELS % 2)
    expected = -(logits[:, :2].log_softmax(-1) * one_hot(LABELS % 2, 2)).sum()
    torch.testing.assert_close(of_two(logits[:, :2]), expected)


def test_directions_differ_by_their_angle_at_every_temperature_and_have_no_gold_answer():
    student, teacher = draw(1, 5, 4).requires_grad_(), draw(2, 5, 4).requires_grad_()
    cosines = (student / student.norm(dim=1, keepdim=True) * teacher / teacher.norm(dim=1, keepdim=True)).sum(1)
    torch.testing.assert_close(Direction().divergence(student, teacher, temperature=3.0), (1 - cosines).mean())
    torch.testing.assert_close(Direction().divergence(7 * student, teacher, WEIGHTS), ((1 - cosines) * WEIGHTS).sum())
    assert Direction().divergence(3 * teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    Direction().divergence(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    with pytest.raises(TypeError, match="no gold answer"):
        Direction().nll(student, teacher)


def test_the_score_of_no_gold_answers_is_zero():
    for distribution, target in ((Categorical(), torch.zeros(0, dtype=torch.long)), (Bernoulli(), torch.zeros(0, 3))):
        assert distribution.gold_view(target)(torch.zeros(0, 3)).item() == 0.0
