"""The training loop: what is updated and how, when it stops, what it keeps, and where it goes on."""

import io
import math
import re
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import factors_of
from families import tiny, tokenizer
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import run_recipe, tiny_recipe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training.stages import LOOP, Killed, folder_with_recipe, kill_after, rows
from transformers import PreTrainedModel

from kdcli.distill import run as pipeline
from kdcli.errors import InputError, RunError
from kdcli.manifest import MANIFEST, check_manifest
from kdcli.methods.base import Term
from kdcli.models.overparam import overparameterise
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.hidden import HiddenObjective
from kdcli.objectives.output import OutputObjective
from kdcli.recipe.schema import OverparamSection, Recipe
from kdcli.tasks.classification import KIND as CLASSIFICATION
from kdcli.tasks.encode import Collator
from kdcli.training.schemes.base import Scheme
from kdcli.training.settings import LoopSettings
from kdcli.training.step import Distiller
from kdcli.training.trainer import DistillationTrainer, fit, last_usable_checkpoint

OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DATA = rows(40)
"""Five batches of eight."""
WORDS = tokenizer()
ME = {"test": 1}
"""Which training the checkpoints belong to."""


def student(**extra: Any) -> PreTrainedModel:
    return tiny("bert", layers=1, seed=1, **extra)


def distiller(model: PreTrainedModel | None = None, teacher: PreTrainedModel | None = None) -> Distiller:
    terms = [Term("task", GoldObjective(Categorical()), 1.0)]
    if teacher is not None:
        terms += [Term("output", OutputObjective(Categorical()), 0.5), Term("hidden", HiddenObjective([(1, 2)]), 0.25)]
    return Distiller(model if model is not None else student(**OFF), terms, teacher=teacher, kind=CLASSIFICATION)


class Scores:
    """Metrics of which the values are known before; the last one stays."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.asked = 0

    def __call__(self, outputs: Any) -> dict[str, float]:
        assert outputs["logits"].shape == (40, 2)
        self.asked += 1
        return {"accuracy": self.values[min(self.asked, len(self.values)) - 1]}


class Watch(Scheme):
    """The standard scheme, taking notes before every forward pass."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model
        self.steps: list[int] = []
        self.rates: list[list[float]] = []
        self.examples: list[list[int]] = []
        self.weights: list[dict[str, Tensor]] = []

    def before_step(self, step: int, batch: Any, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.steps.append(step)
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.examples.append(batch["index"].tolist())
        if self.model is not None:
            self.weights.append(state_of(self.model))


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def train(
    folder: Path,
    step: Distiller | None = None,
    *,
    scores: Scores | None = None,
    scheme: Scheme | None = None,
    console: Console | None = None,
    collator: Any = None,
    log: Path | None = None,
    resume: bool = False,
    **loop: Any,
) -> dict[str, Any]:
    settings = replace(LOOP, **loop)
    return fit(
        step if step is not None else distiller(),
        train=DATA,
        selection=DATA if settings.eval_every else None,
        collator=collator or Collator(WORDS),
        metrics=scores or Scores(0.5),
        settings=settings,
        folder=folder,
        log_dir=log,
        title="test",
        console=console or Console(quiet=True),
        scheme=scheme,
        resume=resume,
        identity=ME,
    )


def evaluations(record: dict[str, Any]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_accuracy"]) for entry in record["history"] if "eval_accuracy" in entry]


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


# What is updated, and how.


def groups_of(optimizer: torch.optim.Optimizer, step: Distiller) -> list[tuple[set[str], dict[str, Any]]]:
    names = {parameter: name for name, parameter in step.named_parameters()}
    return [({names[p] for p in group["params"]}, group) for group in optimizer.param_groups]


def test_chains_have_a_rate_of_their_own_and_no_decay(tmp_path: Path):
    model = student(**OFF)
    overparameterise(model, OverparamSection(length=1, aux_weight=0.0))
    model.bert.embeddings.requires_grad_(False)
    step, watch = distiller(model), Watch()
    train(tmp_path, step, scheme=watch, max_steps=2, chain_learning_rate=2e-4, weight_decay=0.1)
    [(matrices, first), (vectors, second), (chains, third)] = groups_of(watch.optimizer, step)
    assert matrices == {"student.bert.pooler.dense.weight", "student.classifier.weight"}
    assert vectors and all(name.endswith(".bias") or "LayerNorm" in name for name in vectors)
    assert len(chains) >= 6 * 3 and all(".parametrizations.weight." in name for name in chains)
    assert [group["weight_decay"] for group in (first, second, third)] == [0.1, 0.0, 0.0]
    assert watch.rates[0] == [1e-3, 1e-3, 2e-4]
    trained = {name for name, p in step.named_parameters() if p.requires_grad}
    assert matrices | vectors | chains == trained and not any("embeddings" in name for name in trained)


def test_the_betas_and_the_epsilon_of_the_optimizer_are_those_asked_for(tmp_path: Path):
    step, watch = distiller(), Watch()
    train(tmp_path, step, scheme=watch, max_steps=1, betas=[0.8, 0.95], epsilon=1e-6)
    assert {(*group["betas"], group["eps"]) for group in watch.optimizer.param_groups} == {(0.8, 0.95, 1e-6)}


@pytest.mark.parametrize(
    ("section", "lengths"),
    [
        ({"factorization": "svd"}, {"query": 0, "ffn_in": 0}),
        ({"factorization": "svd-plain"}, {"query": 0, "ffn_in": 0}),
        # 32 = 8 x 4 and 64 = 8 x 8: a middle tensor adds a quarter of a matrix's weights there, half of them here.
        ({"scale": 3.0}, {"query": 7, "ffn_in": 3}),
        ({"length": 1, "factors": {"64": [4, 2, 2, 2, 2]}}, {"query": 1, "ffn_in": 3}),
    ],
)
def test_the_rate_of_a_chain_follows_from_its_own_length(tmp_path: Path, section: Any, lengths: dict[str, int]):
    model = student(**OFF)
    overparameterise(model, OverparamSection(**section, aux_weight=0.0))
    watch = Watch()
    train(tmp_path, distiller(model), scheme=watch, max_steps=1, weight_decay=0.1)
    groups = zip(watch.rates[0], watch.optimizer.param_groups, strict=True)
    rates = {id(p): rate for rate, group in groups for p in group["params"]}
    for name, length in lengths.items():
        for tensor in factors_of(model)[(1, name)]:
            assert rates[id(tensor)] == pytest.approx(1e-3 / (1.5 + 0.8 * length))


def test_a_recipe_says_the_rate_of_its_chains_or_leaves_it_to_every_step_or_their_lengths():
    recipe = tiny_recipe(overparam={"length": 3, "scale": 6.0}, train={"learning_rate": 1e-3})
    loop = LoopSettings.from_train(Recipe.model_validate(recipe), {})
    assert loop.chain_learning_rate == "matched" and loop.chain_rate(0) == loop.chain_rate(8) == 1e-3
    recipe["overparam"]["learning_rate"] = "by-length"
    loop = LoopSettings.from_train(Recipe.model_validate(recipe), {})
    assert [loop.chain_rate(length) for length in (0, 8)] == pytest.approx([1e-3 / 1.5, 1e-3 / 7.9])
    recipe["overparam"]["learning_rate"] = 2e-5
    loop = LoopSettings.from_train(Recipe.model_validate(recipe), {})
    assert loop.chain_rate(0) == loop.chain_rate(8) == 2e-5


def test_bridges_are_trained_beside_the_student(tmp_path: Path):
    bridge = HiddenObjective([(1, 2)], widths=(32, 16), bridge=True)
    step = Distiller(student(), [Term("hidden", bridge)], teacher=tiny("bert", hidden=16), kind=CLASSIFICATION)
    before, watch = state_of(step), Watch()
    train(tmp_path, step, scheme=watch, max_steps=2)
    after = state_of(step)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "objectives.hidden.bridges.1.weight" in moved
    assert "student.bert.embeddings.word_embeddings.weight" in moved and "student.classifier.weight" not in moved


@pytest.mark.parametrize(
    ("scheduler", "after"),
    [
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("constant", lambda t: 1.0),
    ],
)
def test_the_rate_rises_in_the_warm_up_and_falls_by_the_schedule(tmp_path: Path, scheduler: str, after: Any):
    model = student(**OFF)
    overparameterise(model, OverparamSection(length=1, aux_weight=0.0))
    watch, rate, slow = Watch(), 1e-3, 2e-4
    train(
        tmp_path,
        distiller(model),
        scheme=watch,
        max_steps=10,
        warmup=0.25,
        scheduler=scheduler,
        learning_rate=rate,
        chain_learning_rate=slow,
    )
    # A quarter of ten steps, rounded down.
    expected = [t / 2 if t < 2 else after((t - 2) / 8) for t in range(10)]
    assert watch.steps == list(range(10))
    assert [rates[0] for rates in watch.rates] == pytest.approx([rate * x for x in expected])
    assert [rates[-1] for rates in watch.rates] == pytest.approx([slow * x for x in expected])


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_parts_give_the_update_of_the_whole_batch(tmp_path: Path, parts: int):
    teacher = tiny("bert", **OFF)
    one, other = distiller(teacher=teacher), distiller(teacher=teacher)
    whole, shares = Watch(), Watch()
    first = train(tmp_path / "one", one, scheme=whole, log_every=1)
    second = train(tmp_path / "other", other, scheme=shares, log_every=1, gradient_accumulation=parts)
    assert shares.steps == [step for step in range(6) for _ in range(parts)]
    joined = [[*chain.from_iterable(shares.examples[i : i + parts])] for i in range(0, 6 * parts, parts)]
    assert joined == whole.examples
    mine, yours = state_of(one), state_of(other)
    # No prediction depends on a key's bias: its gradient is rounding alone, which AdamW makes as large as any.
    for name in (name for name in mine if not name.endswith("key.bias")):
        torch.testing.assert_close(yours[name], mine[name], atol=2e-5, rtol=1e-3)
    for a, b in zip(first["history"], second["history"], strict=True):
        assert {k: v for k, v in a.items() if k != "grad_norm"} == pytest.approx(
            {k: v for k, v in b.items() if k != "grad_norm"}, rel=1e-3, abs=1e-5
        )


def test_gradients_are_clipped_together(tmp_path: Path):
    """AdamW forgets a gradient's size, but not by how much it changes from one step to the next."""
    step, wild = distiller(), distiller()
    record = train(tmp_path / "one", step, max_steps=3, log_every=1, max_grad_norm=1e-3)
    train(tmp_path / "other", wild, max_steps=3, max_grad_norm=1e9)
    assert all(entry["grad_norm"] > 0.1 for entry in record["history"] if "grad_norm" in entry)
    assert not same(state_of(step), state_of(wild))


def test_a_batch_that_cannot_be_split_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"8 examples cannot be split over 1 process x 3"):
        train(tmp_path, gradient_accumulation=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told_before_training(tmp_path: Path):
    with pytest.raises(InputError, match="no GPU"):
        train(tmp_path, device="cuda")


def test_epochs_may_be_broken_and_steps_come_before_them():
    loop = replace(LOOP, max_steps=None, epochs=2.5, batch_size=16)
    # Three batches hold 40 examples; two and a half epochs of them are eight.
    assert loop.steps(40) == 8
    assert replace(loop, max_steps=3).steps(40) == 3
    assert replace(loop, epochs=0.01).steps(40) == 1


# When it stops, and which weights it ends with.


def test_training_stops_when_patience_is_at_its_end_and_the_best_weights_come_back(tmp_path: Path):
    step = distiller()
    watch = Watch(step)
    record = train(
        tmp_path,
        step,
        scheme=watch,
        scores=Scores(0.5, 0.7, 0.7, 0.6, 0.9),
        max_steps=20,
        eval_every=1,
        patience=2,
        select="best",
    )
    assert evaluations(record) == [(1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)]
    assert record["steps"] == 4 and record["best"] == 0.7 and record["best_step"] == 2
    # What was there before the third step is what two steps made.
    assert same(state_of(step), watch.weights[2])


def test_patience_without_selection_keeps_the_last_weights(tmp_path: Path):
    step = distiller()
    record = train(tmp_path, step, scores=Scores(0.9, 0.1), max_steps=20, eval_every=2, patience=1, select="last")
    assert record["steps"] == 4
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in state_of(step).items() if key in kept)


@pytest.mark.parametrize(("select", "expected"), [("best", 2), ("last", 6)])
def test_the_chosen_checkpoint_is_what_the_training_ends_with(tmp_path: Path, select: str, expected: int):
    step = distiller()
    watch = Watch(step)
    record = train(tmp_path, step, scheme=watch, scores=Scores(0.9, 0.4, 0.6), eval_every=2, select=select)
    assert record["steps"] == 6
    end = state_of(step)
    kept = load_file(tmp_path / f"checkpoint-{expected}" / "model.safetensors")
    assert all(torch.equal(kept[key], end[key]) for key in kept)
    assert same(end, watch.weights[2]) is (select == "best")


def test_the_last_step_is_scored_although_it_falls_between_two_evaluations(tmp_path: Path):
    step = distiller()
    record = train(tmp_path, step, scores=Scores(0.3, 0.8), max_steps=5, eval_every=3, select="best")
    assert evaluations(record) == [(3, 0.3), (5, 0.8)]
    assert record["best_step"] == 5 and checkpoints(tmp_path) == [3, 5]
    kept = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert torch.equal(kept["student.classifier.weight"], step.student.classifier.weight)


def test_the_last_step_is_scored_once_where_an_evaluation_falls_on_it(tmp_path: Path):
    scores = Scores(0.3, 0.8)
    assert evaluations(train(tmp_path, scores=scores, eval_every=3)) == [(3, 0.3), (6, 0.8)]
    assert scores.asked == 2


def test_an_evaluation_is_due_once_an_epoch_when_nothing_else_is_said(tmp_path: Path):
    settings = replace(LOOP, max_steps=7, eval_every=None)
    record = fit(
        distiller(),
        train=DATA,
        selection=DATA,
        collator=Collator(WORDS),
        metrics=Scores(0.5),
        settings=settings,
        folder=tmp_path,
        log_dir=None,
        title="test",
        console=Console(quiet=True),
    )
    assert [step for step, _ in evaluations(record)] == [5, 7]


# What it keeps, and where it goes on.


def test_a_checkpoint_holds_the_student_and_its_bridges_and_nothing_of_the_teacher(tmp_path: Path):
    bridge = HiddenObjective([(1, 2)], widths=(32, 16), bridge=True)
    step = Distiller(student(), [Term("hidden", bridge)], teacher=tiny("bert", hidden=16), kind=CLASSIFICATION)
    train(tmp_path, step, max_steps=2)
    [folder] = tmp_path.iterdir()
    kept = load_file(folder / "model.safetensors")
    assert {key.split(".")[0] for key in kept} == {"student", "objectives"}
    assert kept.keys() == step.state_dict().keys()
    assert check_manifest(folder, ME) is None


def newest(folder: Path, output: io.StringIO | None = None, **options: Any) -> Path | None:
    console = Console(file=output or io.StringIO(), width=400)
    return last_usable_checkpoint(folder, ME, console, **options)


def test_an_incomplete_checkpoint_is_not_gone_on_from_and_does_not_stay(tmp_path: Path):
    train(tmp_path, eval_every=2, scores=Scores(0.1, 0.2, 0.3))
    assert checkpoints(tmp_path) == [4, 6]
    assert newest(tmp_path) == tmp_path / "checkpoint-6"
    (tmp_path / "checkpoint-6" / MANIFEST).unlink()
    (tmp_path / "checkpoint-10").mkdir()
    output = io.StringIO()
    assert newest(tmp_path, output) == tmp_path / "checkpoint-4"
    # A killed run is no reason to warn of anything.
    assert checkpoints(tmp_path) == [4] and output.getvalue() == ""
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


CONTENT = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST]


def spoil(path: Path, how: str) -> None:
    """Flip a bit in the middle of a file, cut it, empty it, remove it, or put another file of its kind there."""
    content = path.read_bytes()
    if how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "truncated":
        path.write_bytes(content[:-3])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "removed":
        path.unlink()
    else:
        shutil.copy(path.parent.parent / "checkpoint-4" / path.name, path)


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "removed", "replaced"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_is_taken(tmp_path: Path, how: str):
    train(tmp_path / "whole", eval_every=2)
    for name in CONTENT:
        if how == "removed" and name == MANIFEST:
            continue
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        spoil(folder / "checkpoint-6" / name, how)
        output = io.StringIO()
        assert newest(folder, output) == folder / "checkpoint-4", name
        assert "WARNING" in output.getvalue() and str(folder / "checkpoint-6") in output.getvalue()
        assert checkpoints(folder) == [4]


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path: Path):
    train(tmp_path, eval_every=2)
    assert last_usable_checkpoint(tmp_path, {"test": 2}, Console(quiet=True)) is None


def test_a_checkpoint_whose_best_one_is_damaged_is_not_gone_on_from(tmp_path: Path):
    train(tmp_path, eval_every=2, scores=Scores(0.9, 0.2, 0.3), select="best")
    assert checkpoints(tmp_path) == [2, 6]
    spoil(tmp_path / "checkpoint-2" / "model.safetensors", "flipped")
    assert newest(tmp_path) == tmp_path / "checkpoint-6"
    output = io.StringIO()
    assert newest(tmp_path, output, needs_best=True) is None
    assert "its best checkpoint, checkpoint-2, is not whole: model.safetensors was changed" in output.getvalue()


def test_a_best_checkpoint_that_was_damaged_meanwhile_is_not_what_a_training_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Spoiling(Scores):
        def __call__(self, outputs: Any) -> dict[str, float]:
            if self.asked == 2:
                spoil(tmp_path / "checkpoint-2" / "model.safetensors", "flipped")
            return super().__call__(outputs)

    with pytest.raises(RunError, match=r"checkpoint-2 cannot be used: model.safetensors was changed"):
        train(tmp_path, eval_every=2, scores=Spoiling(0.9, 0.2, 0.3), select="best")


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is removed, two checkpoints are whole at that time, or the only other one is being written."""
    seen: list[int] = []
    remove = shutil.rmtree

    def watch(path: Any, *arguments: Any, **options: Any) -> None:
        folder = Path(path)
        if folder.is_dir() and folder.name.startswith("checkpoint-"):
            others = [one for one in folder.parent.glob("checkpoint-*") if one != folder]
            seen.append(sum(check_manifest(one, ME) is None for one in others))
            # What is half removed is no checkpoint any more.
            assert not (folder / MANIFEST).exists()
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", watch)
    train(tmp_path, eval_every=1)
    assert seen == [2, 2, 2, 2] and checkpoints(tmp_path) == [5, 6]


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(tmp_path, max_steps=2)
    torch_save = torch.save

    def fail(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if "optimizer" in str(file):
            raise Killed
        torch_save(content, file, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch, "save", fail)
        train(tmp_path, max_steps=2)
    assert checkpoints(tmp_path) == [2] and newest(tmp_path) is None


def interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, scores: tuple[float, ...] = (0.5,), **loop: Any
) -> tuple[list[Distiller], list[dict[str, Any]], list[Watch]]:
    """Train in one go, and again with a stop at `at`; return both distillers, records and notes at their ends."""
    # Dropout is on: the random numbers must go on where they stopped.
    steps = [distiller(student()), distiller(student()), distiller(student())]
    watches = [Watch() for _ in steps]
    scored = Scores(*scores)
    whole = train(folder / "whole", steps[0], scheme=watches[0], scores=scored, **loop)
    scored = Scores(*scores)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, at)
        train(folder / "parts", steps[1], scheme=watches[1], scores=scored, **loop)
    torch.manual_seed(12345)
    resumed = train(folder / "parts", steps[2], scheme=watches[2], scores=scored, resume=True, **loop)
    watches[1].steps += watches[2].steps
    watches[1].examples += watches[2].examples
    watches[1].rates += watches[2].rates
    return [steps[0], steps[2]], [whole, resumed], watches[:2]


@pytest.mark.parametrize("at", [2, 5, 7])
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    """An epoch has five steps: the stop comes within the first, at its end, and within the second."""
    every = {2: 2, 5: 5, 7: 7}[at]
    steps, records, watches = interrupted(
        tmp_path, monkeypatch, at, (0.5, 0.6, 0.7), max_steps=12, eval_every=every, warmup=0.25, log_every=3
    )
    assert watches[0].steps == watches[1].steps == list(range(12))
    assert watches[0].examples == watches[1].examples
    assert watches[0].rates == watches[1].rates
    assert same(state_of(steps[0]), state_of(steps[1]))
    assert records[0]["history"] == records[1]["history"]
    assert records[1]["steps"] == 12


@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_a_training_stopped_after_its_last_step_does_not_make_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
):
    steps, records, watches = interrupted(
        tmp_path, monkeypatch, 7, (0.5, 0.6), max_steps=7, eval_every=4, scheduler=scheduler
    )
    assert watches[1].steps == list(range(7))
    assert same(state_of(steps[0]), state_of(steps[1]))
    assert records[1]["steps"] == 7
    assert evaluations(records[0]) == evaluations(records[1]) == [(4, 0.5), (7, 0.6)]


def test_the_best_of_a_stopped_training_may_lie_before_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps, records, _ = interrupted(
        tmp_path, monkeypatch, 4, (0.9, 0.2, 0.3, 0.4), max_steps=8, eval_every=2, select="best"
    )
    assert same(state_of(steps[0]), state_of(steps[1]))
    assert [record["best_step"] for record in records] == [2, 2]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_patience_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    """The whole run ends after step 4: one good evaluation and three that are worse."""
    steps, records, watches = interrupted(
        tmp_path, monkeypatch, at, (0.9, 0.2, 0.3, 0.4, 0.5), max_steps=12, eval_every=1, patience=3, select="last"
    )
    assert [record["steps"] for record in records] == [4, 4]
    assert watches[1].steps == [0, 1, 2, 3]
    assert same(state_of(steps[0]), state_of(steps[1]))


def test_objectives_and_collator_are_told_which_epoch_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Noting(GoldObjective):
        def __init__(self) -> None:
            super().__init__(Categorical())
            self.told: list[tuple[int, int]] = []

        def begin_epoch(self, epoch: int, epochs: int) -> None:
            self.told.append((epoch, epochs))

    class Attentive(Collator):
        def begin_epoch(self, epoch: int) -> None:
            self.told = [*getattr(self, "told", []), epoch]

    objectives, collators = [Noting(), Noting()], [Attentive(WORDS), Attentive(WORDS)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 6)
        train(
            tmp_path,
            Distiller(student(), [Term("task", objectives[0])], kind=CLASSIFICATION),
            collator=collators[0],
            max_steps=12,
            eval_every=6,
        )
    train(
        tmp_path,
        Distiller(student(), [Term("task", objectives[1])], kind=CLASSIFICATION),
        collator=collators[1],
        max_steps=12,
        eval_every=6,
        resume=True,
    )
    assert objectives[0].told == [(0, 3), (1, 3)] and collators[0].told == [0, 1]
    assert objectives[1].told == [(1, 3), (2, 3)] and collators[1].told == [1, 2]


def test_hooks_are_gone_after_training_and_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def hooks(step: Distiller, teacher: PreTrainedModel) -> int:
        return sum(len(m._forward_hooks) for model in (step, teacher) for m in model.modules())

    teacher = tiny("bert")
    step = distiller(teacher=teacher)
    assert hooks(step, teacher) > 0
    train(tmp_path / "one", step, max_steps=1)
    assert hooks(step, teacher) == 0
    step = distiller(teacher=teacher)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        train(tmp_path / "two", step, max_steps=1)
    assert hooks(step, teacher) == 0


STAGES = tiny_recipe(
    "teacher",
    method={"name": "tinybert", "shares": [0.5, 0.5]},
    seed=3,
    task={"train_samples": 40, "validation_samples": 40},
    teacher={"model": "teacher"},
    train={
        "max_steps": 12,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "eval_every": 1,
        "patience": 1,
        "select": "best",
        "keep_checkpoints": True,
    },
)


def test_a_stage_without_a_prediction_runs_to_its_end_and_keeps_its_last_weights(tmp_path: Path):
    folder = folder_with_recipe(tmp_path, STAGES)
    run = run_recipe(folder / "recipe.toml")
    inside, prediction = run["training"]
    # The head's answers do not change while only the inside is compared: patience of 1 would have ended at step 2.
    assert inside["stage"] == "intermediate" and inside["steps"] == 6
    kept = folder / "runs" / "recipe" / "checkpoints" / "1-intermediate"
    last, final = (load_file(kept / name / "model.safetensors") for name in ("checkpoint-6", "final"))
    assert same(last, final)
    assert prediction["best"] == max(score for _, score in evaluations(prediction))


def test_a_run_stopped_after_its_training_does_not_train_again_and_tells_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = folder_with_recipe(tmp_path, STAGES)
    path = folder / "recipe.toml"
    whole = run_recipe(path, output=folder / "whole")

    def fail(*arguments: Any, **more: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "score_student", fail)
        run_recipe(path, output=folder / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "train", fail)
        parts = run_recipe(path, output=folder / "parts", resume=True)
    assert parts["hashes"] == whole["hashes"]
    for record in (whole, parts):
        for stage in record["training"]:
            assert stage.pop("seconds") > 0
    assert parts["training"] == whole["training"]


# What it tells.


class Noted(GoldObjective):
    """The task objective, noting its values."""

    def __init__(self) -> None:
        super().__init__(Categorical())
        self.values: list[float] = []

    def forward(self, *arguments: Any) -> Tensor:
        value = super().forward(*arguments)
        self.values.append(float(value.detach()))
        return value


@pytest.mark.parametrize("parts", [1, 2])
def test_logged_terms_are_means_since_the_last_line(tmp_path: Path, parts: int):
    noted = Noted()
    terms = [Term("task", noted, 0.5), Term("output", OutputObjective(Categorical()), 2.0)]
    step = Distiller(student(), terms, teacher=tiny("bert"), kind=CLASSIFICATION)
    record = train(tmp_path, step, log_every=2, eval_every=3, gradient_accumulation=parts)
    lines = [entry for entry in record["history"] if "loss" in entry]
    # The first step, every second, and those of the checkpoints.
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 6] and len(noted.values) == 6 * parts
    for before, line in zip([0, 1, 2, 3, 4], lines, strict=True):
        mine = noted.values[parts * before : parts * line["step"]]
        assert line["task"] == pytest.approx(sum(mine) / len(mine), rel=1e-5)
        assert line["loss"] == pytest.approx(0.5 * line["task"] + 2.0 * line["output"], rel=1e-5)


@pytest.mark.parametrize("steps", [20, 39, 64])
def test_a_curve_has_twenty_points_from_the_first_step_to_the_last(tmp_path: Path, steps: int):
    record = train(tmp_path, distiller(teacher=tiny("bert")), max_steps=steps, log_every=None)
    points = [entry["step"] for entry in record["history"] if {"loss", "task", "output", "hidden"} <= set(entry)]
    assert len(points) >= 20 and points[0] == 1 and points[-1] == steps


def test_the_chosen_cadence_suits_any_length():
    chosen = replace(LOOP, log_every=None)
    for steps in (1, 19, 20, 21, 40, 59, 999, 1000, 1001, 10_000, 123_456, 10_000_000):
        interval = chosen.log_interval(steps)
        assert interval == 1 if steps < 20 else 20 <= steps // interval <= 400
    assert chosen.log_interval(5_000) == 50
    assert replace(LOOP, log_every=7).log_interval(10_000) == 7


class Synchronisations(TorchDispatchMode):
    """Counts how often a number leaves the tensors, without the library's own look for padding in every mask."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            callers = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
            self.count += not any(name.endswith("masking_utils.py") for name in callers)
        return function(*arguments, **(options or {}))


def test_no_number_leaves_the_device_between_two_log_lines(tmp_path: Path):
    teacher = tiny("bert")

    def count(name: str, **loop: Any) -> int:
        with Synchronisations() as mode:
            train(tmp_path / name, distiller(teacher=teacher), warmup=0.2, **loop)
        return mode.count

    few = count("few", max_steps=2, log_every=100)
    assert count("more", max_steps=5, log_every=100) == few
    assert count("parts", max_steps=5, log_every=100, gradient_accumulation=2) == few
    assert count("often", max_steps=5, log_every=1) > few


def test_off_a_terminal_progress_is_whole_plain_lines(tmp_path: Path):
    output = io.StringIO()

    class Long(Scores):
        def __call__(self, outputs: Any) -> dict[str, float]:
            return {**super().__call__(outputs), "balanced_accuracy": 0.25, "matthews_correlation": 0.125}

    train(
        tmp_path,
        distiller(teacher=tiny("bert")),
        scores=Long(0.5, 0.75),
        console=Console(file=output, width=40),
        log_every=2,
        eval_every=3,
    )
    lines = output.getvalue().splitlines()
    number = r"\d[\d.e+-]*"
    progress = re.compile(
        rf"test  step (\d)/6  loss {number}  task {number}  output {number}  hidden {number}  "
        r"\d+ examples/s  0:0\d left"
    )
    steps = [progress.fullmatch(line) for line in lines]
    assert [match[1] for match in steps if match] == ["1", "2", "3", "4", "6"]
    scored = [line for line, match in zip(lines, steps, strict=True) if not match]
    assert scored == [
        f"test  step {step}  evaluated: accuracy {score}  balanced_accuracy 0.2500  matthews_correlation 0.1250"
        for step, score in ((3, "0.5000"), (6, "0.7500"))
    ]
    assert "\x1b" not in output.getvalue()


@pytest.fixture
def terminal() -> Iterator[io.StringIO]:
    output = io.StringIO()
    output.isatty = lambda: True  # type: ignore[method-assign]
    yield output


def test_on_a_terminal_the_bar_goes_away_and_the_cursor_comes_back(
    tmp_path: Path, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    hide, show = "\x1b[?25l", "\x1b[?25h"
    console = Console(file=terminal, force_terminal=True, width=100)
    train(tmp_path / "one", console=console, max_steps=2)
    assert terminal.getvalue().rindex(show) > terminal.getvalue().rindex(hide)
    terminal.truncate(0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        train(tmp_path / "two", console=console, max_steps=2)
    assert terminal.getvalue().rindex(show) > terminal.getvalue().rindex(hide)


def test_the_log_is_one_that_tensorboard_reads(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step = distiller(teacher=tiny("bert"))
    record = train(tmp_path / "run", step, log=tmp_path / "log", scores=Scores(0.5, 0.75), eval_every=3)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    assert {"train/loss", "train/task", "train/output", "train/hidden"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("eval/accuracy")] == [(3, 0.5), (6, 0.75)]
    lines = [(entry["step"], entry["task"]) for entry in record["history"] if "task" in entry]
    assert [event.step for event in events.Scalars("train/task")] == [number for number, _ in lines] == [1, 2, 3, 4, 6]
    assert [event.value for event in events.Scalars("train/task")] == pytest.approx([value for _, value in lines])


def test_without_a_folder_for_the_log_there_is_none(tmp_path: Path):
    train(tmp_path, max_steps=1)
    assert not list(tmp_path.rglob("events*"))
