"""Objectives against libraries that others wrote: textbrewer, torchdistill, captum and POT."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ot
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from objectives.worlds import captured, mask_of, packed
from textbrewer import losses as textbrewer
from torch import Tensor
from transformers import PreTrainedModel

from kdcli.models.blocks import embeddings_of
from kdcli.models.capture import Capture
from kdcli.objectives.attention import AttentionObjective, attention_kl, attention_mse
from kdcli.objectives.attribution import AttributionObjective, attribution_loss, path_gradient, saliency
from kdcli.objectives.cosine import CosineObjective, cosine_distance
from kdcli.objectives.distribution import Categorical, Normal
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.hidden import HiddenObjective, token_mse
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.relation import relation_kl
from kdcli.objectives.transport import EMDObjective, cheap_weights, layer_costs, transport_plan
from kdcli.signals import Prediction, Request, Signals
from kdcli.tasks.classification import KIND as CLASSIFICATION

LENGTHS = [5, 9, 2, 7]
SEEDS = [0, 1, 2]
MASKED = -1e9
"""Added to scores at padded keys: what a model does before its softmax, and textbrewer expects."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(own: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


# --- textbrewer ------------------------------------------------------------------------------------------------------
#
# Its masked means run over all real tokens of a batch at once, so that long examples weigh more. Ours run over each
# example first. One example at a time both are the same; so are examples of one length together.


def by_example(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, mask: Tensor
) -> Tensor:
    """Return the mean over examples of a textbrewer loss that sees one at a time."""
    return torch.stack([loss(student[b : b + 1], teacher[b : b + 1], mask[b : b + 1]) for b in range(len(mask))]).mean()


def with_bias(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + (mask[:, None, None, :] == 0) * MASKED


def att_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """textbrewer's cross-entropy of attention less the teacher's own: the divergence."""
    student, teacher = with_bias(student, mask), with_bias(teacher, mask)
    return textbrewer.att_ce_loss(student, teacher, mask) - textbrewer.att_ce_loss(teacher, teacher, mask)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_attention_divergence_is_textbrewers_cross_entropy_less_the_entropy(seed):
    student, teacher = 2 * draw(seed, 4, 3, 9, 9), 2 * draw(seed + 10, 4, 3, 9, 9)
    mask = mask_of(LENGTHS)
    close(attention_kl(student, teacher, mask), by_example(att_kl, student, teacher, mask))
    same = mask_of([6, 6, 6, 6], seq=9)
    close(attention_kl(student, teacher, same), att_kl(student, teacher, same))


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_of_one_head_agrees_with_textbrewers_mean_over_heads(seed):
    student, teacher = draw(seed, 4, 1, 9, 9), draw(seed + 10, 4, 1, 9, 9)
    mask = mask_of(LENGTHS)

    def mean_heads(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        own, other = with_bias(student, mask), with_bias(teacher, mask)
        return textbrewer.att_ce_mean_loss(own, other, mask) - textbrewer.att_ce_mean_loss(other, other, mask)

    close(attention_kl(student, teacher, mask), by_example(mean_heads, student, teacher, mask))


@pytest.mark.parametrize("seed", SEEDS)
def test_attention_scores_are_compared_as_in_textbrewer(seed):
    student, teacher = draw(seed, 4, 3, 9, 9), draw(seed + 10, 4, 3, 9, 9)
    mask = mask_of(LENGTHS)
    close(attention_mse(student, teacher, mask), by_example(textbrewer.att_mse_loss, student, teacher, mask))
    same = mask_of([6, 6, 6, 6], seq=9)
    close(attention_mse(student, teacher, same), textbrewer.att_mse_loss(student, teacher, same))
    # Its other form compares the sums over heads: the same for one head.
    own, other = student[:, :1], teacher[:, :1]
    close(attention_mse(own, other, mask), by_example(textbrewer.att_mse_sum_loss, own, other, mask))


@pytest.mark.parametrize("measure", ["kl", "mse"])
def test_the_attention_objective_agrees_with_textbrewer_on_scores_formed_elsewhere(measure):
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask, width=16), captured(2, mask, width=24)

    def scores(signals: Signals, layer: int) -> Tensor:
        query, key = (signals.matrices[(layer, n)].unflatten(-1, (4, -1)) for n in ("query", "key"))
        return torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5

    reference = att_kl if measure == "kl" else textbrewer.att_mse_loss
    pairs = [(1, 2), (3, 3)]
    expected = [by_example(reference, scores(student, s), scores(teacher, t), mask) for s, t in pairs]
    close(AttentionObjective(pairs, measure=measure)(student, teacher, {}), torch.stack(expected).mean())


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_relations_agree_with_textbrewers_attention_loss_on_their_scores(heads):
    mask = mask_of(LENGTHS)
    student, teacher = draw(1, 4, 9, 16), draw(2, 4, 9, 24)

    def scores(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        return x @ x.mT / x.shape[-1] ** 0.5

    close(relation_kl(student, teacher, mask, heads), by_example(att_kl, scores(student), scores(teacher), mask))


@pytest.mark.parametrize("seed", SEEDS)
def test_hidden_states_are_compared_as_in_textbrewer(seed):
    student, teacher = draw(seed, 4, 9, 6), draw(seed + 10, 4, 9, 6)
    mask = mask_of(LENGTHS)
    close(token_mse(student, teacher, mask), by_example(textbrewer.hid_mse_loss, student, teacher, mask))
    close(cosine_distance(student, teacher, mask), by_example(textbrewer.cos_loss, student, teacher, mask))
    full = torch.ones_like(mask)
    close(token_mse(student, teacher, full), textbrewer.hid_mse_loss(student, teacher))
    close(cosine_distance(student, teacher, full), textbrewer.cos_loss(student, teacher))


def test_hidden_objectives_agree_with_textbrewer_on_pairs_of_layers():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask), captured(2, mask)
    pairs = [(0, 0), (1, 2), (3, 3)]
    for objective, loss in (
        (HiddenObjective(pairs), textbrewer.hid_mse_loss),
        (CosineObjective(pairs), textbrewer.cos_loss),
    ):
        expected = [by_example(loss, student.hidden[s], teacher.hidden[t], mask) for s, t in pairs]
        close(objective(student, teacher, {}), torch.stack(expected).mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_output_losses_are_textbrewers(temperature, classes):
    student, teacher = 3 * draw(1, 6, classes), 3 * draw(2, 6, classes)
    cross_entropy = textbrewer.kd_ce_loss(student, teacher, temperature)
    close(Categorical().nll(student / temperature, (teacher / temperature).softmax(-1)), cross_entropy)
    # There is no factor T^2 there; the divergence is the cross-entropy less the teacher's own entropy.
    divergence = cross_entropy - textbrewer.kd_ce_loss(teacher, teacher, temperature)
    close(Categorical().divergence(student, teacher, temperature=temperature, scale=False), divergence)
    close(Categorical().divergence(student, teacher, temperature=temperature), divergence * temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_predicted_numbers_are_compared_as_textbrewers_logits(temperature):
    student, teacher = draw(1, 6, 1), draw(2, 6, 1)
    signals = [Signals(torch.ones(6, 1), 1, predictions=[Prediction(logits)]) for logits in (student, teacher)]
    # It divides both logits by T; ours has no temperature.
    expected = textbrewer.kd_mse_loss(student, teacher, temperature) * temperature**2
    close(OutputObjective(Normal())(*signals, {}), expected)


# --- torchdistill ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kd_loss() -> type:
    # Not a requirement of the tests, as it asks for releases of torch and torchvision; .ci/run installs it alone.
    module = pytest.importorskip("torchdistill.losses.mid_level", exc_type=ImportError)
    return module.KDLoss


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_knowledge_distillation_is_torchdistills(kd_loss, temperature, alpha):
    student, teacher = 3 * draw(1, 6, 4), 3 * draw(2, 6, 4)
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    outputs = [{"logits": {"output": logits}} for logits in (student, teacher)]
    places = ("logits", "output", "logits", "output")
    signals = [Signals(torch.ones(6, 1), 1, predictions=[Prediction(logits)]) for logits in (student, teacher)]
    # Its alpha is the share of the gold labels, 1 - alpha that of the teacher.
    signals[0].predictions[0].target = labels
    own = alpha * GoldObjective(Categorical())(*signals, {})
    own = own + (1 - alpha) * OutputObjective(Categorical(), temperature=temperature)(*signals, {})
    close(own, kd_loss(*places, temperature, alpha=alpha)(*outputs, labels))
    # Without labels it leaves out the factor T^2.
    plain = kd_loss(*places, temperature, alpha=0.0)(*outputs)
    close(Categorical().divergence(student, teacher, temperature=temperature, scale=False), plain)
    close(OutputObjective(Categorical(), temperature=temperature)(*signals, {}), plain * temperature**2)


# --- captum and attribution ------------------------------------------------------------------------------------------


def bert(labels: int, *, seed: int = 0) -> PreTrainedModel:
    """Return a tiny BERT with biases: without them LayerNorm makes it jump at a zero embedding."""
    model = tiny("bert", labels=labels, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def text_batch(labels: int) -> dict[str, Tensor]:
    mask = mask_of(LENGTHS)
    ids = torch.randint(5, 220, mask.shape, generator=torch.Generator().manual_seed(4)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(4) % labels}


def signals_of(model: PreTrainedModel, batch: Mapping[str, Tensor], steps: int) -> Signals:
    with Capture(model, Request(gradients=2, path=steps), CLASSIFICATION) as capture:
        signals = capture.run(batch)
    capture.close()
    return signals


def points_of(signals: Signals) -> list[tuple[Tensor, Tensor]]:
    points = signals.path or [(signals.hidden[0], signals.predictions)]
    return [(embedding, table.logits) for embedding, (table,) in points]


def with_labels(signals: Signals, labels: list[int]) -> Signals:
    return replace(signals, predictions=[replace(signals.predictions[0], target=torch.tensor(labels))])


def logits_at(model: PreTrainedModel, embedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return logits when the embedding output is `embedding`, put there by a hook of this test."""
    hook = embeddings_of(model).register_forward_hook(lambda *args: embedding)
    try:
        return model(input_ids=ids, attention_mask=mask).logits
    finally:
        hook.remove()


def embedding_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return embeddings_of(model)(batch["input_ids"])


def of_class(label: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: -torch.log_softmax(logits, dim=-1)[:, label].sum()


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("label", [0, 2])
def test_integrated_gradients_are_captums(steps, label):
    model, batch = bert(3), text_batch(3)
    signals = signals_of(model, batch, steps)
    path = points_of(signals)
    assert len(path) == steps
    own = path_gradient(path, of_class(label)) * signals.hidden[0]

    def score(embedding: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return -torch.log_softmax(logits_at(model, embedding, ids, mask), dim=-1)[:, label]

    others = (batch["input_ids"], batch["attention_mask"])
    if steps == 1:
        # One point is gradient times input; the integral wants at least two.
        embedding = embedding_of(model, batch).requires_grad_()
        reference = InputXGradient(score).attribute(embedding, additional_forward_args=others).detach()
    else:
        reference = IntegratedGradients(score, multiply_by_inputs=True).attribute(
            embedding_of(model, batch), additional_forward_args=others, n_steps=steps, method="riemann_right"
        )
    torch.testing.assert_close(own.detach(), reference.to(own.dtype), rtol=1e-4, atol=1e-5)
    close(saliency(own, torch.ones_like(own)).detach(), reference.float().norm(dim=-1))
    # Nothing depends on padding.
    assert own[batch["attention_mask"] == 0].abs().max() == 0.0


@pytest.mark.parametrize("label", [0, 1])
def test_attributions_add_up_to_the_change_of_the_score_as_steps_grow(label):
    model, batch = bert(2).double(), text_batch(2)
    embedding = embedding_of(model, batch)
    with torch.no_grad():
        ends = [
            -torch.log_softmax(logits_at(model, x, batch["input_ids"], batch["attention_mask"]), dim=-1)[:, label]
            for x in (torch.zeros_like(embedding), embedding)
        ]
    change = ends[1] - ends[0]
    errors = []
    for steps in (8, 64, 256):
        signals = signals_of(model, batch, steps)
        own = path_gradient(points_of(signals), of_class(label)) * embedding
        errors.append((own.sum((1, 2)) - change).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    # The right-hand rule's error falls as 1 / K.
    assert errors[2] / errors[1] == pytest.approx(64 / 256, rel=0.3)
    assert errors[2] < 0.02 * change.abs().max().item()


def directional_derivatives(
    model: PreTrainedModel, loss: Callable[[], Tensor], step: float
) -> Iterator[tuple[float, float]]:
    """Yield the derivative of `loss` along a random direction of each weight: by autograd and by differences."""
    parameters = {n: p for n, p in model.named_parameters() if "embeddings.word" in n or "layer.0" in n}
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    for number, (parameter, gradient) in enumerate(zip(parameters.values(), gradients, strict=True)):
        generator = torch.Generator().manual_seed(number)
        direction = torch.randn(parameter.shape, generator=generator).to(parameter)
        direction *= parameter.norm() / direction.norm()
        values, kept = [], parameter.detach().clone()
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(kept + sign * step * direction)
                with torch.enable_grad():
                    values.append(loss().item())
            parameter.copy_(kept)
        found = 0.0 if gradient is None else (gradient * direction).sum().item()
        yield found, (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_second_derivative_of_a_path_gradient_agrees_with_differences(steps):
    model, batch = bert(3).double(), text_batch(3)

    def loss() -> Tensor:
        signals = signals_of(model, batch, steps)
        path = points_of(signals)
        gradient = path_gradient(path, of_class(1), create_graph=True)
        return (gradient * path[-1][0]).square().sum()

    pairs = list(directional_derivatives(model, loss, 1e-5))
    # All but the bias of the keys, which no attention notices.
    assert sum(abs(found) > 1e-5 for found, _ in pairs) == len(pairs) - 1 == 16
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("labels", "steps"), [(2, 1), (3, 1), (3, 4)])
def test_the_attribution_gradient_agrees_with_differences(labels, steps):
    student, teacher, batch = bert(labels).double(), bert(labels, seed=1), text_batch(labels)
    objective = AttributionObjective(Categorical(), steps=steps, top_k=20)
    target = signals_of(teacher, batch, steps)

    def loss() -> Tensor:
        return objective(signals_of(student, batch, steps), target, batch)

    # Maps are fp32, so that the step must be large.
    pairs = list(directional_derivatives(student, loss, 3e-3))
    assert sum(abs(found) > 4e-5 for found, _ in pairs) == len(pairs) - 1 == 16
    for found, expected in pairs:
        assert found == pytest.approx(expected, rel=0.01, abs=1e-6)


def test_both_views_of_two_classes_are_the_same():
    model, batch = bert(2), text_batch(2)
    mask = batch["attention_mask"]
    signals = signals_of(model, batch, 1)
    path = points_of(signals)
    maps = [saliency(path_gradient(path, of_class(label)), signals.hidden[0]).detach() for label in (0, 1)]
    assert (maps[0] / maps[1]).nanmean() != pytest.approx(1.0, rel=0.01)
    assert attribution_loss(maps[0], maps[1], mask).item() < 1e-12

    teacher = signals_of(bert(2, seed=1), batch, 1)
    values = [
        AttributionObjective(Categorical())(with_labels(signals, labels), teacher, batch).item()
        for labels in ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0])
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)
    assert values[0] > 5e-4


@pytest.mark.parametrize("steps", [1, 3])
def test_scaling_the_score_does_not_change_the_attribution_loss(steps):
    batch = text_batch(3)
    student, teacher = signals_of(bert(3), batch, steps), signals_of(bert(3, seed=1), batch, steps)

    def value(own_scale: float, other_scale: float) -> Tensor:
        maps = []
        for signals, scale in ((student, own_scale), (teacher, other_scale)):
            path = points_of(signals)
            score = of_class(1)
            gradient = path_gradient(path, lambda z, scale=scale, score=score: scale * score(z))
            maps.append(saliency(gradient, signals.hidden[0]).detach())
        return attribution_loss(*maps, batch["attention_mask"])

    close(value(17.0, 0.01), value(1.0, 1.0))


def test_the_views_of_many_classes_are_added_up():
    batch = text_batch(3)
    student, teacher = signals_of(bert(3), batch, 1), signals_of(bert(3, seed=1), batch, 1)
    terms = []
    for label in range(3):
        maps = [
            saliency(path_gradient(points_of(s), of_class(label)), s.hidden[0]).detach() for s in (student, teacher)
        ]
        terms.append(attribution_loss(*maps, batch["attention_mask"]))
    found = AttributionObjective(Categorical())(student, teacher, batch)
    close(found, torch.stack(terms).sum())
    # Gold labels play no part.
    other = AttributionObjective(Categorical())(with_labels(student, [2, 2, 2, 2]), teacher, batch)
    assert other.item() == found.item()


# --- POT -------------------------------------------------------------------------------------------------------------

WEIGHTS = st.floats(1e-3, 1.0)


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Costs of random size and spread, with weights that are uniform or random on either side."""
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    generator = np.random.default_rng(draw(st.integers(0, 10_000)))
    cost = generator.exponential(size=(n, m)) ** draw(st.sampled_from([1, 4])) * 10.0 ** draw(st.integers(-6, 6))
    if draw(st.booleans()):
        cost[generator.random((n, m)) < 0.3] = 0.0
    sides = []
    for size in (n, m):
        weights = draw(st.one_of(st.just([1.0] * size), st.lists(WEIGHTS, min_size=size, max_size=size)))
        sides.append(np.array(weights) / sum(weights))
    return cost, sides[0], sides[1]


@settings(deadline=None, max_examples=100)
@given(problems())
def test_plans_cost_what_the_library_pays(problem):
    cost, supply, demand = problem
    flow = transport_plan(cost, supply, demand)
    assert flow.shape == cost.shape and (flow >= 0).all()
    assert flow.sum(1) == pytest.approx(supply, abs=1e-9)
    assert flow.sum(0) == pytest.approx(demand, abs=1e-9)
    if len(np.unique(cost)) == cost.size:
        assert (flow > 1e-12).sum() <= sum(cost.shape) - 1
    paid = (flow * cost).sum()
    assert paid == pytest.approx((ot.emd(supply, demand, cost) * cost).sum(), rel=1e-7, abs=1e-9 * cost.max())


@settings(deadline=None, max_examples=50)
@given(problems(), st.sampled_from([1e-9, 0.3, 1000.0, 1e9]))
def test_scaling_all_costs_leaves_the_plan_alone(problem, scale):
    cost, supply, demand = problem
    plain, scaled = transport_plan(cost, supply, demand), transport_plan(scale * cost, supply, demand)
    # Equal costs allow several cheapest plans; a plan of one is then a plan of the other.
    assert (scaled * cost).sum() == pytest.approx((plain * cost).sum(), rel=1e-9, abs=1e-9 * cost.max())
    if len(np.unique(cost)) == cost.size:
        assert scaled == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize("depths", [(3, 6), (4, 6), (6, 12), (5, 7), (11, 12), (1, 12), (12, 24)])
def test_uniform_weights_of_unequal_depths_are_shared_out_as_in_the_library(depths):
    n, m = depths
    cost = np.random.default_rng(n).random((n, m))
    supply, demand = np.full(n, 1 / n), np.full(m, 1 / m)
    flow = transport_plan(cost, supply, demand)
    assert flow == pytest.approx(ot.emd(supply, demand, cost), abs=1e-9)


@pytest.mark.parametrize("uniform", [True, False])
def test_identical_layers_are_followed_one_by_one_for_nothing(uniform):
    mask = mask_of(LENGTHS)
    layers = [draw(seed, 4, 9, 6) for seed in range(5)]
    cost = layer_costs(layers, layers, mask).numpy()
    weights = np.full(5, 0.2) if uniform else np.array([0.4, 0.1, 0.2, 0.05, 0.25])
    assert transport_plan(cost, weights, weights) == pytest.approx(np.diag(weights), abs=1e-9)
    assert (transport_plan(cost, weights, weights) * cost).sum() == pytest.approx(0.0, abs=1e-9)

    objective = EMDObjective((3, 3), attention=True)
    for _ in range(3):
        assert objective(captured(1, mask), captured(1, mask), {}).item() == 0.0
    assert objective.student_weights[0].tolist() == pytest.approx([1 / 3] * 3)


def test_layer_costs_are_the_losses_of_all_pairs():
    mask = mask_of(LENGTHS)
    student, teacher = captured(1, mask), captured(2, mask, layers=5)
    hidden = layer_costs([student.hidden[s] for s in (1, 2, 3)], [teacher.hidden[t] for t in range(1, 6)], mask)
    scores = layer_costs(
        [student.attention_scores(s) for s in (1, 2, 3)], [teacher.attention_scores(t) for t in range(1, 6)], mask
    )
    for s in (1, 2, 3):
        for t in range(1, 6):
            close(hidden[s - 1, t - 1], by_example(textbrewer.hid_mse_loss, student.hidden[s], teacher.hidden[t], mask))
            pair = student.attention_scores(s), teacher.attention_scores(t)
            close(scores[s - 1, t - 1], by_example(textbrewer.att_mse_loss, *pair, mask))


def test_layer_costs_of_packed_blocks_stay_within_documents():
    student = packed(captured(1, mask_of([4, 4])), captured(3, mask_of([5, 5])))
    teacher = packed(captured(2, mask_of([4, 4]), layers=5), captured(4, mask_of([5, 5]), layers=5))
    own = [student.attention_scores(s) for s in (1, 2, 3)]
    other = [teacher.attention_scores(t) for t in range(1, 6)]
    mask, segments = student.mask, student.segments
    cost = layer_costs(own, other, mask, segments)
    expected = [[attention_mse(s, t, mask, segments).item() for t in other] for s in own]
    assert cost.numpy() == pytest.approx(np.array(expected), rel=1e-5)
    flow = transport_plan(cost.double().numpy(), np.full(3, 1 / 3), np.full(5, 1 / 5))
    objective = EMDObjective((3, 5), hidden=False, attention=True)
    assert objective(student, teacher, {}).item() == pytest.approx((flow * np.array(expected)).sum(), rel=1e-5)
    assert not np.allclose(cost, layer_costs(own, other, mask), rtol=1e-2)


@pytest.mark.parametrize("separate", [False, True])
def test_the_transport_loss_is_the_librarys_distance_at_every_step(separate):
    mask = mask_of(LENGTHS)
    objective = EMDObjective((3, 5), attention=True, separate=separate)
    for step in range(6):
        student, teacher = captured(step, mask), captured(100 + step, mask, layers=5)
        weights = [w.double().numpy().copy() for w in (objective.student_weights, objective.teacher_weights)]
        assert len(weights[0]) == (2 if separate else 1)
        expected, learned = 0.0, []
        for row, name in ((0, "hidden"), (1 if separate else 0, "attention")):
            supply, demand = (w[row] / w[row].sum() for w in weights)
            layers = [
                [s.hidden[x] if name == "hidden" else s.attention_scores(x) for x in range(1, depth + 1)]
                for s, depth in ((student, 3), (teacher, 5))
            ]
            cost = layer_costs(*layers, mask).double().numpy()
            flow = ot.emd(supply, demand, cost)
            expected += (flow * cost).sum()
            # Weights go to the inverse of what a unit of a layer's flow costs.
            pays = (flow * cost).sum(1) / supply, (flow * cost).sum(0) / demand
            learned.append([(1 / pay) / (1 / pay).sum() for pay in pays])
        assert objective(student, teacher, {}).item() == pytest.approx(expected, rel=1e-5)
        sides = zip((objective.student_weights, objective.teacher_weights), zip(*learned, strict=True), strict=True)
        for found, each in sides:
            wanted = np.stack(each) if separate else np.mean(each, axis=0, keepdims=True)
            assert found.numpy() == pytest.approx(wanted, rel=1e-4)
            assert found.sum(1).tolist() == pytest.approx([1.0] * len(found)) and (found > 0).all()


def test_weights_do_not_move_in_evaluation_or_when_they_are_fixed():
    mask = mask_of(LENGTHS)
    for objective in (EMDObjective((3, 5)).eval(), EMDObjective((3, 5), learn_weights=False)):
        objective(captured(1, mask), captured(2, mask, layers=5), {})
        assert objective.student_weights[0].tolist() == pytest.approx([1 / 3] * 3)
        assert objective.teacher_weights[0].tolist() == pytest.approx([1 / 5] * 5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), WEIGHTS), min_size=1, max_size=12))
def test_learned_weights_are_a_distribution_that_favours_cheap_layers(layers):
    weights = np.array([weight for _, weight in layers])
    weights = weights / weights.sum()
    unit = np.array([cost for cost, _ in layers])
    found = cheap_weights(unit * weights, weights)
    assert found.sum() == pytest.approx(1.0) and (found > 0).all()
    if unit.max() > 0:
        order = np.argsort(unit)
        assert (np.diff(found[order]) <= 1e-12).all()


def test_a_cost_that_is_not_a_number_gives_a_plan_all_the_same():
    cost = np.array([[1.0, np.nan], [2.0, 3.0]])
    flow = transport_plan(cost, np.array([0.25, 0.75]), np.array([0.5, 0.5]))
    assert flow == pytest.approx(np.array([[0.125, 0.125], [0.375, 0.375]]))
