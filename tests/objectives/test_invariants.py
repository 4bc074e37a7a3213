"""What holds for every objective: zero at equality, no notice of padding, no gradient where none belongs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from objectives.worlds import answered, asked, captured, leaves, mask_of, packed
from torch import Tensor, nn

from kdcli.objectives.attention import AttentionObjective
from kdcli.objectives.attribution import AttributionObjective
from kdcli.objectives.base import Objective
from kdcli.objectives.cosine import CosineObjective
from kdcli.objectives.distribution import Categorical, Normal
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.hidden import HiddenObjective
from kdcli.objectives.matrix import MatrixObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.relation import DirectRelationObjective, RelationObjective
from kdcli.objectives.transport import EMDObjective
from kdcli.signals import Prediction, Signals

LENGTHS = [5, 9, 2, 7]
SAME = [(1, 1), (2, 2), (3, 3)]


@dataclass
class Case:
    name: str
    make: Callable[[], Objective]
    world: dict[str, Any] = field(default_factory=dict)
    text: bool = False
    zero: bool = True
    shares: bool = True

    @property
    def classifier(self) -> bool:
        """True when it reads the logits of the made-up classifier."""
        return not self.text and self.make().student_request().logits


def bridged() -> Objective:
    objective = HiddenObjective([(0, 0), (2, 2), (3, 3)], widths=(16, 16), bridge=True, shared=True)
    nn.init.eye_(objective.bridges["shared"].weight)
    nn.init.zeros_(objective.bridges["shared"].bias)
    return objective


CASES = [
    Case("output", lambda: OutputObjective(Categorical(), temperature=2.0)),
    Case("output-regression", lambda: OutputObjective(Normal()), {"classes": 1}),
    Case("task", lambda: GoldObjective(Categorical()), zero=False),
    Case("hidden", lambda: HiddenObjective([(0, 0), (1, 1), (3, 3)])),
    Case("hidden-relative", lambda: HiddenObjective(SAME, match_norm=True)),
    Case("hidden-shared-bridge", bridged),
    Case("attention", lambda: AttentionObjective(SAME)),
    Case("attention-scores", lambda: AttentionObjective(SAME, measure="mse")),
    Case("matrix", lambda: MatrixObjective(SAME, ("query", "ffn_in"))),
    Case("relation-own-heads", lambda: RelationObjective([(3, 3)], relations={("value", "value"): 1.0})),
    Case("relation", lambda: RelationObjective([(2, 2), (3, 3)], heads=8)),
    Case("relation-cross", lambda: RelationObjective([(3, 3)], relations={("query", "value"): 0.5}, heads=2)),
    Case(
        "relation-direct",
        lambda: DirectRelationObjective([(3, 3)], widths=dict.fromkeys(("query", "key", "value"), (16, 16)), heads=8),
    ),
    Case("cosine", lambda: CosineObjective([(3, 3)])),
    Case("vocabulary", lambda: OutputObjective(Categorical(), 2.0), {"vocabulary": 11}, text=True),
    Case("vocabulary-all", lambda: OutputObjective(Categorical(), all_positions=True), {"vocabulary": 11}, text=True),
    Case("masked-lm", lambda: GoldObjective(Categorical()), {"vocabulary": 11}, text=True, zero=False),
    Case("transport", lambda: EMDObjective((3, 3), attention=True), shares=False),
    Case("transport-uniform", lambda: EMDObjective((3, 3), learn_weights=False), shares=False),
    Case("attribution", lambda: AttributionObjective(Categorical())),
    Case("attribution-two", lambda: AttributionObjective(Categorical()), {"classes": 2}),
    Case("attribution-regression", lambda: AttributionObjective(Normal()), {"classes": 1}),
    Case("attribution-path", lambda: AttributionObjective(Categorical(), steps=4), {"steps": 4}),
]


def cases(which: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if which(case)], ids=lambda c: c.name)


def batch_of(case: Case, mask: Tensor, first: int = 0) -> dict[str, Tensor]:
    rows = torch.arange(first, first + len(mask))
    if case.text:
        tokens = torch.arange(mask.shape[1])[None]
        masked = (mask != 0) & ((tokens + rows[:, None]) % 3 == 1)
        return asked(mask, torch.where(masked, (tokens + rows[:, None]) % 11, -100))
    return {"labels": rows.float() / 3 if case.world.get("classes") == 1 else rows % case.world.get("classes", 3)}


def value(case: Case, student: Signals, teacher: Signals, objective: Objective | None = None, first: int = 0) -> Tensor:
    objective, batch = objective or case.make(), batch_of(case, student.mask, first)
    everywhere = objective.student_request().all_positions
    if student.predictions:
        student, teacher = (answered(signals, batch, everywhere=everywhere) for signals in (student, teacher))
    return objective(student, teacher, batch)


def pair(case: Case, mask: Tensor, **extra: Any) -> tuple[Signals, Signals]:
    return captured(1, mask, **case.world, **extra), captured(2, mask, **case.world, **extra)


@cases(lambda case: case.zero)
def test_is_zero_when_student_and_teacher_are_equal(case: Case):
    mask = mask_of(LENGTHS)
    assert value(case, captured(1, mask, **case.world), captured(1, mask, **case.world)).item() == pytest.approx(
        0, abs=1e-6
    )


@cases()
def test_is_a_positive_finite_fp32_number_otherwise(case: Case):
    mask = mask_of(LENGTHS)
    for seed in range(2, 6):
        found = value(case, captured(1, mask, **case.world), captured(seed, mask, **case.world))
        assert found.shape == () and found.dtype == torch.float32
        assert 1e-5 < found.item() < 1e4


@cases()
def test_padding_changes_nothing_however_much_and_whatever_it_holds(case: Case):
    narrow, wide = mask_of(LENGTHS), mask_of(LENGTHS, seq=14)
    plain = value(case, *pair(case, narrow))
    torch.testing.assert_close(value(case, *pair(case, narrow, garbage=30.0)), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value(case, *pair(case, wide, garbage=30.0)), plain, rtol=1e-5, atol=1e-6)


@cases()
def test_the_gradient_reaches_real_student_tokens_only(case: Case):
    mask = mask_of(LENGTHS)
    student, teacher = pair(case, mask, garbage=30.0)
    objective = case.make()
    value(case, student, teacher, objective).backward()
    assert all(x.grad is None for x in leaves(teacher).values())
    assert all(parameter.grad is not None for parameter in objective.parameters())
    request = objective.student_request()
    for name, x in leaves(student).items():
        if x.grad is None:
            continue
        assert x.grad[mask == 0].abs().max() == 0.0, name
        assert torch.isfinite(x.grad).all(), name
    reached = {layer for layer, x in student.hidden.items() if x.grad is not None and x.grad.abs().max() > 0}
    assert reached == request.hidden | ({0} if request.logits and not case.text else frozenset())
    reached = {key for key, x in student.matrices.items() if x.grad is not None and x.grad.abs().max() > 0}
    assert reached == request.matrices


@cases(lambda case: case.shares)
def test_equal_shares_of_a_batch_average_to_the_whole(case: Case):
    mask = mask_of(LENGTHS)
    objective = case.make()
    halves = []
    for first, rows in ((0, mask[:2]), (2, mask[2:])):
        student, teacher = pair(case, rows, first=first)
        halves.append(value(case, student, teacher, objective, first))
    torch.testing.assert_close(
        torch.stack(halves).mean(), value(case, *pair(case, mask), objective), rtol=1e-5, atol=1e-6
    )


@cases(lambda case: not case.classifier)
def test_a_row_of_nothing_but_padding_is_harmless(case: Case):
    student, teacher = pair(case, mask_of([4, 0, 6]), garbage=1.0)
    found = value(case, student, teacher)
    found.backward()
    assert torch.isfinite(found)
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in leaves(student).values())


def documents(case: Case, seed: int, *lengths: int) -> list[Signals]:
    """Return two examples of each of `lengths`; all of them differ."""
    return [captured(seed, mask_of([n, n]), first=2 * i, **case.world) for i, n in enumerate(lengths)]


def pairs_of_tokens(case: Case) -> bool:
    return case.name.startswith(("attention", "relation"))


@cases(pairs_of_tokens)
def test_documents_of_a_block_are_compared_as_if_each_stood_alone(case: Case):
    lengths = (4, 5, 1)
    student, teacher = documents(case, 1, *lengths), documents(case, 2, *lengths)
    block = packed(*student), packed(*teacher)
    alone = [value(case, own, other) for own, other in zip(student, teacher, strict=True)]
    # Every real token is a row of the same weight.
    expected = sum(n * term for n, term in zip(lengths, alone, strict=True)) / sum(lengths)
    torch.testing.assert_close(value(case, *block), expected, rtol=1e-5, atol=1e-6)
    if case.name != "relation-direct":
        block[0].segments = None
        assert abs(value(case, *block) - expected) > 1e-3


@cases(pairs_of_tokens)
def test_another_document_of_a_block_leaves_the_gradient_of_this_one_alone(case: Case):
    found = []
    for seed in (1, 5):
        student = [documents(case, 1, 4)[0], documents(case, seed, 4, 5)[1]]
        teacher = [documents(case, 2, 4)[0], documents(case, seed + 1, 4, 5)[1]]
        block = packed(*student)
        value(case, block, packed(*teacher)).backward()
        found.append({key: x.grad for key, x in block.matrices.items() if x.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient[:, :4], found[1][key][:, :4], rtol=1e-6, atol=1e-8)
        assert (gradient[:, 4:] - found[1][key][:, 4:]).abs().max() > 1e-6


@cases(lambda case: pairs_of_tokens(case) or case.name == "transport")
def test_a_block_of_one_document_is_a_text_like_any_other(case: Case):
    mask = mask_of(LENGTHS)
    found = []
    for segments in (None, torch.zeros_like(mask)):
        student, teacher = pair(case, mask, garbage=30.0)
        student.segments = teacher.segments = segments
        term = value(case, student, teacher)
        term.backward()
        found.append([term, *(x.grad for x in student.matrices.values() if x.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@cases(lambda case: not case.classifier)
def test_half_precision_signals_give_nearly_the_same_value(case: Case):
    student, teacher = pair(case, mask_of(LENGTHS))
    exact = value(case, student, teacher)
    student, teacher = (
        replace(
            signals,
            hidden={key: x.detach().bfloat16() for key, x in signals.hidden.items()},
            matrices={key: x.detach().bfloat16() for key, x in signals.matrices.items()},
            predictions=[Prediction(signals.predictions[0].logits.detach().bfloat16())],
        )
        for signals in (student, teacher)
    )
    rough = value(case, student, teacher)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0.01)
