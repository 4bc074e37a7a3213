"""What a low-rank student starts from: in the plan, in the record, from the cache, and refused where it cannot be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe

from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError

RECIPE = tiny_recipe(
    "student",
    method="makd",
    student={"budget": 0.5, "init_samples": 20},
    train={"max_steps": 1, "learning_rate": 1e-30},
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "tiny" / "student" / "model.safetensors")


def started(folder: Path, **student: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run a recipe whose training moves nothing, and return its record and the student's weights."""
    path = write_recipe(folder / "tiny.toml", changed(RECIPE, student=student))
    return run_recipe(path, force=True), weights(folder)


def test_every_start_is_one_of_its_own_and_the_same_each_time(tmp_path: Path):
    found = {}
    for init in ("svd", "activations", "gradients", "both"):
        document, found[init] = started(tmp_path, init=init)
        assert ("start" in document["seconds"]) and document["seconds"]["start"] >= 0
    names = list(found)
    key = next(name for name in found["svd"] if name.endswith("query.up.weight"))
    for number, name in enumerate(names):
        assert all(not torch.allclose(found[name][key], found[other][key]) for other in names[:number])
    # Left out, it is the best of them; a second run takes the statistics from the cache.
    _, again = started(tmp_path)
    assert all(torch.equal(again[key], found["both"][key]) for key in again)


def test_a_small_budget_takes_finer_ranks_than_usual(tmp_path: Path):
    wide = {"hidden_size": 128, "intermediate_size": 256}
    path = write_recipe(tmp_path / "tiny.toml", changed(RECIPE, teacher={"scratch": {"layers": 1, **wide}}))
    plans = [make_plan(prepare(load_recipe(path, [f"student.budget={b}"]), path)) for b in (0.05, 0.3, 0.35)]
    assert plans[0].student.parameters < plans[1].student.parameters < plans[2].student.parameters
    document = run_recipe(path, "student.budget=0.05")
    assert document["student"]["parameters"] == pytest.approx(plans[0].student.parameters, rel=0.03)
    with pytest.raises(InputError, match="under rank 500 everywhere") as caught:
        run_recipe(path, "student.rank_multiple=500", "name=other")
    assert "smaller rank_multiple" in (caught.value.hint or "")


def test_the_plain_svd_moves_no_bias_whatever_the_ranks(tmp_path: Path):
    found = [started(tmp_path, init="svd", ranks=ranks, init_samples=None)[1] for ranks in ("even", "spread")]
    biases = [{name: tensor for name, tensor in each.items() if name.endswith("up.bias")} for each in found]
    shared = set(biases[0]) & set(biases[1])
    assert shared and all(torch.equal(biases[0][name], biases[1][name]) for name in shared)


def test_a_resumed_run_keeps_the_ranks_of_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from training.stages import Killed, kill_after

    path = write_recipe(tmp_path / "tiny.toml", changed(RECIPE, train={"max_steps": 4, "eval_every": 2}))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, "distil")
        run_recipe(path)
    kept = tmp_path / "runs" / "tiny" / "checkpoints" / "ranks.json"
    ranks = json.loads(kept.read_text())
    # As if another machine had measured another sensitivity.
    low, high = (next(row for row in ranks if row[1] == name) for name in ("query", "key"))
    low[2], high[2] = 3, 5
    kept.write_text(json.dumps(ranks))
    for folder in (tmp_path / "runs" / "tiny" / "checkpoints").glob("1-*"):
        shutil.rmtree(folder)
    run_recipe(path, resume=True)
    down = weights(tmp_path)["bert.encoder.layer.0.attention.self.query.down.weight"]
    assert len(down) == 3


def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    _, first = started(tmp_path)
    (kept,) = (tmp_path / "cache" / "statistics").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-40] + bytes(40))
    _, second = started(tmp_path)
    assert kept.read_bytes() == whole
    assert all(torch.equal(first[key], second[key]) for key in first)
    # Other rows are another file.
    started(tmp_path, init_samples=10)
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 2


def test_spread_ranks_keep_the_budget_and_the_plan_tells_their_parameters(tmp_path: Path):
    student = {"ranks": "spread", "rank_multiple": 2}
    path = write_recipe(tmp_path / "tiny.toml", changed(RECIPE, student=student))
    plan = make_plan(prepare(load_recipe(path), path))
    document, found = started(tmp_path, **student)
    ranks = {tensor.shape[0] for name, tensor in found.items() if name.endswith("down.weight")}
    assert len(ranks) > 1 and all(rank % 2 == 0 for rank in ranks)
    assert any("ranks by the loss of up to 20 training rows" in note for note in plan.student.notes)
    # At most half of the block weights, and more of that half than the same rank everywhere can use.
    whole = plan.teacher.parameters or 0
    matrices = sum(tensor.numel() for tensor in found.values() if tensor.ndim == 2)
    assert plan.student.parameters == pytest.approx(document["student"]["parameters"], rel=0.04)
    assert matrices > 0 and document["student"]["parameters"] <= whole - 2 * (4 * 32 * 32 + 2 * 32 * 64) // 2


def test_blocks_one_after_the_other_see_what_the_student_makes(tmp_path: Path):
    _, at_once = started(tmp_path, init="activations")
    _, in_turn = started(tmp_path, init="activations", sequential=True)
    first, second = (f"bert.encoder.layer.{number}.intermediate.dense.down.weight" for number in (0, 1))
    assert torch.equal(at_once[first], in_turn[first])
    assert not torch.allclose(at_once[second], in_turn[second])


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init": "teacher"}, "init"),
        ({"form": "depth", "budget": None, "init": "both"}, 'form = "depth" has no init = "both"'),
        ({"form": "depth", "budget": None, "ranks": "spread"}, 'form = "depth" has no ranks'),
        ({"rank_multiple": 4, "budget": None, "rank": 8}, "rank_multiple is of ranks that a budget"),
        ({"init": "svd", "ranks": "even", "init_samples": 9}, 'init = "svd" does not look at the inputs'),
        ({"init": "gradients", "sequential": True}, 'init = "gradients" does not look at the inputs'),
        ({"ranks": "spread", "budget": None, "rank": 8}, 'ranks = "spread" divides a budget or params'),
    ],
)
def test_starts_that_a_form_does_not_have_are_refused(tmp_path: Path, student: dict[str, Any], message: str):
    path = write_recipe(tmp_path / "tiny.toml", changed(RECIPE, student={"init_samples": None, **student}))
    with pytest.raises(InputError) as caught:
        prepare(load_recipe(path), path)
    assert message in f"{caught.value.where} {caught.value.message}"


def test_a_body_without_a_head_has_no_gradients(tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"some words in a row {n} and more of them" for n in range(200)))
    recipe = tiny_recipe(
        method="hs",
        task={"name": "t", "type": "text", "data": "text.txt", "train_samples": None, "validation_samples": None},
        teacher={"model": "teacher", "finetune": None, "scratch": None},
        student={"form": "low-rank", "layers": None, "budget": 0.5, "ranks": "spread"},
    )
    from families import tiny, tokenizer

    from kdcli.models.save import save_model

    save_model(tiny("bert").base_model, tmp_path / "teacher")
    tokenizer().save_pretrained(tmp_path / "teacher")
    path = write_recipe(tmp_path / "text.toml", recipe)
    with pytest.raises(InputError, match='ranks = "spread" needs the gradients of a loss') as caught:
        prepare(load_recipe(path), path)
    assert caught.value.where == "student.ranks"
    path = write_recipe(tmp_path / "text.toml", changed(recipe, student={"ranks": None}))
    assert prepare(load_recipe(path), path).followers[-1].section.init == "activations"
