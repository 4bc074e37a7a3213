"""Batched generation: the same tokens as one by one, draws that a seed decides, and a model left as it was."""

import io
import os
import random
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS
from families import tiny as family_model
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kdcli.models import generation
from kdcli.models.finite import NotFiniteError
from kdcli.models.generation import Mixture, Sampling, generate
from kdcli.models.overparam import overparameterise
from kdcli.models.student import build_student
from kdcli.recipe.schema import OverparamSection, StudentSection

STORIES = Path(os.environ.get("KDCLI_DATA_DIR", "none")).parent / "models" / "stories260K"
PROMPTS = [[1, 5, 7, 9, 11], [1, 30], [1, 42, 8, 3, 3, 3, 17, 60], [1, 9, 9], [1], [1, 30]]
END = {2, *range(40, 48)}
KEYS: dict[str, Any] = {"max_new_tokens": 12, "end": END, "pad": 0}
DRAWN = Sampling(1.0)
FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] * (name != "gpt2")) for name in DECODERS]


def tiny(seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Return a random Llama with grouped queries whose next tokens are far from certain, and from even."""
    torch.manual_seed(seed)
    values = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **{**values, "vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 24, **sizes},
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def one_by_one(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [generate(model, [prompt], numbers=[i], **{**KEYS, **options})[0] for i, prompt in enumerate(prompts)]


def by_hand(model: Any, prompt: list[int], tokens: int, end: Collection[int] = END) -> list[int]:
    """Return the greedy continuation by one full pass a token, without a cache."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_batch_gives_the_tokens_of_one_pass_a_token(batch_size: int) -> None:
    model = tiny()
    found = generate(model, PROMPTS, batch_size=batch_size, **KEYS)
    assert found == [by_hand(model, prompt, KEYS["max_new_tokens"]) for prompt in PROMPTS]
    assert len({len(response) for response in found}) > 1, "no response ends before the others"


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K beside KDCLI_DATA_DIR")
def test_a_trained_model_writes_the_same_in_a_batch() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    generator = random.Random(0)
    prompts = [[1, *(generator.randrange(3, 512) for _ in range(generator.randrange(12)))] for _ in range(12)]
    assert generate(model, prompts, **KEYS) == one_by_one(model, prompts)
    assert generate(model, prompts, sampling=DRAWN, **KEYS) == one_by_one(model, prompts, sampling=DRAWN)


def test_draws_follow_from_seed_and_number_alone() -> None:
    model = tiny()
    first = generate(model, PROMPTS, sampling=DRAWN, seed=3, **KEYS)
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, sampling=DRAWN, seed=3, batch_size=2, **KEYS) == first
    assert one_by_one(model, PROMPTS, sampling=DRAWN, seed=3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(model, PROMPTS, sampling=DRAWN, seed=4, **KEYS) != first
    assert generate(model, PROMPTS, sampling=DRAWN, seed=(3, 1), **KEYS) != first
    # Equal prompts have numbers of their own.
    assert first[1] != first[5]


def test_draws_have_the_probabilities_of_the_model() -> None:
    """4,000 first tokens: each share within 5 standard deviations of softmax(z / T), restricted and renormalised."""
    model, n = tiny(), 4000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    for sampling in (DRAWN, Sampling(0.7), Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.6)):
        shares = (logits / sampling.temperature).softmax(-1)
        order = shares.argsort(descending=True)
        if sampling.top_k:
            shares[order[sampling.top_k :]] = 0.0
        if sampling.top_p < 1.0:
            shares[order[(shares[order].cumsum(-1) - shares[order]) >= sampling.top_p]] = 0.0
        shares /= shares.sum()
        found = generate(
            model, [PROMPTS[0]] * n, sampling=sampling, batch_size=1000, max_new_tokens=1, end=set(), pad=0
        )
        counts = torch.bincount(torch.tensor(found).flatten(), minlength=64) / n
        assert (counts[shares == 0] == 0).all()
        assert ((counts - shares).abs() <= 5 * (shares * (1 - shares) / n).sqrt() + 1e-12).all(), sampling


def test_a_mixture_draws_from_both_models() -> None:
    """The shares of second tokens after each first one, against the product of dense probabilities."""
    student, teacher, n, share = tiny(0), tiny(1), 4000, 0.3
    prompts = [PROMPTS[0], PROMPTS[1]] * (n // 2)
    options: dict[str, Any] = {"max_new_tokens": 2, "end": set(), "pad": 0, "batch_size": 1000, "sampling": DRAWN}
    found = torch.tensor(generate(student, prompts, mixture=Mixture(teacher, share), **options))

    def mixed(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits[0, -1].double() for model in (student, teacher)]
        q, p = (each.softmax(-1) for each in logits)
        return (1 - share) * q + share * p

    for place, prompt in enumerate(PROMPTS[:2]):
        own = found[place::2]
        first = mixed(prompt)
        joint = torch.stack([first[token] * mixed([*prompt, token]) for token in range(64)])
        counts = torch.zeros(64, 64).index_put_((own[:, 0], own[:, 1]), torch.tensor(1.0), accumulate=True) / len(own)
        assert ((counts - joint).abs() <= 6 * (joint * (1 - joint) / len(own)).sqrt() + 4 / len(own)).all()
    assert found.tolist() != generate(student, prompts, **options)


def test_responses_end_at_their_own_limits() -> None:
    model = tiny()
    whole = generate(model, PROMPTS, max_new_tokens=200, end=set(), pad=0, max_length=24)
    assert [len(response) for response in whole] == [24 - len(prompt) for prompt in PROMPTS]
    assert whole == [by_hand(model, prompt, 24 - len(prompt), ()) for prompt in PROMPTS]
    # Fewer than the model has positions for: a batch goes on until its longest limit.
    assert generate(model, PROMPTS, max_new_tokens=200, end=set(), pad=0, max_length=14) == [
        response[: 14 - len(prompt)] for prompt, response in zip(PROMPTS, whole, strict=True)
    ]
    assert generate(model, [[1] * 20, [1]], max_new_tokens=4, end=set(), pad=0, max_length=20)[0] == []
    both = generate(model, PROMPTS, max_new_tokens=12, end={2, whole[0][3]}, pad=0)[0]
    assert both == whole[0][: len(both)] and both[-1] in {2, whole[0][3]} and len(both) <= 4


def test_a_model_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    """Dropout, a frozen block's mode, its own settings of generation and activation checkpointing: none takes part."""
    model = tiny(attention_dropout=0.5)
    plain = generate(model, PROMPTS, **KEYS)
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [token for response in plain for token in response[:1]]
    own = model.generation_config
    before = {name: module.training for name, module in model.named_modules()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert generate(model, PROMPTS, **KEYS) == plain
    assert not caught and capfd.readouterr() == ("", "")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is own and not model.config.use_cache and model.is_gradient_checkpointing
    model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("form", ["low-rank", "chains", "width"])
def test_students_of_other_forms_generate(form: str) -> None:
    model = tiny()
    sections = {"low-rank": {"form": "low-rank", "budget": 0.5, "init": "svd", "ranks": "even"}}
    sections["width"] = {"form": "width", "hidden_size": 16, "heads": 2, "intermediate_size": 32}
    if form in sections:
        model = build_student(model, StudentSection.model_validate(sections[form]), seed=0).model.eval()
    else:
        overparameterise(model, OverparamSection(factorization="mpo", length=1))
    found = generate(model, PROMPTS, **KEYS)
    assert found == [by_hand(model, prompt, KEYS["max_new_tokens"]) for prompt in PROMPTS]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.0)
    # Nothing of the old weights is kept.
    assert generate(model, PROMPTS, **KEYS) == [by_hand(model, prompt, KEYS["max_new_tokens"]) for prompt in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_the_same_in_a_batch(family: str) -> None:
    """Positions of its own, windows, soft caps: the left padding of a batch changes nothing, drawn or not."""
    model, other = family_model(family), family_model(family, seed=1)
    found = generate(model, PROMPTS, **KEYS)
    assert found == [by_hand(model, prompt, KEYS["max_new_tokens"]) for prompt in PROMPTS]
    assert len({tuple(response) for response in found}) > 3
    options: dict[str, Any] = {"sampling": DRAWN, "mixture": Mixture(other, 0.4)}
    assert generate(model, PROMPTS, **options, **KEYS) == one_by_one(model, PROMPTS, **options)


def test_half_precision_generates() -> None:
    model: Any = tiny()
    model.to(torch.bfloat16)
    assert all(response for response in generate(model, PROMPTS, sampling=DRAWN, **KEYS))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NotFiniteError, match="the logits of the teacher contain NaN or inf while it generates"):
        generate(model, PROMPTS, owner="the teacher", **KEYS)
    with pytest.raises(ValueError, match="a prompt has no token"):
        generate(tiny(), [[1], []], **KEYS)


def test_long_runs_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SECONDS", 0.0)
    text = io.StringIO()
    generate(tiny(), PROMPTS, console=Console(file=text, width=200), batch_size=4, **KEYS)
    assert [line.split()[:2] for line in text.getvalue().splitlines()] == [["responses", "4/6"], ["responses", "6/6"]]
