"""Projections of a layer's weight on both sides, and where they start: algebra of second moments alone.

A space is a matrix S (teacher width, student width) with orthonormal columns: the student's vector z stands for S^T x.
Idea: Low-Rank Clone (arXiv 2505.12781), section 3; the start is this package's own.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdcli.tensors.parametrization import plain_weight

RIDGE = 1e-6
"""What is added to a matrix before it is inverted, relative to the mean of its diagonal."""


@dataclass
class Moment:
    """Sums over tokens of vectors x (n, width) and of x x^T, in fp64."""

    count: int = 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def add(self, vectors: Tensor) -> None:
        """Add the rows of `vectors`, (n, width)."""
        rows = vectors.double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.square = self.square + rows.T @ rows

    def cpu(self) -> "Moment":
        """Return the same on the CPU."""
        return Moment(self.count, torch.as_tensor(self.total).cpu(), torch.as_tensor(self.square).cpu())

    @property
    def mean(self) -> Tensor:
        """E[x], (width,)."""
        return torch.as_tensor(self.total) / self.count

    @property
    def second(self) -> Tensor:
        """E[x x^T], (width, width)."""
        return torch.as_tensor(self.square) / self.count

    @property
    def covariance(self) -> Tensor:
        """E[(x - E[x]) (x - E[x])^T], (width, width)."""
        return self.second - torch.outer(self.mean, self.mean)

    def spread(self, centred: bool) -> Tensor:
        """Return the covariance, or where no bias can make up for the mean (`centred` false) the second moment."""
        return self.covariance if centred else self.second


def pivots(spread: Tensor, count: int) -> list[int]:
    """Return the features, in rising order, from which the others follow best, chosen one by one (pivoted Cholesky)."""
    found: list[int] = []
    left = spread.clone()
    for _ in range(count):
        gain = left.square().sum(0) / left.diagonal().clamp(min=1e-12)
        gain[found] = -1.0
        best = int(gain.argmax())
        found.append(best)
        left -= torch.outer(left[:, best], left[best]) / left[best, best].clamp(min=1e-12)
    return sorted(found)


def directions(spread: Tensor, count: int) -> Tensor:
    """Return S (width, count): an orthonormal basis of the principal directions, turned towards single features.

    Norms and activations act on features one by one, so that the basis matters: of all bases it is the nearest to the
    `count` features that say most about the others. With as many directions as features it is the identity.
    """
    width = len(spread)
    if count == width:
        return torch.eye(width, dtype=spread.dtype)
    principal = torch.linalg.eigh(spread)[1][:, -count:]
    left, _, right = torch.linalg.svd(principal[pivots(spread, count)].T)
    return principal @ (left @ right)


def selection(width: int, kept: Iterable[int]) -> Tensor:
    """Return S (width, kept): the features `kept`, in fp64."""
    return torch.eye(width, dtype=torch.float64)[:, list(kept)]


def reading(spread: Tensor, space: Tensor) -> Tensor:
    """Return R (width, count), the best linear map from z = S^T x back to x; S itself where it has all of x.

    R = C S (S^T C S)^-1, written as S and what else z tells of x.
    """
    inner = space.T @ spread @ space
    rest = spread @ space - space @ inner
    inner.diagonal().add_(RIDGE * inner.diagonal().mean().clamp(min=1e-12))
    return space + torch.linalg.solve(inner, rest.T).T


def fitted_norm(
    gain: Tensor, bias: Tensor | None, output: Moment | None, space: Tensor, *, centres: bool
) -> tuple[Tensor, Tensor | None]:
    """Return gain and bias (count,) of a norm of S^T u that follows a norm of u feature by feature (least squares).

    gain, bias: (width,), of the teacher's norm; output: of its outputs, None where it was never run; centres: whether
    the norm takes the mean over features away, as a layer norm does. The output is to be S^T y for the teacher's y.
    Follows from the output's moments alone: y = g * v + b gives those of v, and S^T u is S^T v but for its length.
    """
    width, count = space.shape
    if width == count:
        return gain, bias
    simple = space.square().T @ gain
    if output is None:
        return simple, None if bias is None else space.T @ bias
    known = gain.abs() > 1e-6
    inverse = torch.where(known, 1.0 / torch.where(known, gain, 1.0), 0.0)
    mean = (output.mean - (0.0 if bias is None else bias)) * inverse
    covariance = output.covariance * torch.outer(inverse, inverse)
    second = covariance + torch.outer(mean, mean)
    down = space.T - space.T.mean(0) if centres else space.T
    length = math.sqrt(count / float((down @ second * down).sum()))
    spread = covariance if bias is not None else second
    own = (down @ spread * down).sum(1)
    fitted = (down @ spread * (space.T * gain)).sum(1) / own.clamp(min=1e-12) / length
    fitted = torch.where(own > 1e-9, fitted, simple)
    if bias is None:
        return fitted, None
    return fitted, space.T @ (bias + gain * mean) - fitted * length * (down @ mean)


class ProjectedWeight(nn.Module):
    """A parametrization of a layer's weight by trained projections of a fixed weight W (out, in) of the teacher.

    weight = write^T W read, with write (out, student's out) and read (in, student's in); either may be missing. Of a
    fused weight of `parts` equal shares, each share has a `write` of its own, one below the other.
    W is in no checkpoint: it comes from the teacher again.

    What is trained is each projection divided by its pace. A step of Adam moves all its elements by the rate, and times
    W these moves add up: the weight would move many times as far as one that is trained itself. With its pace, a step
    in which all moves agree moves the weight by the rate on average.
    """

    teacher: Tensor
    paces: Tensor

    def __init__(self, teacher: Tensor, *, write: Tensor | None, read: Tensor | None, parts: int = 1) -> None:
        super().__init__()
        # What is trained is not in half precision, whatever a fixed teacher is in.
        teacher = teacher.detach().float()
        self.register_buffer("teacher", teacher.clone(), persistent=False)
        self.parts = parts
        self.sides = tuple(name for name, side in (("write", write), ("read", read)) if side is not None)
        given = {"write": write, "read": read}
        self._start = tuple(side.to(teacher) for side in given.values() if side is not None)
        moves = {"write": self._read(self.teacher, read), "read": self._written(self.teacher, write).T}
        paces = [1.0 / (moves[name].abs().sum(0).mean() / parts ** (name == "write")) for name in self.sides]
        self.register_buffer("paces", torch.stack(paces).to(teacher))

    def _written(self, weight: Tensor, write: Tensor | None) -> Tensor:
        if write is None:
            return weight
        shares, own = (each.unflatten(0, (self.parts, -1)) for each in (weight, write.to(weight)))
        return (own.transpose(1, 2) @ shares).flatten(0, 1)

    def _read(self, weight: Tensor, read: Tensor | None) -> Tensor:
        return weight if read is None else weight @ read.to(weight)

    def side(self, name: str, trained: Tensor) -> Tensor:
        """Return the projection "write" or "read" from what is trained of it."""
        return trained * self.paces[self.sides.index(name)]

    def forward(self, *trained: Tensor) -> Tensor:
        given = {name: self.side(name, one) for name, one in zip(self.sides, trained, strict=True)}
        write, read, weight = given.get("write"), given.get("read"), self.teacher
        # Rounded to 16 bits, it would be another weight than the one that is merged.
        with torch.autocast(weight.device.type, enabled=False):
            if write is None or read is None or self._written_first(write, read):
                return self._read(self._written(weight, write), read)
            return self._written(self._read(weight, read), write)

    def _written_first(self, write: Tensor, read: Tensor) -> bool:
        """True where fewer numbers are multiplied when W is multiplied with `write` first."""
        (outs, ins), own_outs, own_ins = self.teacher.shape, write.shape[1] * self.parts, read.shape[1]
        first = write.shape[1] * outs * ins + own_outs * ins * own_ins
        return first <= outs * ins * own_ins + write.shape[1] * outs * own_ins

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return where the projections start, whatever the weight: it is overwritten."""
        return tuple(one / pace for one, pace in zip(self._start, self.paces, strict=True))


def attach(layer: nn.Module, weight: ProjectedWeight) -> None:
    """Put projections behind a layer's weight."""
    parametrize.register_parametrization(layer, "weight", weight, unsafe=True)
    weight._start = ()


def share(layer: nn.Module, source: nn.Module) -> None:
    """Put the very projections of `source` behind the weight of a layer that shared its plain weight."""
    projected = projected_of(source)
    assert projected is not None
    one = projected.teacher[:1]
    attach(layer, ProjectedWeight(one, write=None, read=one.T))
    layer.parametrizations["weight"] = source.parametrizations["weight"]  # type: ignore[index, operator, union-attr]


def projected_of(layer: nn.Module) -> ProjectedWeight | None:
    """Return the projections behind a layer's weight, or None when there are none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    found = layer.parametrizations["weight"][0]  # type: ignore[index, union-attr]
    return found if isinstance(found, ProjectedWeight) else None


def side_of(layer: nn.Module, side: str) -> Tensor | None:
    """Return the projection "write" or "read" of a layer; None where it has none."""
    projected = projected_of(layer)
    if projected is None or side not in projected.sides:
        return None
    trained = getattr(layer.parametrizations["weight"], f"original{projected.sides.index(side)}")  # type: ignore[index, union-attr]
    return projected.side(side, trained)


def projected_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every layer with projections behind its weight."""
    return (module for module in model.modules() if projected_of(module) is not None)


def merge_projections(model: nn.Module) -> int:
    """Multiply all projections into plain weights, in place, and return how many layers had some."""
    plain: dict[int, nn.Parameter] = {}
    layers = list(projected_layers(model))
    for layer in layers:
        # Layers that shared their projections share the plain weight again.
        shared = id(projected_of(layer))
        plain[shared] = plain_weight(layer, plain.get(shared))
    return len(layers)
