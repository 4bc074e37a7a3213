"""A teacher that does not fit on the GPU: its blocks come from the CPU's memory one after the other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tokenizer
from safetensors.torch import load_file
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from kdcli.data.reviews import reviews
from kdcli.models.placement import Placement, path_of_blocks, place, spread, take_home
from kdcli.models.save import save_model

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

TEXT = {"name": "own", "type": "causal-lm", "train": "text.txt", "validation": "held.txt", "max_length": 32}
RECIPE = tiny_recipe(
    "task", "teacher", task=TEXT, teacher={"model": "decoder"}, train={"device": "auto", "max_steps": 3}
)


def decoder(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=220,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    ).eval()


@on_a_gpu
def test_a_spread_model_predicts_as_a_whole_one_and_comes_home():
    model, ids = decoder(), torch.randint(1, 220, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rest = sum(p.numel() * 4 for name, p in model.named_parameters() if not name.startswith(path_of_blocks(model)))
    block = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    spread(model, Placement({"0": f"{(rest + 2.5 * block) / 1e6:.6f}MB", "cpu": "1GB"}))
    place(model, torch.device("cuda:0"))
    assert {p.device.type for p in model.model.layers.parameters()} == {"cuda", "meta"}
    with torch.no_grad():
        found = model(ids.cuda()).logits
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    take_home(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@on_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "hs"])
def test_a_spread_teacher_teaches_as_a_whole_one(tmp_path: Path, method: str):
    words: Any = tokenizer()
    words.eos_token = words.sep_token
    texts = reviews()["train"]["text"]
    (tmp_path / "decoder").mkdir()
    save_model(decoder(), tmp_path / "decoder", words)
    (tmp_path / "text.txt").write_text("\n\n".join(texts[:150]))
    (tmp_path / "held.txt").write_text("\n\n".join(texts[150:170]))
    recipe = changed(RECIPE, method={"name": method})
    run_recipe(write_recipe(tmp_path / "whole.toml", recipe))
    limits = {"0": "450KB", "cpu": "1GB"}
    run_recipe(write_recipe(tmp_path / "spread.toml", changed(recipe, teacher={"device_map": limits})))
    whole, spread_ = (
        load_file(tmp_path / "runs" / name / "student" / "model.safetensors") for name in ("whole", "spread")
    )
    for key in whole:
        torch.testing.assert_close(spread_[key], whole[key], atol=1e-4, rtol=1e-3)
