"""AD-KD: predictions and attribution maps of real small models."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMES, tiny, tokenizer
from pydantic import ValidationError
from rich.console import Console
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerControl, TrainerState

from kdcli.cli.methods import tasks_of
from kdcli.distill.recipe import load_recipe
from kdcli.distill.student import make_distiller
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.adkd import METHOD, ADKDOptions
from kdcli.methods.base import Context
from kdcli.models.blocks import embeddings_of
from kdcli.models.capture import Capture
from kdcli.models.inputs import model_inputs
from kdcli.models.overparam import overparameterise
from kdcli.models.shape import shape_of
from kdcli.objectives.attribution import path_gradient, saliency
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.output import OutputObjective
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import Request
from kdcli.tasks import registry as kinds
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.load import load_task
from kdcli.training.callbacks import TellEpochs
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller

WORDS = tokenizer()


def context(kind: str = "classification", labels: int = 2) -> Context:
    shape = shape_of(tiny("bert").config)
    return Context(shape, dataclasses.replace(shape, layers=1), "depth", kinds.get(kind), [(1, 2)])


def batch_of(labels: Tensor | None = None) -> dict[str, Tensor]:
    texts = ["the film was dull", "although it rained , the plot seemed really gripping", "witty"]
    batch = dict(WORDS(texts, padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([0, 1, 1]) if labels is None else labels
    batch["index"] = torch.arange(3)
    return batch


def terms(options: ADKDOptions, **extra: Any) -> dict[str, Any]:
    return {term.name: term for term in METHOD.build(options, context(**extra))[0].terms}


def distiller(student: Any, teacher: Any, options: ADKDOptions, **extra: Any) -> Distiller:
    return Distiller(
        student, list(terms(options, **extra).values()), teacher=teacher.requires_grad_(False), kind=CLASSIFICATION
    )


def logits_from_embeddings(model: nn.Module, batch: dict[str, Tensor], embeddings: Tensor) -> Tensor:
    """Run a model whose embedding layer says `embeddings`, whatever it reads."""
    handle = embeddings_of(model).register_forward_hook(lambda *_: embeddings)
    try:
        repeats = len(embeddings) // len(batch["input_ids"])
        return model(**{key: x.repeat(repeats, 1) for key, x in model_inputs(model, batch).items()}).logits
    finally:
        handle.remove()


def embeddings_of_batch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**model_inputs(model, batch), output_hidden_states=True).hidden_states[0].detach()


def maps_by_hand(model: nn.Module, batch: dict[str, Tensor], score: Any, top_k: int | None = None) -> Tensor:
    """Gradient x input one example at a time, written without any of the package's code."""
    rows = []
    for i in range(len(batch["input_ids"])):
        one = {key: x[i : i + 1] for key, x in batch.items()}
        x = embeddings_of_batch(model, one).requires_grad_()
        (gradient,) = torch.autograd.grad(score(logits_from_embeddings(model, one, x), one["labels"]), x)
        features = (gradient * x).detach()[0].abs().sort(dim=-1, descending=True).values[:, :top_k]
        row = features.square().sum(-1).sqrt() * one["attention_mask"][0]
        rows.append(row / row.square().sum().sqrt())
    return torch.stack(rows)


def mean_difference(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    real = [(student[i] - teacher[i])[mask[i] == 1].square().mean() for i in range(len(mask))]
    return torch.stack(real).mean().item()


def test_the_loss_is_the_published_sum():
    student, teacher, batch = tiny("bert", layers=1, seed=1), tiny("bert", layers=2, seed=2), batch_of()
    options = ADKDOptions(alpha=0.8, beta=7.0, temperature=3.0, top_k=20)
    found = distiller(student.train(), teacher, options).eval()
    found.training = True
    values = found({**batch})

    z_s, z_t = (model(**model_inputs(model, batch)).logits.detach() for model in (student, teacher))
    p, log_q = torch.softmax(z_t / 3, -1), torch.log_softmax(z_s / 3, -1)
    output = (p * (p.log() - log_q)).sum(-1).mean().item()
    task = functional.cross_entropy(z_s, batch["labels"]).item()
    own = maps_by_hand(student, batch, functional.cross_entropy)
    others = maps_by_hand(teacher, batch, functional.cross_entropy, top_k=20)
    attribution = mean_difference(own, others, batch["attention_mask"])
    assert values["output"].item() == pytest.approx(output, rel=1e-4)
    assert values["task"].item() == pytest.approx(task, rel=1e-4)
    assert values["attribution"].item() == pytest.approx(attribution, rel=1e-3)
    assert values["loss"].item() == pytest.approx(0.8 * output + 0.2 * task + 7.0 * attribution, rel=1e-4)


def test_three_classes_give_three_maps_whatever_the_label_is():
    student, teacher = tiny("bert", layers=1, labels=3, seed=1), tiny("bert", labels=3, seed=2)
    batch = batch_of(torch.tensor([0, 1, 2]))
    term = distiller(student, teacher, ADKDOptions(), labels=3).train().eval()
    term.training = True
    found = term(batch)["attribution"].item()
    expected = sum(
        mean_difference(
            *(maps_by_hand(m, batch, lambda z, y, c=c: -torch.log_softmax(z, -1)[0, c]) for m in (student, teacher)),
            batch["attention_mask"],
        )
        for c in range(3)
    )
    assert found == pytest.approx(expected, rel=1e-3)
    assert term({**batch, "labels": torch.tensor([2, 0, 0])})["attribution"].item() == pytest.approx(found, rel=1e-5)


def test_regression_compares_predictions_divided_by_the_temperature():
    student, teacher = tiny("bert", layers=1, labels=1, seed=1), tiny("bert", labels=1, seed=2)
    batch = batch_of(torch.tensor([0.5, 4.0, 2.0]))
    options = ADKDOptions(alpha=0.8, temperature=3.0)
    step = distiller(student, teacher, options, kind="regression", labels=1).eval()
    step.training = True
    z_s, z_t = (model(**model_inputs(model, batch)).logits for model in (student, teacher))
    values = step(batch)
    assert values["output"].item() == pytest.approx(((z_s / 3 - z_t / 3) ** 2).mean().item(), rel=1e-4)
    assert values["loss"].isfinite()


def test_a_student_like_its_teacher_has_nothing_left_to_learn_from_it():
    teacher = tiny("bert", seed=3)
    step = distiller(tiny("bert", seed=3), teacher, ADKDOptions(alpha=1.0)).eval()
    step.training = True
    assert step(batch_of())["loss"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("start", "epochs", "expected"), [(3.0, 5, [3.0, 2.5, 2.0, 1.5, 1.0]), (4.0, 2, [4.0, 1.0]), (2.0, 1, [2.0])]
)
def test_the_temperature_falls_to_one_by_the_last_epoch(start: float, epochs: int, expected: list[float]):
    falling, fixed = (OutputObjective(Categorical(), start, scale=False, anneal=anneal) for anneal in (True, False))
    seen = []
    for epoch in range(epochs):
        falling.begin_epoch(epoch, epochs)
        fixed.begin_epoch(epoch, epochs)
        seen.append(falling.temperature)
        assert fixed.temperature == start
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(("epoch", "temperature"), [(0.0, 3.0), (0.9, 3.0), (1.0, 2.5), (1.7, 2.5), (3.999, 1.5)])
def test_a_run_that_resumes_inside_an_epoch_has_that_epochs_temperature(epoch: float, temperature: float):
    step = distiller(tiny("bert", layers=1), tiny("bert"), ADKDOptions(temperature=3.0, anneal=True))
    state = TrainerState(epoch=epoch, num_train_epochs=5)
    TellEpochs(step, None).on_epoch_begin(None, state, TrainerControl())
    assert step.objectives["output"].temperature == pytest.approx(temperature)


@pytest.mark.parametrize("wrong", [{"alpha": 1.1}, {"beta": -1.0}, {"temperature": 0.0}, {"top_k": 0}, {"steps": 0}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        ADKDOptions(**wrong)


def test_no_more_features_than_the_teacher_has_can_count():
    METHOD.check(ADKDOptions(top_k=32), context())
    with pytest.raises(InputError, match="32 features") as caught:
        METHOD.check(ADKDOptions(top_k=33), context())
    assert caught.value.where == "method.top_k"


def test_all_features_and_no_limit_are_the_same():
    gradient, x = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    torch.testing.assert_close(saliency(gradient, x, 32), saliency(gradient, x))
    assert (saliency(gradient, x, 8) < saliency(gradient, x)).all()


def test_it_is_known_by_name():
    assert registry.get("adkd") is METHOD
    assert "text" not in tasks_of(METHOD)


@pytest.mark.parametrize("family", NAMES)
def test_every_family_can_be_differentiated_twice(family: str):
    student = tiny(family, layers=1, seed=1).train()
    step = distiller(student, tiny(family, seed=2), ADKDOptions(alpha=1.0, beta=1.0)).train()
    step.objectives["output"].forward = lambda student, *_: student.predictions[0].logits.sum() * 0.0
    step(batch_of())["loss"].backward()
    reached = [p for p in student.parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(reached) > 10
    assert all(torch.isfinite(p.grad).all() for p in reached)


def test_the_teachers_weights_get_no_gradient():
    teacher = tiny("bert", seed=2)
    step = distiller(tiny("bert", layers=1), teacher, ADKDOptions(steps=2)).train()
    step(batch_of())["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_mixed_precision_stays_finite():
    student = tiny("bert", layers=1, seed=1)
    step = distiller(student, tiny("bert", seed=2), ADKDOptions()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(batch_of())["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in student.parameters())


def test_an_over_parameterised_student_learns_through_every_tensor():
    student = tiny("bert", layers=1, seed=1)
    teacher, batch = tiny("bert", seed=2), batch_of()
    plain = distiller(student, teacher, ADKDOptions()).eval()
    plain.training = True
    before = plain(batch)["attribution"].item()
    plain.close()
    overparameterise(student, OverparamSection(length=1))
    step = distiller(student, teacher, ADKDOptions()).eval()
    step.training = True
    values = step(batch)
    assert values["attribution"].item() == pytest.approx(before, rel=1e-3)
    values["loss"].backward()
    chains = {name: p for name, p in student.named_parameters() if ".parametrizations." in name}
    assert chains
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in chains.values())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_each_point_of_the_path_costs_one_pass_of_each_model(steps: int):
    student, teacher = tiny("bert", layers=1), tiny("bert", seed=2)
    passes = {"student": 0, "teacher": 0}

    def count(name: str) -> Any:
        def add(*_: Any) -> None:
            passes[name] += 1

        return add

    student.base_model.register_forward_hook(count("student"))
    teacher.base_model.register_forward_hook(count("teacher"))
    distiller(student, teacher, ADKDOptions(steps=steps)).train()(batch_of())
    assert passes == {"student": steps, "teacher": steps}


def test_only_the_model_that_is_differentiated_twice_gives_up_fused_attention():
    student, teacher, fused = tiny("bert", layers=1), tiny("bert", seed=2), {}
    student.base_model.register_forward_hook(lambda *_: fused.update(student=torch.backends.cuda.flash_sdp_enabled()))
    teacher.base_model.register_forward_hook(lambda *_: fused.update(teacher=torch.backends.cuda.flash_sdp_enabled()))
    distiller(student, teacher, ADKDOptions()).train()(batch_of())["loss"].backward()
    assert fused == {"student": False, "teacher": True}


def path_of(model: Any, batch: dict[str, Tensor], steps: int) -> list[tuple[Tensor, Tensor]]:
    model.requires_grad_(False)
    with Capture(
        model, Request(logits=True, hidden=frozenset({0}), gradients=2, path=steps), CLASSIFICATION
    ) as capture:
        signals = capture.run(batch)
    capture.close()
    return [(embedding, table.logits) for embedding, (table,) in signals.path]


def test_attributions_add_up_to_what_the_words_changed():
    model, batch = tiny("bert", seed=4), batch_of()
    with torch.no_grad():
        # Without biases a layer norm hides the scale of its input: all change would happen at 0, between two points.
        for name, parameter in model.named_parameters():
            if name.endswith("dense.bias"):
                parameter.normal_()
    x = embeddings_of_batch(model, batch)
    with torch.no_grad():
        change = logits_from_embeddings(model, batch, x)[:, 1] - logits_from_embeddings(model, batch, 0 * x)[:, 1]
    errors = []
    for steps in (8, 64, 512):
        gradient = path_gradient(path_of(model, batch, steps), lambda z: z[:, 1].sum())
        errors.append(((gradient * x).sum((1, 2)) - change).abs().max().item())
    assert errors[2] < errors[0] / 10
    assert errors[2] < 0.01 * change.abs().max().item()


def test_captum_finds_the_same_integrated_gradients():
    captum = pytest.importorskip("captum.attr")
    model, batch = tiny("bert", seed=4), batch_of()
    x = embeddings_of_batch(model, batch)
    # Its own word for the right-hand rule; each point stands alone in the expanded batch.
    expected = captum.IntegratedGradients(
        lambda e: logits_from_embeddings(model, batch, e), multiply_by_inputs=True
    ).attribute(x, baselines=0, target=1, n_steps=6, method="riemann_right")
    found = path_gradient(path_of(model, batch, 6), lambda z: z[:, 1].sum()) * x
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-6)


def recipe_of(folder: Path, **options: Any) -> Path:
    document = tiny_recipe(method={"name": "adkd", **options}, train={"max_steps": 4, "log_every": 2})
    return write_recipe(folder / "tiny.toml", document)


def test_the_teacher_runs_in_every_step_instead_of_coming_from_the_cache(tmp_path: Path, own_cache: Path):
    recipe = load_recipe(recipe_of(tmp_path))
    task = load_task(recipe.task, recipe.evaluate, base=tmp_path)
    rows = encode(task.train.select(range(16)), WORDS, 32)
    for options, cached in ((ADKDOptions(), False), (ADKDOptions(beta=0.0), True)):
        scheme = Scheme()
        loop = dataclasses.replace(_loop(), eval_batch_size=8)
        student, teacher = tiny("bert", layers=1), tiny("bert", seed=2)
        setting = Setting(
            student, teacher, WORDS, task, rows, Collator(WORDS), loop, tmp_path, True, Console(quiet=True)
        )
        scheme.begin(setting)
        step = make_distiller(student, list(terms(options).values()), scheme, rows)
        assert (step.teacher_outputs is not None) == cached
        assert bool(list(own_cache.glob("logits/*"))) == cached
        assert (step.teacher_capture is None) == cached


def _loop() -> LoopSettings:
    return LoopSettings(
        epochs=1.0,
        max_steps=None,
        batch_size=8,
        gradient_accumulation=1,
        learning_rate=1e-3,
        scheduler="linear",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        precision="fp32",
        device="cpu",
        group_by_length=True,
        eval_every=None,
        patience=None,
        select="last",
        log_every=1,
        workers=0,
        seed=0,
        metric="accuracy",
    )


def test_a_recipe_runs_to_its_end(tmp_path: Path):
    result = run_recipe(recipe_of(tmp_path, anneal=True, top_k=20, steps=2))
    assert result["status"] == "done"
    assert result["method"]["options"]["top_k"] == 20
    history = result["training"][0]["history"]
    logged = [entry for entry in history if "attribution" in entry]
    assert logged and all(0 < entry["attribution"] < 10 for entry in logged)
    json.dumps(result)
