"""Losses over a vocabulary whose logits are formed some rows at a time, against a dense reference in fp64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kdcli.errors import InputError
from kdcli.objectives.distribution import Bernoulli, Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Divergence
from kdcli.objectives.total import total_loss
from kdcli.signals import Prediction, Signals, VocabularyLogits
from kdcli.training.teacher_tokens import Cut, top_tokens

ROWS, WIDTH, VOCABULARY = 11, 6, 37

DIVERGENCES = [
    Divergence("kl"),
    Divergence("reverse-kl"),
    Divergence("js", beta=0.5),
    Divergence("js", beta=0.2),
    Divergence("skew-kl", skew=0.1),
    Divergence("skew-reverse-kl", skew=0.1),
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(seed: int, *, bias: bool = True, cap: float | None = None) -> VocabularyLogits:
    parts = [draw(seed, ROWS, WIDTH), draw(seed + 1, VOCABULARY, WIDTH)]
    parts += [draw(seed + 2, VOCABULARY)] if bias else []
    return VocabularyLogits(*(part.requires_grad_() for part in parts), cap=cap)


def dense(table: VocabularyLogits, *, leaves: list[Tensor]) -> Tensor:
    """Return the logits in fp64; `leaves` takes what they are formed from."""
    own = [part.detach().double().requires_grad_() for part in table.parts if part is not None]
    leaves += own
    found = own[0] @ own[1].T + (own[2] if len(own) > 2 else 0.0)
    return found if table.cap is None else table.cap * torch.tanh(found / table.cap)


def by_definition(q: Tensor, p: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence of each row, as the papers write it; p: of the teacher."""

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one * (one / other).log()).sum(-1)

    beta, skew = divergence.beta, divergence.skew
    mean = beta * p + (1 - beta) * q
    return {
        "kl": lambda: kl(p, q),
        "reverse-kl": lambda: kl(q, p),
        "js": lambda: beta * kl(p, mean) + (1 - beta) * kl(q, mean),
        "skew-kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew-reverse-kl": lambda: kl(q, (1 - skew) * p + skew * q),
    }[divergence.name]()


def compare(found: Tensor, own: VocabularyLogits, expected: Tensor, leaves: list[Tensor], within: float = 1e-6) -> None:
    """Compare a value and its gradients with those of a reference in fp64, to a millionth of their size."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    found.backward()
    for part, leaf in zip((part for part in own.parts if part is not None), leaves, strict=True):
        assert part.grad is not None and leaf.grad is not None
        assert (part.grad - leaf.grad).abs().max() <= within * leaf.grad.abs().max()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.name}-{d.beta}")
@pytest.mark.parametrize("at_once", [2**22, 3 * VOCABULARY], ids=["whole", "parts"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("cap", [None, 8.0], ids=["plain", "capped"])
def test_a_divergence_equals_its_definition(
    divergence: Divergence, at_once: int, temperature: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kdcli.objectives.rows.CHUNK_ELEMENTS", at_once)
    own, other, weights = logits(1, cap=cap), logits(5, bias=False, cap=cap), draw(9, ROWS).softmax(0)
    found = Categorical(divergence).divergence(own, other, weights, temperature)
    leaves: list[Tensor] = []
    q, p = (torch.softmax(dense(one, leaves=into) / temperature, -1) for one, into in ((own, leaves), (other, [])))
    rows = by_definition(q, p.detach(), divergence) * temperature**2
    compare(found, own, (rows * weights.double()).sum(), leaves)
    assert all(part.grad is None for part in other.parts if part is not None)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.name}-{d.beta}")
def test_no_rows_count_but_their_own(divergence: Divergence):
    """Each row's divergence is that of the row alone, and a table that is there gives the same."""
    own, other = logits(1), logits(5)
    measure = Categorical(divergence)
    whole = measure.divergence(own.float(), other.float()).item()
    each = [measure.divergence(own[i : i + 1], other[i : i + 1]).item() for i in range(ROWS)]
    assert whole == pytest.approx(sum(each) / ROWS, rel=1e-6)
    assert min(each) > 1e-3
    assert measure.divergence(own, own).item() == pytest.approx(0.0, abs=1e-6)


def test_jensen_shannon_lies_between_both_kl():
    """Divided by its share it becomes KL(p || q) as that goes to 0, KL(q || p) towards 1 (GKD, section 2)."""
    own, other = logits(1), logits(5)

    def of(divergence: Divergence) -> float:
        return Categorical(divergence).divergence(0.3 * own.float(), 0.3 * other.float()).item()

    near = 1e-3
    assert of(Divergence("js", beta=near)) / near == pytest.approx(of(Divergence("kl")), rel=0.02)
    assert of(Divergence("js", beta=1 - near)) / near == pytest.approx(of(Divergence("reverse-kl")), rel=0.02)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.name}-{d.beta}")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_most_probable_tokens_and_the_rest(
    divergence: Divergence, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """Over k + 1 outcomes: k tokens of each row, other ones in other rows, and all that are left as one."""
    monkeypatch.setattr("kdcli.objectives.rows.CHUNK_ELEMENTS", 3 * VOCABULARY)
    own, other, weights = logits(1), logits(5), draw(9, ROWS).softmax(0)
    top = top_tokens(other, Cut(5, temperature))
    found = Categorical(divergence).divergence(own, top, weights, temperature)
    leaves: list[Tensor] = []
    q = torch.softmax(dense(own, leaves=leaves) / temperature, -1)
    p = torch.softmax(dense(other, leaves=[]).detach() / temperature, -1)
    chosen = p.argsort(-1, descending=True)[:, :5]
    assert torch.equal(chosen, top.ids)
    q, p = (torch.cat([each.gather(1, chosen), 1 - each.gather(1, chosen).sum(1, keepdim=True)], 1) for each in (q, p))
    rows = by_definition(q, p, divergence) * temperature**2
    compare(found, own, (rows * weights.double()).sum(), leaves, within=3e-6)


@pytest.mark.parametrize("at_once", [2**22, 3 * VOCABULARY], ids=["whole", "parts"])
@pytest.mark.parametrize("cut", [False, True], ids=["all", "top"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_hard_divergence_is_the_loss_of_the_teacher_s_most_probable_class(
    at_once: int, cut: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """DeiT (arXiv 2012.12877), equation 3; what is left out of the most probable tokens is never it."""
    monkeypatch.setattr("kdcli.objectives.rows.CHUNK_ELEMENTS", at_once)
    own, other, weights = logits(1), logits(5), draw(9, ROWS).softmax(0)
    teacher = top_tokens(other, Cut(2, temperature)) if cut else other
    found = Categorical(Divergence("hard")).divergence(own, teacher, weights, temperature)
    leaves: list[Tensor] = []
    q = torch.log_softmax(dense(own, leaves=leaves) / temperature, -1)
    best = dense(other, leaves=[]).argmax(-1, keepdim=True)
    rows = -q.gather(1, best)[:, 0] * temperature**2
    compare(found, own, (rows * weights.double()).sum(), leaves, within=3e-6)


def test_a_cut_takes_from_the_divergence_and_adds_nothing():
    """Outcomes taken together cannot be further apart; with all but one token apart nothing is lost."""
    own, other, values = logits(1), logits(5), []
    for k in (1, 5, 20, VOCABULARY - 1):
        values.append(Categorical().divergence(own, top_tokens(other, Cut(k, 1.0))).item())
    assert values == sorted(values) and values[0] < 0.9 * values[-1]
    assert values[-1] == pytest.approx(Categorical().divergence(own, other).item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"temperature 1.0 are none at 2.0"):
        Categorical().divergence(own, top_tokens(other, Cut(3, 1.0)), temperature=2.0)


@pytest.mark.parametrize("at_once", [2**22, 2 * VOCABULARY], ids=["whole", "parts"])
def test_gold_answers(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdcli.objectives.rows.CHUNK_ELEMENTS", at_once)
    own, weights = logits(1, cap=4.0), draw(9, ROWS).softmax(0)
    target = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(0))
    found = Categorical().nll(own, target, weights)
    leaves: list[Tensor] = []
    rows = torch.nn.functional.cross_entropy(dense(own, leaves=leaves), target, reduction="none")
    compare(found, own, (rows * weights.double()).sum(), leaves)


def signals_of(table: VocabularyLogits | Tensor, **gold: Tensor) -> Signals:
    return Signals(torch.ones(1, ROWS), 1, predictions=[Prediction(table, **gold)])


@pytest.mark.parametrize("partly", [False, True], ids=["all answered", "some answered"])
def test_terms_on_one_table_are_formed_together(partly: bool, monkeypatch: pytest.MonkeyPatch):
    """Value by value and gradient by gradient the same as alone; the student's logits are formed once for both."""
    monkeypatch.setattr("kdcli.objectives.rows.CHUNK_ELEMENTS", 4 * VOCABULARY)
    own, other = logits(1), logits(5)
    answered = torch.tensor([0, 3, 4, 8]) if partly else torch.arange(ROWS)
    target = torch.randint(VOCABULARY, (len(answered),), generator=torch.Generator().manual_seed(0))
    gold = {"weights": draw(9, ROWS).softmax(0), "target": target}
    if partly:
        gold |= {"answered": answered, "target_weights": draw(8, len(answered)).softmax(0)}
    objectives = {"output": OutputObjective(Categorical(), 2.0), "task": GoldObjective(Categorical())}
    weights = {"output": 0.3, "task": 0.7}

    formed: list[int] = []
    plain = VocabularyLogits.float

    def counting(self: VocabularyLogits) -> Tensor:
        formed.append(len(self))
        return plain(self)

    expected, values = total_loss(objectives, weights, signals_of(own.float(), **gold), signals_of(other.float()), {})
    expected.backward()
    gradients = [part.grad.clone() for part in own.parts]
    for part in own.parts:
        part.grad = None
    monkeypatch.setattr(VocabularyLogits, "float", counting)
    total, found = total_loss(objectives, weights, signals_of(own, **gold), signals_of(other), {})
    total.backward()
    assert sum(formed) == 2 * ROWS
    torch.testing.assert_close(total, expected)
    assert found == pytest.approx({name: value.item() for name, value in values.items()})
    for part, gradient in zip(own.parts, gradients, strict=True):
        torch.testing.assert_close(part.grad, gradient)


def test_gradients_only_of_what_is_trained():
    own = logits(1)
    own.weight.requires_grad_(False)
    Categorical().divergence(own, logits(5)).backward()
    assert own.weight.grad is None and own.states.grad is not None
    with torch.no_grad():
        assert not Categorical().divergence(own, logits(5)).requires_grad


def test_products_in_half_precision_are_summed_in_full():
    """bf16 products: the loss is near that of fp32, its gradients are fp32 and near, and more parts change little."""
    own, other = logits(1), logits(5)
    half = [replace(one, dtype=torch.bfloat16) for one in (own, other)]
    exact, rounded = Categorical().divergence(own, other), Categorical().divergence(*half)
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    wanted = torch.autograd.grad(exact, own.parts)
    for gradient, near in zip(torch.autograd.grad(rounded, own.parts), wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - near).abs().max() <= 0.03 * near.abs().max()


def test_other_predictions_are_compared_in_the_usual_way_only():
    assert Bernoulli().compared_by(Divergence("kl")).divergence(draw(1, 3, 2), draw(2, 3, 2)) > 0
    with pytest.raises(InputError, match="js compares distributions over classes"):
        Bernoulli().compared_by(Divergence("js"))


def test_a_gradient_formed_twice_is_the_same():
    """A graph that is kept gives its gradients again."""
    own = logits(1)
    value = Categorical().divergence(own, logits(5))
    found = [torch.autograd.grad(2.0 * value, own.parts, retain_graph=True) for _ in range(3)]
    for first, second in pairwise(found):
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
