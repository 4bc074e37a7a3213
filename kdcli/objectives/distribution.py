"""What a row of logits parametrises, and how far two of the same kind are apart. Pure tensors.

Every loss is a weighted sum over rows: weights (n,) have the sum 1; without them it is the mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kdcli.errors import InputError
from kdcli.objectives.divergence import compare, compare_top
from kdcli.objectives.rows import RowLoss, Rows, chunk_of, log_softmax, row_sum
from kdcli.objectives.term import FORWARD_KL, Divergence
from kdcli.signals import Logits, TopTokens, VocabularyLogits


class Distribution(ABC):
    """A family of distributions, of which a row of logits is one."""

    is_point = False
    """True where a teacher's prediction says no more than a gold answer does: one number."""

    @abstractmethod
    def nll(self, logits: Logits, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of `target`, a scalar in fp32. logits: (n, classes)."""

    def divergence(
        self,
        student: Logits,
        teacher: Logits,
        weights: Tensor | None = None,
        temperature: float = 1.0,
        *,
        scale: bool = True,
    ) -> Tensor:
        """Return how far the student's distributions are from the teacher's at temperature T, a scalar in fp32.

        student, teacher: logits (n, classes); the teacher's get no gradient. scale: with the factor T^2, which keeps
        the gradient's size (Hinton et al. 2015, section 2).
        """
        value = self.distance(student, teacher.detach(), weights, temperature)
        return value * temperature**2 if scale else value

    @abstractmethod
    def distance(self, student: Logits, teacher: Logits, weights: Tensor | None, temperature: float) -> Tensor:
        """Return the same without the factor; the teacher's logits are detached."""

    def compared_by(self, divergence: Divergence, where: str | None = None) -> "Distribution":
        """Return the same, compared in another way.

        Raises InputError where that needs classes; where: the recipe's field that asks for it.
        """
        if divergence.name == FORWARD_KL.name:
            return self
        raise InputError(
            f"{divergence.name} compares distributions over classes, which this task's predictions are not",
            where=where,
            hint="leave it out",
        )

    def views(self, classes: int, target: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Return the scores whose gradients show what a prediction rests on (Wu et al. 2023, AD-KD, section 3.2).

        Each is a function from logits (n, classes) to a scalar, the sum over rows: here the loss of the gold answer.
        """
        return [self.gold_view(target)]

    def gold_view(self, target: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the loss of the gold answers as a function from logits (n, classes) to a scalar, the sum over rows.

        Of no rows it is 0.
        """
        weights = torch.ones(len(target), device=target.device)
        return lambda logits: self.nll(logits, target, weights)


class Categorical(Distribution):
    """One of several classes: softmax of the logits. target: (n,) class numbers, or (n, classes) probabilities.

    Sums over rows of a large table, or of logits that are formed some rows at a time, are formed so; then targets are
    class numbers. divergence: how two are compared.
    """

    def __init__(self, divergence: Divergence = FORWARD_KL) -> None:
        self.comparison = divergence

    def compared_by(self, divergence: Divergence, where: str | None = None) -> "Categorical":
        return Categorical(divergence)

    def nll(self, logits: Logits, target: Tensor, weights: Tensor | None = None) -> Tensor:
        if isinstance(logits, VocabularyLogits):
            return row_sum(self.nll_rows(logits, target, weights))
        if weights is None:
            return functional.cross_entropy(logits.float(), target)
        return (functional.cross_entropy(logits.float(), target, reduction="none") * weights).sum()

    def nll_rows(self, logits: Logits, target: Tensor, weights: Tensor | None = None) -> RowLoss:
        """Return the negative log-likelihood of `target`, class numbers, as a sum over rows."""

        def of(rows: Rows, slope: bool) -> tuple[Tensor, Tensor | None]:
            own, classes = rows.log_probabilities(), target[rows.part, None]
            values = -own.gather(1, classes)
            gradient = own.exp().scatter_add_(1, classes, -torch.ones_like(values)) if slope else None
            return values[:, 0], gradient

        return RowLoss(logits, of, weights)

    def distance(self, student: Logits, teacher: Logits, weights: Tensor | None, temperature: float) -> Tensor:
        """Return KL(teacher || student), or another divergence. Source: Hinton et al. 2015, equations 2-4."""
        usual = self.comparison == FORWARD_KL and weights is None and len(student) <= chunk_of(student)
        if usual and isinstance(student, Tensor) and isinstance(teacher, Tensor):
            return _kl(student, teacher, temperature)
        return row_sum(self.distance_rows(student, teacher, weights, temperature))

    def distance_rows(
        self, student: Logits, teacher: Logits, weights: Tensor | None = None, temperature: float = 1.0
    ) -> RowLoss:
        """Return the same as a sum over rows."""
        teacher = teacher.detach()
        if isinstance(teacher, TopTokens) and teacher.temperature != temperature:
            raise ValueError(f"probabilities at temperature {teacher.temperature} are none at {temperature}")

        def of(rows: Rows, slope: bool) -> tuple[Tensor, Tensor | None]:
            own, part = rows.log_probabilities(temperature), teacher[rows.part]
            if isinstance(part, TopTokens):
                values, gradient = compare_top(own, part.ids, part.log_probabilities, self.comparison, slope=slope)
            else:
                other = log_softmax(part.float().to(own.device), temperature)
                values, gradient = compare(own, other, self.comparison, slope=slope)
            return values, gradient.div_(temperature) if gradient is not None else None

        return RowLoss(student, of, weights)

    def views(self, classes: int, target: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Return -log p of every class in turn; of two classes, whose maps are the same, the gold answer's alone."""
        if classes <= 2:
            return super().views(classes, target)
        return [lambda z, c=c: -torch.log_softmax(z.float(), dim=-1)[:, c].sum() for c in range(classes)]  # type: ignore[misc]


class Normal(Distribution):
    """A number of unit variance around the logit: squared errors. logits: (n, 1); target: (n,)."""

    is_point = True

    def nll(self, logits: Logits, target: Tensor, weights: Tensor | None = None) -> Tensor:
        return _squared(logits.float().view(-1), target.float().view(-1), weights)

    def distance(self, student: Logits, teacher: Logits, weights: Tensor | None, temperature: float) -> Tensor:
        """Return the squared difference of the predictions divided by T."""
        return _squared(student.float().view(-1), teacher.float().view(-1), weights) / temperature**2


class Bernoulli(Distribution):
    """Any of several labels, each on its own: sigmoid of each logit. target: (n, labels), 0 to 1; means over labels."""

    def nll(self, logits: Logits, target: Tensor, weights: Tensor | None = None) -> Tensor:
        rows = functional.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none").mean(-1)
        return _weighted(rows, weights)

    def distance(self, student: Logits, teacher: Logits, weights: Tensor | None, temperature: float) -> Tensor:
        """Return KL(teacher || student) of each label, mean over labels."""
        own, other = student.float() / temperature, teacher.float() / temperature
        yes = functional.logsigmoid(other) - functional.logsigmoid(own)
        no = functional.logsigmoid(-other) - functional.logsigmoid(-own)
        probability = torch.sigmoid(other)
        return _weighted((probability * yes + (1.0 - probability) * no).mean(-1), weights)

    def views(self, classes: int, target: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """Return -log p of every label in turn."""
        return [lambda z, c=c: -functional.logsigmoid(z.float()[:, c]).sum() for c in range(classes)]  # type: ignore[misc]


class Direction(Distribution):
    """A point on the unit sphere: the direction of an embedding, of whatever length. logits: (n, width).

    There is no gold answer: what a text's embedding should be only another model says.
    """

    def nll(self, logits: Logits, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Raise TypeError: an embedding has no gold answer."""
        raise TypeError("an embedding has no gold answer to be compared with")

    def distance(self, student: Logits, teacher: Logits, weights: Tensor | None, temperature: float) -> Tensor:
        """Return 1 - cos divided by T^2, so that no temperature changes the scaled divergence. Widths must be equal."""
        rows = 1.0 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)
        return _weighted(rows, weights) / temperature**2


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows.mean() if weights is None else (rows * weights).sum()


def _squared(own: Tensor, other: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return functional.mse_loss(own, other)
    return (functional.mse_loss(own, other, reduction="none") * weights).sum()


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    own = torch.log_softmax(student.float() / temperature, dim=-1)
    target = torch.log_softmax(teacher.float() / temperature, dim=-1)
    return functional.kl_div(own, target, reduction="batchmean", log_target=True)


def row_weights(positions: Tensor, batch: int, seq: int) -> Tensor:
    """Return weights (positions,) that make a sum the mean over each example's positions, then over examples.

    positions: (positions,), into batch x seq laid flat. An example without a position counts as zero.
    """
    example = positions // seq
    counts = torch.zeros(batch, device=positions.device).index_add_(0, example, torch.ones_like(example).float())
    return 1.0 / (counts[example] * batch)
