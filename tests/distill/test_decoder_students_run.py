"""Students of a trained decoder: where they start, runs with every form, and the text that their folders give."""

import copy
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import changed, run_recipe, write_recipe
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdcli.cli.app import run
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.distill.start import task_loss
from kdcli.models.factoriser import Factoriser
from kdcli.models.generation import generate
from kdcli.models.heads import CAUSAL_LM
from kdcli.models.load import load_model, load_tokenizer
from kdcli.models.lowrank import factorise
from kdcli.models.save import save_model
from kdcli.models.statistics import collect_statistics
from kdcli.recipe.schema import StudentSection

DATA = Path(os.environ.get("KDCLI_DATA_DIR", "none"))
STORIES, TEXT = DATA.parent / "models" / "stories260K", DATA / "lm" / "tinystories-small"
pytestmark = pytest.mark.skipif(not (STORIES.is_dir() and TEXT.is_dir()), reason="needs stories260K and tinystories")

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "method": "makd",
    "task": {
        "name": "tinystories-small",
        "type": "causal-lm",
        "max_length": 64,
        "train_samples": 30,
        "validation_samples": 8,
    },
    "teacher": {"model": str(STORIES)},
    "student": {"form": "low-rank", "rank": 16, "init_samples": 24},
    "train": {"max_steps": 1, "batch_size": 4, "precision": "fp32", "device": "cpu"},
}


@cache
def blocks() -> Tensor:
    """Return the beginning of some stories, (n, 64)."""
    import pyarrow.parquet as pq

    texts = pq.read_table(TEXT / "validation.parquet").column(0).to_pylist()
    tokenizer = load_tokenizer(STORIES)
    found = [tokenizer(text).input_ids[:64] for text in texts]
    return torch.tensor([ids for ids in found if len(ids) == 64][:48])


def loss_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def texts_of(model: Any) -> list[list[int]]:
    prompts = [row[: 2 + 3 * place].tolist() for place, row in enumerate(blocks()[:4])]
    return generate(model, prompts, max_new_tokens=24, end=(2,), pad=0)


def test_a_trained_decoder_is_followed_closer_by_its_inputs_and_gradients():
    teacher = load_model(STORIES, CAUSAL_LM)
    shown, held = blocks()[:32], blocks()[32:]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in shown.split(16)]
    statistics = collect_statistics(teacher, batches, lambda batch: loss_of(teacher, batch["input_ids"]))
    found = {}
    starts = {"svd": (False, False, "even"), "inputs": (True, False, "even"), "both": (True, True, "spread")}
    for name, (by_inputs, by_gradients, ranks) in starts.items():
        student = copy.deepcopy(teacher)
        section = StudentSection(form="low-rank", budget=0.6, ranks=ranks)  # type: ignore[arg-type]
        factorise(student, section, None, Factoriser(by_inputs, by_gradients, statistics))
        with torch.no_grad():
            found[name] = float(loss_of(student, held))
    with torch.no_grad():
        least = float(loss_of(teacher, held))
    assert least < found["both"] < found["inputs"] - 0.1 and found["inputs"] < found["svd"] - 0.5
    # Of embeddings, those of frequent tokens count.
    losses = []
    for counts in (None, torch.bincount(shown.flatten(), minlength=512)):
        student = copy.deepcopy(teacher)
        section = StudentSection(form="low-rank", budget=1.0, embedding_rank=32)
        factorise(student, section, None, Factoriser(by_inputs=True, counts=counts))
        with torch.no_grad():
            losses.append(float(loss_of(student, held)))
    assert losses[1] < losses[0] - 0.3


def test_statistics_do_not_depend_on_how_rows_of_different_lengths_are_batched(tmp_path: Path):
    rows = [{"instruction": "Say.", "response": "Yes. " * (1 + number % 3)} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "own", "type": "instruct", "train": "rows.jsonl", "max_length": 300, "max_prompt_length": 250}
    recipe = write_recipe(tmp_path / "recipe.toml", changed(RECIPE, "task", task=task))
    prepared = prepare(load_recipe(recipe), recipe)
    teacher, kind = load_model(STORIES, CAUSAL_LM), prepared.task.kind
    encoded = kind.prepare(prepared.task, prepared.processor, 300)
    found = []
    with task_loss(teacher, prepared.task, prepared.followers[-1].context) as loss:
        for size in (1, 3):
            parts = [list(range(start, start + size)) for start in range(0, 6, size)]
            batches = [encoded.collator(encoded.train.__getitems__(part)) for part in parts]
            found.append(collect_statistics(teacher, batches, loss))
    for key, of in found[0].items():
        for name in ("importance", "sensitivity", "covariance"):
            one, other = getattr(of, name), getattr(found[1][key], name)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


FORMS: dict[str, dict[str, Any]] = {
    "depth": {"student": {"form": "depth", "layers": 2}},
    "depth, staged": {"student": {"form": "depth", "layers": 2}, "method": {"name": "makd", "schedule": "staged"}},
    "width": {"student": {"form": "width", "hidden_size": 32}, "method": "kd"},
    "width, projections": {"student": {"form": "width", "hidden_size": 32, "init": "projections"}, "method": "kd"},
    "checkpoint": {"student": {"form": "checkpoint", "model": str(STORIES), "layers": 3}},
    "low-rank, spread": {"student": {"form": "low-rank", "budget": 0.5}},
    "low-rank, sequential": {"student": {"form": "low-rank", "rank": 16, "sequential": True}},
    "low-rank, parameters": {"student": {"form": "low-rank", "params": 120000, "embedding_rank": 24}},
    "factors of embeddings, and chains": {
        "student": {"form": "low-rank", "rank": 16, "embedding_rank": 32},
        "overparam": {"length": 1, "targets": ["attention"]},
    },
    "chosen chains": {"overparam": {"length": 1, "targets": ["attention"], "select": "static", "matrices": 4}},
    "growing chains": {
        "student": {"form": "depth", "layers": 2},
        "overparam": {"length": 1, "targets": ["attention"], "select": "dynamic", "matrices": 4},
        "train": {"max_steps": 6},
    },
    "fewer pieces": {"student": {"form": "depth", "layers": 2, "vocabulary": {}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_student_runs(form: str, tmp_path: Path):
    without = [] if form == "chosen chains" else ["student"]
    changes = FORMS[form]
    document = run_recipe(write_recipe(tmp_path / "recipe.toml", changed(RECIPE, *without, **changes)))
    assert document["contraction"] is None or document["contraction"]["max_abs_difference"] < 1e-3
    student = tmp_path / "runs" / "tiny" / "student"
    theirs = AutoModelForCausalLM.from_pretrained(student).eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == document["student"]["parameters"]
    if form != "fewer pieces":
        assert texts_of(load_model(student, CAUSAL_LM)) == texts_of(theirs)


@pytest.mark.slow
def test_chains_of_a_decoder_come_and_go_by_the_commands(tmp_path: Path):
    teacher = load_model(STORIES, CAUSAL_LM)
    factors = tmp_path / "factors.json"
    factors.write_text('{"172": [4, 43], "64": [8, 8], "32": [4, 8]}')
    wide, plain = tmp_path / "wide", tmp_path / "plain"
    for command in (["overparam", STORIES, "--factors", factors, "--out", wide], ["contract", wide, "--out", plain]):
        assert run([str(part) for part in command]) == 0
    chained = AutoModelForCausalLM.from_pretrained(wide).eval()
    assert len(list(chained.parameters())) > len(list(teacher.parameters()))
    again = AutoModelForCausalLM.from_pretrained(plain).eval()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        expected = teacher(input_ids=blocks()).logits
        for model in (chained, again):
            torch.testing.assert_close(model(input_ids=blocks()).logits, expected, atol=1e-4, rtol=0)
    assert texts_of(teacher) == texts_of(chained) == texts_of(again)


@pytest.mark.slow
def test_a_decoder_of_fewer_pieces_reads_and_writes_the_same(tmp_path: Path):
    command = ["trim", STORIES, "--text", TEXT / "validation.parquet", "--out", tmp_path / "small"]
    assert run([str(part) for part in command]) == 0
    both = [(load_model(path, CAUSAL_LM), load_tokenizer(path)) for path in (STORIES, tmp_path / "small")]
    assert both[1][0].config.vocab_size < both[0][0].config.vocab_size
    # Of the text that chose the pieces.
    ids = blocks()[:4]
    old, new = both[0][1], both[1][1].get_vocab()
    number = {old.get_vocab()[piece]: place for piece, place in new.items()}
    texts = [[number[int(token)] for token in row] for row in ids]
    with torch.no_grad():
        expected = both[0][0](input_ids=ids).logits[..., sorted(number)]
        found = both[1][0](input_ids=torch.tensor(texts)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_a_vocabulary_keeps_what_stands_around_instructions(chat: bool, tmp_path: Path):
    rows = [{"instruction": "Say yes.", "response": "yes. " * (1 + number % 3)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(STORIES)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]\n{% endif %}"
        )
    save_model(load_model(STORIES, CAUSAL_LM), tmp_path, tokenizer)
    task = {"name": "own", "type": "instruct", "train": "rows.jsonl", "max_length": 300, "max_prompt_length": 250}
    student = {"form": "depth", "layers": 2, "vocabulary": {}}
    recipe = changed(RECIPE, "task", "student", task=task, student=student, teacher={"model": str(tmp_path)})
    recipe_file = write_recipe(tmp_path / "recipe.toml", recipe)
    prepared = prepare(load_recipe(recipe_file), recipe_file)
    assert prepared.trimming is not None and len(prepared.trimming.kept) < 400
    # Each row is cut into the same pieces, with the layout around it.
    old, new = (
        prepared.task.kind.encode(prepared.task.train, words, 300)["input_ids"]
        for words in (prepared.teacher.processor, prepared.processor)
    )
    assert [[int(prepared.trimming.kept[token]) for token in ids] for ids in new] == [list(ids) for ids in old]


@pytest.mark.parametrize(
    "student, kept, followed",
    [
        ({"layers": 3}, [0, 3, 4], [1, 4, 5]),
        ({"layers": 3, "select": "even"}, [1, 2, 4], [2, 3, 5]),
        # What follows the last block's norm is compared with what follows the teacher's.
        ({"layers": [0, 1]}, [0, 1], [1, 5]),
    ],
)
def test_blocks_follow_those_that_they_are_copies_of(
    student: dict[str, Any], kept: list[int], followed: list[int], tmp_path: Path
):
    recipe = changed(RECIPE, "student", method="hs", student={"form": "depth", **student})
    path = write_recipe(tmp_path / "recipe.toml", recipe)
    (follower,) = prepare(load_recipe(path, []), path).followers
    assert follower.build.teacher_layers == kept
    assert follower.context.pairs == list(enumerate(followed, 1))
    (hidden,) = (term.objective for term in follower.stages[0].terms if term.name == "hidden")
    assert hidden.pairs == tuple(follower.context.pairs)
