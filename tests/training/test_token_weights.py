"""Tokens weigh equally over a whole step: of examples of any length, in any number of micro-batches and processes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tokenizer
from rich.console import Console
from tiny_recipes import write_recipe
from torch import Tensor
from training import stages
from training.stages import LOOP, TWO_PROCESSES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdcli.data.reviews import reviews
from kdcli.methods.base import Term
from kdcli.models.save import save_model
from kdcli.models.scratch import train_tokenizer
from kdcli.objectives.attention import AttentionObjective, attention_kl
from kdcli.objectives.cosine import cosine_distance
from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.hidden import HiddenObjective, token_mse
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.relation import RelationObjective, relation_kl
from kdcli.tasks.instruct import KIND
from kdcli.training.sampler import EpochSampler
from kdcli.training.step import Distiller
from kdcli.training.trainer import fit

WORDS = tokenizer()
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def decoder(layers: int, seed: int, vocabulary: int = 220) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=512, pad_token_id=0, **SIZES
    )
    return AutoModelForCausalLM.from_config(config).eval()


def conversations(count: int, seed: int = 0) -> Dataset:
    """Return encoded rows of prompts of 2 to 9 tokens with responses of 1 to 30."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(2, 10, (count,), generator=draw).tolist()
    responses = [1 + 29 * (number % 3 == 0) + number % 2 for number in range(count)]
    ids = [torch.randint(5, 200, (p + r,), generator=draw).tolist() for p, r in zip(prompts, responses, strict=True)]
    return Dataset.from_dict(
        {
            "index": list(range(count)),
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [[-100] * prompt + row[prompt:] for prompt, row in zip(prompts, ids, strict=True)],
            "length": list(map(len, ids)),
        }
    )


DATA, HELD = conversations(24), conversations(11, seed=1)
TERMS = {
    "task": lambda: GoldObjective(Categorical()),
    "output": lambda: OutputObjective(Categorical(), 2.0),
    "everywhere": lambda: OutputObjective(Categorical(), all_positions=True),
    "hidden": lambda: HiddenObjective([(1, 2)], match_norm=True),
    "attention": lambda: AttentionObjective([(1, 2)]),
    "relation": lambda: RelationObjective([(1, 2)], heads=2),
}


def train(folder: Path, *names: str, **loop: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # A large epsilon: Adam would make the rounding of a vanishing gradient a whole step.
    usual: dict[str, Any] = {"max_steps": 3, "log_every": 1, "epsilon": 1e-3, "group_by_length": False}
    settings = replace(LOOP, **{**usual, **loop})
    terms = [Term(name, TERMS[name]()) for name in names]
    step = Distiller(decoder(1, 1), terms, teacher=decoder(2, 2), kind=KIND)
    record = fit(
        step,
        train=DATA,
        selection=HELD if settings.eval_every else None,
        collator=KIND.collator(WORDS),
        metrics=None,
        settings=settings,
        folder=folder,
        log_dir=None,
        title="test",
        console=Console(quiet=True),
        identity={},
    )
    return record, {name: tensor.detach().clone() for name, tensor in step.student.state_dict().items()}


@pytest.mark.parametrize(
    "names", [tuple(TERMS), *(pytest.param((name,), marks=pytest.mark.slow) for name in TERMS)], ids="-".join
)
def test_micro_batches_give_the_update_of_the_whole_batch(tmp_path: Path, names: tuple[str, ...]):
    whole, one = train(tmp_path / "one", *names)
    parts, four = train(tmp_path / "four", *names, gradient_accumulation=4)
    start = decoder(1, 1).state_dict()
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-4
    for key in one:
        torch.testing.assert_close(four[key], one[key], atol=1e-6, rtol=0.0)
    for before, after in zip(whole["history"], parts["history"], strict=True):
        assert {name: after[name] for name in (*names, "loss")} == pytest.approx(
            {name: before[name] for name in (*names, "loss")}, rel=1e-4
        )


def test_losses_are_means_over_tokens_in_logs_and_on_held_out_rows(tmp_path: Path):
    record, _ = train(tmp_path, "task", gradient_accumulation=4, max_steps=1, eval_every=1, eval_batch_size=4)
    first = logged(record["history"], "eval_loss")[0]
    model = decoder(1, 1)
    batch = KIND.collator(WORDS)([HELD[place] for place in range(len(HELD))])
    with torch.no_grad():
        # The library's own loss is the mean over all tokens that have a label.
        expected = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert first == pytest.approx(float(expected), rel=1e-5)
    assert logged(record["history"], "task")[0] == pytest.approx(loss_of_first_step(model), rel=1e-5)


def loss_of_first_step(model: PreTrainedModel) -> float:
    """Return the library's loss of the first step's eight rows."""
    order = EpochSampler(DATA["length"][:], 8, seed=LOOP.seed, group=False).order()[:8]
    batch = KIND.collator(WORDS)([DATA[int(place)] for place in order])
    with torch.no_grad():
        return float(model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss)


def logged(history: list[dict[str, Any]], name: str) -> list[float]:
    return [entry[name] for entry in history if name in entry]


def test_terms_over_all_tokens_are_their_plain_mean():
    batch = KIND.collator(WORDS)([DATA[place] for place in range(8)])
    mask, weights = batch["attention_mask"], batch["example_weights"]
    assert weights.sum().item() == pytest.approx(1.0) and weights.max() > 2 * weights.min()
    student, teacher = (torch.randn(*mask.shape, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    real = mask.bool()
    found = token_mse(student, teacher, mask, weights), cosine_distance(student, teacher, mask, weights)
    expected = (
        (student - teacher)[real].square().mean(),
        1 - torch.cosine_similarity(student[real], teacher[real], dim=-1).mean(),
    )
    torch.testing.assert_close(found, expected)
    scores = [x @ x.mT for x in (student[:, None], teacher[:, None])]
    alone = [
        attention_kl(*(x[row : row + 1, :, :length, :length] for x in scores), mask[row : row + 1, :length])
        for row, length in enumerate(mask.sum(1).tolist())
    ]
    plain = (torch.stack(alone) * mask.sum(1)).sum() / mask.sum()
    torch.testing.assert_close(attention_kl(*scores, mask, weights=weights), plain)
    rows = [x * 6**0.25 for x in (student, teacher)]
    torch.testing.assert_close(relation_kl(*rows, mask, 1, weights=weights), plain)


@pytest.mark.slow
def test_two_processes_give_the_student_of_one(tmp_path: Path):
    texts = reviews()["train"]["text"]
    words = train_tokenizer(texts, 300)
    words.eos_token = words.sep_token
    (tmp_path / "teacher").mkdir()
    save_model(decoder(2, 2, len(words)), tmp_path / "teacher", words)
    rows = [
        {"instruction": texts[place], "response": " ".join(texts[place + 1 : place + 1 + 5 * (place % 2) + 1])}
        for place in range(64)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe: dict[str, Any] = {
        "method": {"name": "hs", "bridge": False},
        "task": {
            "name": "own",
            "type": "instruct",
            "data": "rows.jsonl",
            "max_length": 512,
            "validation_fraction": 0.2,
        },
        "teacher": {"model": "teacher", "finetune": False},
        "student": {"form": "depth", "layers": 1},
        "train": {"max_steps": 3, "batch_size": 8, "eval_every": 3, "precision": "fp32", "device": "cpu"},
        "evaluate": {"batch_size": 4},
    }
    write_recipe(tmp_path / "recipe.toml", recipe)
    found = [stages.distill(tmp_path, name, *launcher) for name, launcher in (("one", ()), ("two", TWO_PROCESSES))]
    (one, single), (two, double) = found
    for key in single:
        torch.testing.assert_close(double[key], single[key], atol=2e-5, rtol=1e-3)
    histories = [record["training"][0]["history"] for record in (one, two)]
    for name in ("loss", "eval_loss"):
        first, second = (logged(history, name) for history in histories)
        assert second == pytest.approx(first, rel=1e-4)
