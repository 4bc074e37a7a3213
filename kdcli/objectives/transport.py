"""The transport objective: which layer follows which is itself found, as the cheapest transport (BERT-EMD)."""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor, nn

from kdcli.objectives.attention import attention_mse, attention_request
from kdcli.objectives.base import Objective, common_window, own_keys
from kdcli.objectives.hidden import token_mse
from kdcli.signals import Request, Signals

_MOST_REPEATS = 64

# The usual 1e-7 would overlook differences between layers that are all cheap next to one dear one.
_TOLERANCES = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}


def transport_plan(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> np.ndarray:
    """Return the flow (n, N) >= 0 with row sums `supply` and column sums `demand` of least total cost.

    cost: (n, N); supply: (n,) and demand: (N,), both positive with equal sums. Equal supplies and equal demands
    make it an assignment problem, everything else is a linear program. A cost that is not finite has no cheapest
    plan: the flow is then the product of both weights.
    """
    supply = np.asarray(supply, dtype=np.float64) / np.sum(supply)
    demand = np.asarray(demand, dtype=np.float64) / np.sum(demand)
    cost = np.asarray(cost, dtype=np.float64)
    if not np.isfinite(cost).all():
        return np.outer(supply, demand)
    n, m = cost.shape
    size = math.lcm(n, m)
    if size <= _MOST_REPEATS and np.ptp(supply) < 1e-9 and np.ptp(demand) < 1e-9:
        rows, columns = linear_sum_assignment(cost.repeat(size // n, axis=0).repeat(size // m, axis=1))
        flow = np.zeros((n, m))
        np.add.at(flow, (rows // (size // n), columns // (size // m)), 1.0 / size)
        return flow
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    # The sums of rows and of columns have one equation too many; rounding must not make it a contradiction.
    scaled = cost / max(np.abs(cost).max(), 1e-300)
    totals = np.concatenate([supply, demand])
    result = linprog(scaled.ravel(), A_eq=sums[:-1], b_eq=totals[:-1], method="highs-ds", options=_TOLERANCES)
    if result.x is None:
        return np.outer(supply, demand)
    return result.x.reshape(n, m).clip(min=0.0)


def cheap_weights(paid: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return new weights: inverse to each layer's cost per unit of flow, so that cheap layers gain weight.

    paid: (layers,), flow times cost summed over the other side. A cost counts as at least 1/1000 of the highest,
    so that no layer loses all its weight. Source: BERT-EMD's cost attention (Li et al. 2020).
    """
    cost = paid / weights
    if not np.isfinite(cost).all() or cost.max() <= 0:
        return weights
    inverse = 1.0 / cost.clip(min=1e-3 * cost.max())
    return inverse / inverse.sum()


def layer_costs(
    student: list[Tensor],
    teacher: list[Tensor],
    mask: Tensor,
    segments: Tensor | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """Return the mean squared difference (n, N) of each student and each teacher layer, without gradient.

    student, teacher: one tensor a layer, (batch, seq, width) or (batch, heads, seq, seq); mask, segments: (batch, seq);
    window: (batch, 1, seq, seq), the pairs of tokens that scores are compared at.
    Means run over real tokens (pairs of them in scores), then over examples, as in `token_mse` and `attention_mse`.
    """
    real = mask.to(torch.float32)
    count = real.sum(-1).clamp(min=1.0)
    scale: Tensor | None = None
    if student[0].ndim == 4:
        keys = own_keys(mask, segments, window)
        padded = ~keys | (mask == 0)[:, None, :, None]
        size = count.square() * student[0].shape[1]
        if segments is not None or window is not None:
            # Rows weigh the same, however many keys each of them has.
            scale = (count[:, None, None, None] / keys.sum(-1, keepdim=True).clamp(min=1)).sqrt()[:, None]
    else:
        padded = real[:, :, None] == 0
        size = count * student[0].shape[2]
    with torch.no_grad():
        own, other = (torch.stack(side, dim=1).masked_fill_(padded[:, None], 0.0) for side in (student, teacher))
        if scale is not None:
            own, other = own.mul_(scale), other.mul_(scale)
        # By differences: the usual product form would lose small distances between large states.
        distances = torch.cdist(own.flatten(2), other.flatten(2), compute_mode="donot_use_mm_for_euclid_dist").square()
        return (distances / size[:, None, None]).mean(0)


class EMDObjective(Objective):
    """Earth mover's distance between all blocks of both models: sum of flow times squared difference.

    hidden, attention: what is transported: hidden states (through `bridge`, one learned linear map of them all)
    and attention scores, each with a flow of its own; their distances are added. The flow is found again for every
    batch and has no gradient. With `learn_weights` each training step moves weight to layers that are cheap to match;
    both signals share their layers' weights unless `separate`. Weights are buffers: checkpoints hold them.
    As the flow depends on the batch, shares of a batch need not average to the whole here. Source: BERT-EMD.
    """

    student_weights: Tensor
    teacher_weights: Tensor

    def __init__(
        self,
        depths: tuple[int, int],
        *,
        hidden: bool = True,
        attention: bool = False,
        bridge: nn.Linear | None = None,
        learn_weights: bool = True,
        separate: bool = False,
    ) -> None:
        """depths: (student, teacher)."""
        super().__init__()
        assert hidden or attention
        self.depths = depths
        self.kinds = [kind for kind, wanted in (("hidden", hidden), ("attention", attention)) if wanted]
        self.learn_weights = learn_weights
        sets = len(self.kinds) if separate else 1
        self.register_buffer("student_weights", torch.full((sets, depths[0]), 1.0 / depths[0]))
        self.register_buffer("teacher_weights", torch.full((sets, depths[1]), 1.0 / depths[1]))
        self.bridge = bridge

    def _wants(self, depth: int) -> Request:
        layers = range(1, depth + 1)
        hidden = Request(hidden=frozenset(layers if "hidden" in self.kinds else ()))
        return hidden | attention_request(layers if "attention" in self.kinds else ())

    def student_request(self) -> Request:
        return self._wants(self.depths[0])

    def teacher_request(self) -> Request:
        return self._wants(self.depths[1])

    def _layers(self, signals: Signals, depth: int, kind: str) -> list[Tensor]:
        if kind == "attention":
            return [signals.attention_scores(x) for x in range(1, depth + 1)]
        return [signals.hidden[x].float() for x in range(1, depth + 1)]

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        total = torch.zeros((), device=student.mask.device)
        supplies = self.student_weights.double().cpu().numpy()
        demands = self.teacher_weights.double().cpu().numpy()
        moved: list[tuple[np.ndarray, np.ndarray]] = []
        for number, kind in enumerate(self.kinds):
            row = min(number, len(supplies) - 1)
            supply, demand = supplies[row] / supplies[row].sum(), demands[row] / demands[row].sum()
            own = self._layers(student, self.depths[0], kind)
            others = [x.detach() for x in self._layers(teacher, self.depths[1], kind)]
            if kind == "hidden" and self.bridge is not None:
                own = [self.bridge(x) for x in own]
            extra: tuple[Tensor | None, ...] = ()
            if kind == "attention":
                sides = ((student, range(1, self.depths[0] + 1)), (teacher, range(1, self.depths[1] + 1)))
                extra = (student.segments, common_window(*sides))
            cost = layer_costs(own, others, student.mask, *extra).double().cpu().numpy()
            flow = transport_plan(cost, supply, demand)
            measure = attention_mse if kind == "attention" else token_mse
            # A cheapest plan uses at most n + N - 1 pairs, but for ties: only those need a graph.
            used = [(int(i), int(j)) for i, j in np.argwhere(flow > 1e-12)]
            terms = torch.stack([measure(own[i], others[j], student.mask, *extra) * flow[i, j] for i, j in used])
            total = total + terms.sum()
            if self.training and self.learn_weights:
                paid = np.zeros_like(flow)
                paid[tuple(np.array(used).T)] = terms.detach().double().cpu().numpy()
                moved.append((cheap_weights(paid.sum(1), supply), cheap_weights(paid.sum(0), demand)))
        if moved:
            first, second = (np.stack(side) for side in zip(*moved, strict=True))
            if len(self.student_weights) == 1:
                first, second = first.mean(0, keepdims=True), second.mean(0, keepdims=True)
            self.student_weights.copy_(torch.from_numpy(first))
            self.teacher_weights.copy_(torch.from_numpy(second))
        return total
