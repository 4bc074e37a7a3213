"""What a teacher wrote for its score is kept, and found again by nothing else; processes write a share each."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_decoder import ROWS, model, tokenizer, write_world
from tiny_recipes import run_recipe, write_recipe

from kdcli.models.generation import GREEDY, Sampling, generate
from kdcli.runs import Run
from kdcli.training.generated import generate_together

WORDS = tokenizer()
PROMPTS = [WORDS(row["instruction"])["input_ids"] for row in ROWS[:5]]
HOW: dict[str, Any] = {"max_new_tokens": 8, "end": {WORDS.eos_token_id}, "pad": WORDS.pad_token_id, "batch_size": 2}
DRAWN = {"sampling": Sampling(1.0), "seed": 1}


def test_texts_are_kept_by_all_that_makes_them(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    decoder, console = model(WORDS), Console(record=True, quiet=True)

    def written(decoder: Any = decoder, prompts: Any = PROMPTS, **changed: Any) -> list[list[int]]:
        options = {"sampling": GREEDY, **HOW, **changed}
        numbers = options.pop("numbers", range(len(prompts)))
        return generate_together(decoder, prompts, numbers=numbers, use_cache=True, console=console, **options)

    def kept() -> list[Path]:
        return sorted((own_cache / "texts").iterdir())

    first = written()
    assert first == generate(decoder, PROMPTS, **HOW) and len(kept()) == 1
    others: list[dict[str, Any]] = [
        {"decoder": model(WORDS, seed=1)},
        {"prompts": PROMPTS[::-1]},
        {"max_new_tokens": 4},
        {"max_length": 20},
        {"end": {WORDS.eos_token_id, 5}},
        DRAWN,
        {**DRAWN, "seed": 2},
        {**DRAWN, "numbers": range(5, 10)},
        {**DRAWN, "sampling": Sampling(1.0, top_k=3)},
    ]
    for number, changed in enumerate(others, 2):
        written(**changed)
        assert len(kept()) == number, changed
    monkeypatch.setattr(type(decoder), "generate", lambda *_, **__: pytest.fail("it is written once more"))
    # Nor does a model change what it writes with the size of its batches.
    assert written(batch_size=5) == first
    monkeypatch.undo()
    monkeypatch.setenv("KDCLI_CACHE", str(own_cache))
    for path in kept():
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert written() == first


@pytest.mark.slow
def test_a_second_run_does_not_let_the_teacher_write_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"method": {"name": "kd", "max_new_tokens": None}, "task": {"max_new_tokens": 6, "metrics": None}}
    path = write_recipe(tmp_path / "recipe.toml", write_world(tmp_path, **changes, train={"max_steps": 1}))
    before = run_recipe(path)
    told: list[int] = []
    plain = type(model(WORDS)).generate
    monkeypatch.setattr(
        type(model(WORDS)), "generate", lambda own, **how: (told.append(len(own.model.layers)), plain(own, **how))[1]
    )
    after = run_recipe(path, "seed=7", "name=again")
    assert set(told) == {1} and after["teacher"]["metrics"] == before["teacher"]["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_score_as_one(sharding: str, tmp_path: Path):
    task = {"max_new_tokens": 12, "sampling": {"temperature": 1.0}, "seeds": [1, 2], "validation": "rows.jsonl"}
    task |= {"metrics": None}
    method, teacher = {"name": "kd", "max_new_tokens": None}, {"cache": False, "sharding": sharding}
    document = write_world(tmp_path, method=method, task=task, train={"max_steps": 1}, teacher=teacher)
    write_recipe(tmp_path / "recipe.toml", document)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcli"]
    found = []
    for name, launcher in (("one", ["-m", "kdcli"]), ("two", torchrun)):
        command = [sys.executable, *launcher, "distill", "recipe.toml", "--output", name]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        found.append(Run(tmp_path / name / "recipe").document)
    one, two = (document["teacher"]["metrics"]["validation"] for document in found)
    assert two == pytest.approx(one) and one["rouge_l"] > 0
    one, two = (document["student"]["metrics"]["validation"] for document in found)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
