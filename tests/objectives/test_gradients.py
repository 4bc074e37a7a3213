"""Hand-written backward passes against plain autograd in double precision: value and gradient, part by part."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from objectives.worlds import captured, mask_of
from torch import Tensor

import kdcli
from kdcli.objectives.cores import TensorObjective
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.hidden import mean_token_mse
from kdcli.objectives.relation import RelationKL, RelationObjective, relation_kl
from kdcli.signals import Signals
from kdcli.tensors.mpo import auxiliary_indices

LENGTHS = [5, 9, 2, 7]

WRITTEN = {
    "objectives/cores.py": 1,
    "objectives/hidden.py": 1,
    "objectives/relation.py": 1,
    "objectives/rows.py": 1,  # in test_vocabulary_losses.py, too
    "tensors/chain.py": 1,  # in tensors/test_chain.py
}
"""How many backward passes each module has of its own; each is compared with autograd's."""


def test_every_hand_written_backward_is_known_here():
    root = Path(kdcli.__file__).parent
    found = {
        str(path.relative_to(root)): len(re.findall(r"^class .*\bautograd\.Function\b", path.read_text(), re.M))
        for path in root.rglob("*.py")
    }
    assert {name: count for name, count in found.items() if count} == WRITTEN


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agree(own: Tensor, plain: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    """Check the value and the gradients of `own`; `plain` takes the leaves in double precision."""
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain(*doubles)
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-7)
    # A factor of its own: what comes from above must not get lost.
    found = torch.autograd.grad(3.0 * own, leaves)
    for one, other in zip(found, torch.autograd.grad(3.0 * expected, doubles), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-7)


def mean_over_tokens(values: Tensor) -> Tensor:
    return torch.stack([values[b, :n].mean() for b, n in enumerate(LENGTHS)]).mean()


@pytest.mark.parametrize("relative", [False, True], ids=["plain", "relative"])
@pytest.mark.parametrize("at_once", [None, 12], ids=["whole", "parts"])
def test_squared_differences_of_states(relative: bool, at_once: int | None, monkeypatch: pytest.MonkeyPatch):
    if at_once is not None:
        monkeypatch.setattr("kdcli.objectives.hidden.CHUNK_ELEMENTS", at_once)
    widths = (6, 4)
    students = [draw(seed, 4, 9, width).requires_grad_() for seed, width in enumerate(widths)]
    teachers = [2 * draw(10 + seed, 4, 9, width) for seed, width in enumerate(widths)]

    def plain(*own: Tensor) -> Tensor:
        terms = []
        for student, teacher in zip(own, (one.double() for one in teachers), strict=True):
            for b, n in enumerate(LENGTHS):
                error = (student[b, :n] - teacher[b, :n]).square().mean()
                terms.append(error / teacher[b, :n].square().mean() if relative else error)
        return torch.stack(terms).mean()

    pairs = list(zip(students, teachers, strict=True))
    agree(mean_token_mse(pairs, mask_of(LENGTHS), match_norm=relative), plain, students)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "bare"])
@pytest.mark.parametrize("at_once", [None, 21], ids=["whole", "parts"])
@pytest.mark.parametrize("weighed", [True, False], ids=["weighed", "equal"])
def test_divergence_over_a_vocabulary(
    temperature: float, scale: bool, at_once: int | None, weighed: bool, monkeypatch: pytest.MonkeyPatch
):
    if at_once is not None:
        monkeypatch.setattr("kdcli.objectives.rows.CHUNK_ELEMENTS", at_once)
    student, teacher = 2 * draw(1, 8, 7), 2 * draw(2, 8, 7)
    student.requires_grad_()
    weights = draw(3, 8).softmax(0) if weighed else torch.full((8,), 1 / 8)

    def plain(own: Tensor) -> Tensor:
        p, q = torch.softmax(teacher.double() / temperature, -1), torch.softmax(own / temperature, -1)
        rows = (p * (p.log() - q.log())).sum(-1)
        return (rows * weights.double()).sum() * (temperature**2 if scale else 1.0)

    found = Categorical().divergence(student, teacher, weights if weighed else None, temperature, scale=scale)
    agree(found, plain, [student])


def by_rows(query: Tensor, key: Tensor, query_t: Tensor, key_t: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Return KL(teacher || student) of queries (rows) against keys (columns), one row after the other.

    allowed: (batch, seq, seq), the keys of each query; of a padded query none.
    """
    examples = []
    for b in range(len(query)):
        rows = []
        for q in range(query.shape[1]):
            keys = allowed[b, q].nonzero().flatten()
            if not len(keys):
                continue
            for h in range(heads):
                logs = []
                for rows_of, columns_of in ((query, key), (query_t, key_t)):
                    size = rows_of.shape[-1] // heads
                    part = slice(h * size, (h + 1) * size)
                    scores = columns_of[b, keys, part] @ rows_of[b, q, part] / math.sqrt(size)
                    logs.append(torch.log_softmax(scores, -1))
                rows.append((logs[1].exp() * (logs[1] - logs[0])).sum())
        examples.append(torch.stack(rows).mean())
    return torch.stack(examples).mean()


def of_unequal_spread(seed: int, width: int) -> tuple[Tensor, Tensor]:
    """Return queries and keys that cannot be taken for each other: keys are longer, and point one way."""
    return 0.5 * draw(seed, 4, 9, width), 2 * draw(seed + 1, 4, 9, width) + 1.0


@pytest.mark.parametrize("where", ["text", "segments", "window", "segments and window"])
def test_queries_are_the_rows_and_keys_the_columns(where: str):
    mask = mask_of(LENGTHS)
    (query, key), (query_t, key_t) = of_unequal_spread(1, 8), of_unequal_spread(5, 12)
    real = mask.bool()
    allowed = real[:, :, None] & real[:, None, :]
    extra: dict[str, Tensor] = {}
    if "segments" in where:
        extra["segments"] = (torch.arange(9) > 2).long().expand(4, 9)
        allowed = allowed & (extra["segments"][:, :, None] == extra["segments"][:, None, :])
    if "window" in where:
        # A query sees itself and what comes before it: rows and columns are not the same here.
        window = torch.ones(9, 9).tril().bool() & mask.bool()[:, None, :]
        extra["window"] = window[:, None]
        allowed = allowed & window
    leaves = [query.requires_grad_(), key.requires_grad_()]
    found = relation_kl(
        query,
        query_t,
        mask,
        4,
        student_columns=key,
        teacher_columns=key_t,
        chunk=3 if where == "text" else None,
        **extra,
    )
    agree(found, lambda q, k: by_rows(q, k, query_t.double(), key_t.double(), 4, allowed), leaves)
    turned = relation_kl(key, key_t, mask, 4, student_columns=query, teacher_columns=query_t, **extra)
    assert abs(turned - found) > 0.01 * found


def test_the_relation_of_queries_to_keys_is_the_attention_where_both_models_attend():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=8), captured(2, mask, width=12)
    # One sees what comes before, the other three tokens to either side.
    kept = torch.ones(9, 9).tril().bool(), torch.ones(9, 9).tril(3).triu(-3).bool()
    for seed, signals, width, window in ((1, student, 8, kept[0]), (5, teacher, 12, kept[1])):
        signals.matrices[(2, "query")], signals.matrices[(2, "key")] = of_unequal_spread(seed, width)
        signals.windows[2] = (window & mask.bool()[:, None, :])[:, None]
    allowed = kept[0] & kept[1] & mask.bool()[:, None, :] & mask.bool()[:, :, None]
    matrices = [signals.matrices[(2, name)].double() for signals in (student, teacher) for name in ("query", "key")]
    found = RelationObjective([(2, 2)], relations={("query", "key"): 1.0})(student, teacher, {})
    torch.testing.assert_close(found.double(), by_rows(*matrices, 4, allowed), rtol=1e-5, atol=1e-7)


def test_the_gradient_within_a_window_is_the_derivative():
    mask = mask_of([3, 5])
    query, key, query_t, key_t = (draw(seed, 2, 2, 5, 3).double() for seed in range(4))
    window = (torch.ones(5, 5).tril().bool() & mask.bool()[:, None, :])[:, None]
    leaves = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, k: RelationKL.apply(q, k, query_t, key_t, mask, 1, None, window), leaves, fast_mode=True
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_differences_of_cores(reduction: str):
    shapes = {
        (1, "query"): [(1, 2, 2, 4), (4, 1, 1, 4), (4, 1, 1, 4), (4, 2, 2, 1)],
        (2, "key"): [(1, 2, 3, 6), (6, 1, 1, 6), (6, 3, 2, 1)],
    }
    # The teacher's bonds of one chain are wider, of the other narrower.
    bonds = {4: 6, 6: 5}
    student: dict[tuple[int, str], tuple[Tensor, ...]] = {}
    teacher: dict[tuple[int, str], tuple[Tensor, ...]] = {}
    for number, (key, chain) in enumerate(shapes.items()):
        student[key] = tuple(draw(10 * number + k, *shape).requires_grad_() for k, shape in enumerate(chain))
        theirs = [(bonds.get(left, 1), i, j, bonds.get(right, 1)) for left, i, j, right in chain]
        teacher[key] = tuple(draw(50 + 10 * number + k, *shape) for k, shape in enumerate(theirs))
    order = [(key, k) for key, chain in student.items() for k in auxiliary_indices(len(chain))]

    def plain(*tensors: Tensor) -> Tensor:
        total = []
        for key, chain in teacher.items():
            terms = []
            for (other, k), tensor in zip(order, tensors, strict=True):
                if other == key:
                    left, right = (min(tensor.shape[side], chain[k].shape[side]) for side in (0, 3))
                    gap = tensor[:left, ..., :right] - chain[k][:left, ..., :right].double()
                    terms.append(gap.square().mean())
            total.append(torch.stack(terms).mean())
        return torch.stack(total).mean() if reduction == "mean" else torch.stack(total).sum()

    mask = torch.ones(1, 1)
    found = TensorObjective(reduction)(Signals(mask, 1, factors=student), Signals(mask, 1, factors=teacher), {})
    agree(found, plain, [student[key][k] for key, k in order])
