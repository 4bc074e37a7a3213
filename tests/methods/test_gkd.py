"""GKD: batches of the student's own responses, which follow from seed, step and row; the loss on them; resumption."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_decoder import LENGTH, model, tokenizer, write_world
from tiny_recipes import run_recipe, write_recipe
from torch import Tensor
from training.stages import Killed, kill_after

from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.methods import registry
from kdcli.methods.base import Context
from kdcli.models.generation import Sampling, generate
from kdcli.models.shape import shape_of
from kdcli.training.schemes.base import Setting
from kdcli.training.schemes.on_policy import OnPolicyScheme
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller

LOOP = LoopSettings(
    batch_size=8,
    precision="fp32",
    device="cpu",
    group_by_length=True,
    workers=0,
    select="last",
    seed=3,
)
END = {2, *range(40, 90)}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A student with dropout, in training mode, its teacher, and the rows."""
    folder = tmp_path_factory.mktemp("gkd")
    recipe = write_recipe(folder / "recipe.toml", write_world(folder, method={"name": "gkd"}))
    prepared = prepare(load_recipe(recipe), recipe)
    words, task = tokenizer(), prepared.task
    student = model(words, seed=1, layers=1)
    student.config.attention_dropout = 0.3
    student.config.eos_token_id = sorted(END)
    encoded = task.kind.prepare(task, words, LENGTH)
    return Setting(
        student=student.train(),
        teacher=model(words),
        processor=words,
        task=task,
        train=encoded.train,
        collator=encoded.collator,
        loop=LOOP,
        base=folder,
        cache=True,
        console=Console(quiet=True),
    )


def begun(setting: Setting, share: float = 1.0, **options: Any) -> OnPolicyScheme:
    scheme = OnPolicyScheme("gkd", share, Sampling(1.0), max_new_tokens=9, **options)
    scheme.begin(setting)
    return scheme


def batch_of(setting: Setting, rows: Any) -> dict[str, Tensor]:
    return setting.collator([setting.train[int(row)] for row in rows])


def test_a_batch_has_the_same_prompts_and_the_students_responses(setting: Setting) -> None:
    scheme, kind = begun(setting), setting.task.kind
    given = batch_of(setting, range(8))
    before, state = copy.deepcopy(given), torch.get_rng_state()
    (batch,) = scheme.batches(5, [given])
    assert all(torch.equal(given[name], values) for name, values in before.items())
    assert torch.equal(torch.get_rng_state(), state) and setting.student.training
    assert torch.equal(batch["index"], given["index"])
    prompts: list[list[int]] = kind.prompts(setting.task.train, setting.processor, LENGTH)  # type: ignore[attr-defined]
    written = []
    for row, index in enumerate(batch["index"].tolist()):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()
        prompt = prompts[index]
        assert ids[: len(prompt)] == prompt and labels == [-100] * len(prompt) + ids[len(prompt) :]
        assert (batch["labels"][row, length:] == -100).all()
        written.append(ids[len(prompt) :])
        expected = generate(
            setting.student,
            [prompt],
            max_new_tokens=9,
            end=END,
            pad=0,
            sampling=Sampling(1.0),
            seed=(LOOP.seed, 5),
            numbers=[index],
        )
        assert expected == [written[-1]]
    assert len({len(response) for response in written}) > 2
    # All that is counted and weighed is of the new tokens.
    assert batch["targets"].tolist() == [token for response in written for token in response]
    assert batch["prediction_weights"].numel() == sum(map(len, written))


def test_what_is_written_depends_on_seed_step_and_row_alone(setting: Setting) -> None:
    scheme = begun(setting)

    def responses(step: int, *parts: Any) -> dict[int, list[int]]:
        found = scheme.batches(step, [batch_of(setting, rows) for rows in parts])
        return {
            int(index): [token for token, label in zip(ids, labels, strict=True) if label != -100]
            for batch in found
            for index, ids, labels in zip(
                batch["index"], batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
            )
        }

    whole = responses(5, range(8))
    torch.manual_seed(77)
    assert responses(5, [6, 7, 1], [0], [2, 5, 4, 3]) == whole
    assert responses(6, range(8)) != whole


def test_the_share_of_on_policy_steps(setting: Setting) -> None:
    for share in (0.0, 0.3, 1.0):
        scheme = begun(setting, share)
        chosen = [scheme.is_on_policy(step) for step in range(500)]
        assert abs(np.mean(chosen) - share) < 5 * (share * (1 - share) / 500) ** 0.5 + 1e-9
        assert chosen == [begun(setting, share).is_on_policy(step) for step in range(500)]
    scheme = begun(setting, 0.3)
    step = next(step for step in range(100) if not scheme.is_on_policy(step))
    batch = batch_of(setting, range(4))
    assert scheme.batches(step, [batch])[0] is batch


def dense(student: Tensor, teacher: Tensor, name: str, beta: float, temperature: float) -> Tensor:
    """Return the divergence of each row in fp64. student, teacher: logits (n, vocabulary)."""
    q, p = (logits.double().div(temperature).softmax(-1) for logits in (student, teacher))

    def kl(one: Tensor, other: Tensor) -> Tensor:
        return (one * (one.log() - other.log())).sum(-1)

    if name == "js":
        mean = beta * p + (1 - beta) * q
        return beta * kl(p, mean) + (1 - beta) * kl(q, mean)
    return kl(p, q) if name == "kl" else kl(q, p)


@pytest.mark.parametrize(
    ("options", "name", "beta"),
    [
        ({"temperature": 1.5}, "js", 0.5),
        ({"beta": 0.2}, "js", 0.2),
        ({"divergence": "kl"}, "kl", 0.5),
        ({"divergence": "reverse-kl"}, "reverse-kl", 0.5),
    ],
)
def test_its_loss_and_gradient_are_those_of_the_formula(
    options: dict[str, Any], name: str, beta: float, setting: Setting
) -> None:
    """On a batch of the student's own responses, with all logits of both models at once."""
    assert setting.teacher is not None
    student: Any = copy.deepcopy(setting.student)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.0
    shapes = shape_of(setting.teacher.config), shape_of(student.config)
    context = Context(*shapes, "depth", setting.task.kind, [(1, 2)], max_length=LENGTH)
    method = registry.get("gkd")
    (stage,) = method.build(method.options.model_validate(options), context)
    (batch,) = begun(setting).batches(0, [batch_of(setting, range(6))])
    distiller = Distiller(student, stage.terms, kind=setting.task.kind, teacher=setting.teacher)
    loss = distiller.train()(batch)["loss"]
    found = torch.autograd.grad(loss, list(student.parameters()))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    places = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    temperature = options.get("temperature", 1.0)
    with torch.no_grad():
        teacher = setting.teacher(**inputs).logits[places]
    values = dense(student(**inputs).logits[places], teacher, name, beta, temperature) * temperature**2
    assert len(values) == len(batch["targets"])
    expected = torch.autograd.grad(values.mean(), list(student.parameters()))
    torch.testing.assert_close(loss.double(), values.mean(), rtol=1e-5, atol=1e-7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_plan_has_no_gold_term(tmp_path: Path) -> None:
    """Gold answers would be the student's own: it would learn to repeat itself."""
    recipe = write_recipe(tmp_path / "recipe.toml", write_world(tmp_path, method={"name": "gkd"}))
    assert make_plan(prepare(load_recipe(recipe), recipe)).stages[0].terms == {"output": 1.0}


@pytest.mark.parametrize("method", ["gkd", pytest.param("minillm", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_student(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_policy": 0.5} if method == "gkd" else {"long_term": True}
    train = {"max_steps": 4, "eval_every": 2}
    world = write_world(tmp_path, method={"name": method, **options}, train=train)
    recipe = write_recipe(tmp_path / "recipe.toml", world)
    whole = run_recipe(recipe, "name=whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, "checkpoints/1-")
        run_recipe(recipe, "name=parts")
    resumed = run_recipe(recipe, "name=parts", resume=True)
    assert resumed["hashes"]["student"] == whole["hashes"]["student"]
    assert resumed["training"][0]["history"] == whole["training"][0]["history"]
