"""A teacher's most probable next tokens on disk: what a step reads is what the teacher itself says of those rows."""

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from small_decoder import write_world
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcli.models.save import save_model
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Term
from kdcli.signals import TopTokens
from kdcli.tasks.causal_lm import KIND
from kdcli.tasks.next_tokens import NextTokenCollator
from kdcli.training.step import Distiller
from kdcli.training.teacher_tokens import Cut, KnownTokens, Table, TokensCollator, keep_tokens, top_tokens

LENGTHS, HELD = (9, 4, 17, 2, 12, 17), (5, 11)


def rows_of(lengths: tuple[int, ...], seed: int) -> Dataset:
    random = np.random.default_rng(seed)
    rows = [random.integers(5, 200, length).tolist() for length in lengths]
    masks = [[1] * length for length in lengths]
    return Dataset.from_dict(
        {"index": list(range(len(rows))), "input_ids": rows, "attention_mask": masks, "length": list(lengths)}
    )


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return families.tiny("llama", seed=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(teacher: PreTrainedModel, rows: Dataset, cut: Cut) -> Table:
    collator = NextTokenCollator(families.tokenizer())
    options: dict[str, Any] = {
        "kind": KIND,
        "batch_size": 4,
        "device": "cpu",
        "console": Console(quiet=True),
    }
    return keep_tokens(teacher, rows, collator, cut, **options)


class Known:
    """What is kept for two data sets, and batches of them."""

    def __init__(self, teacher: PreTrainedModel, cut: Cut) -> None:
        sets = [rows_of(LENGTHS, 0), rows_of(HELD, 1)]
        self.known = KnownTokens([kept(teacher, rows, cut) for rows in sets])
        self.sets = [self.known.placed(rows, number) for number, rows in enumerate(sets)]
        self.collator = TokensCollator(NextTokenCollator(families.tokenizer()), self.known)

    def batch(self, number: int, rows: list[int]) -> dict[str, Tensor]:
        return self.collator([self.sets[number][row] for row in rows])


@pytest.mark.parametrize("everywhere", [False, True], ids=["predicted", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_batch_gets_what_the_teacher_says_of_its_rows(
    teacher: PreTrainedModel, cache: Path, everywhere: bool, temperature: float
):
    """In any order, beside other rows, of the training rows and of the held-out ones."""
    cut = Cut(7, temperature, everywhere)
    known = Known(teacher, cut)
    for number, rows in ((0, [2, 0, 3]), (0, [5]), (1, [1, 0])):
        batch = known.batch(number, rows)
        found = known.known.of(batch).logits
        with torch.no_grad():
            output = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        positions = KIND.positions(batch, everywhere=everywhere)
        expected = top_tokens(output.logits.flatten(0, 1)[positions], cut)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.log_probabilities, expected.log_probabilities, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.log_probabilities.exp().sum(1), torch.ones(len(positions)))
    rest = known.known.tables[0].rest
    logs = np.array(known.known.tables[0].log_probabilities)
    assert rest == pytest.approx(np.exp(logs[:, -1]).mean(), rel=1e-5) and 0.1 < rest < 0.99


@pytest.mark.parametrize("everywhere", [False, True], ids=["predicted", "all"])
def test_a_step_without_the_teacher_is_that_with_it(teacher: PreTrainedModel, cache: Path, everywhere: bool):
    """With all tokens but one kept, loss and gradients are those of a step beside which the teacher runs."""
    known = Known(teacher, Cut(teacher.config.vocab_size - 1, 2.0, everywhere))
    student = families.tiny("llama", layers=1)
    terms = [Term("output", OutputObjective(Categorical(), 2.0, all_positions=everywhere))]
    beside = Distiller(student, terms, kind=KIND, teacher=teacher)
    alone = Distiller(student, terms, kind=KIND, teacher=teacher, teacher_outputs=known.known)
    assert alone.teacher_capture is None and beside.teacher_capture is not None
    found = []
    for step in (beside, alone):
        for number, training in ((0, True), (1, False)):
            loss = step.train(training)(known.batch(number, [1, 0]))["loss"]
            found.append((loss, torch.autograd.grad(loss, list(student.parameters())) if training else ()))
    for (one, gradients), (other, others) in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
        for first, second in zip(gradients, others, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_the_pass_is_made_once_and_damage_is_found(teacher: PreTrainedModel, cache: Path):
    passes: list[nn.Module] = []
    hook = teacher.base_model.register_forward_hook(lambda module, *_: passes.append(module))
    rows, cut = rows_of(LENGTHS, 0), Cut(3, 1.0)

    def made() -> int:
        passes.clear()
        kept(teacher, rows, cut)
        return len(passes)

    try:
        assert made() > 0
        assert made() == 0
        (folder,) = (cache / "tokens").iterdir()
        content = bytearray((folder / "ids.bin").read_bytes())
        content[0] ^= 1
        (folder / "ids.bin").write_bytes(content)
        assert made() > 0
        cut = Cut(4, 1.0)
        assert made() > 0
        assert len(list((cache / "tokens").iterdir())) == 2
    finally:
        hook.remove()


def test_what_is_kept_is_named_by_the_tokens_that_are_predicted(cache: Path, tmp_path: Path):
    """One recipe with all turns, and with the last ones: the same inputs, other positions."""
    turns = [["user", "Name a bird."], ["assistant", "It is a bird."], ["user", "More."], ["assistant", "And more."]]
    messages = [{"role": role, "content": content} for role, content in turns]
    recipe = write_world(tmp_path, method={"name": "kd", "max_new_tokens": None}, teacher={"top_k": 8})
    recipe["task"]["max_length"] = 256
    recipe["train"]["max_steps"] = 1
    for name in ("rows.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(9)))
    for choice in ("all", "last"):
        recipe["task"]["turns"] = choice
        run_recipe(write_recipe(tmp_path / f"{choice}.toml", recipe))
    kept = [len(np.memmap(folder / "ids.bin", np.int32, "r")) for folder in (cache / "tokens").iterdir()]
    assert len(set(kept)) == 2


def test_a_run_reports_what_its_cut_costs(teacher: PreTrainedModel, cache: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("a good film that nobody saw twice and everybody liked\n\n" * 80)
    (tmp_path / "teacher").mkdir()
    save_model(teacher, tmp_path / "teacher", families.tokenizer())
    recipe = tiny_recipe(
        *("task", "teacher"),
        method={"name": "kd", "temperature": 2.0},
        task={"name": "own", "type": "causal-lm", "data": "text.txt", "max_length": 16},
        teacher={"model": "teacher", "top_k": 12},
    )
    record = run_recipe(write_recipe(tmp_path / "recipe.toml", recipe))
    (stage,) = record["training"]
    cut = stage["cut"]
    assert cut["top_k"] == 12 and 0.0 < cut["rest"] < 1.0 and 0.0 < cut["kl_of_top_k"] < cut["kl"]
    assert len(list((cache / "tokens").iterdir())) == 2
    assert {"loss", "output", "task"} <= stage["history"][1].keys()
    assert isinstance(top_tokens(torch.randn(2, 9), Cut(3, 1.0)), TopTokens)
