"""What the dry run says of a step's memory: from configurations alone, part by part, for any number of processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tokenizer
from tiny_recipes import changed, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from kdcli.distill.memory import Memory
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.models.checkpoint import configurations_alone

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        **LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-2-7b": 6_738_415_616}
"""As their model cards count them."""

RECIPE: dict[str, Any] = {
    "task": {"name": "own", "type": "causal-lm", "data": "text.txt", "max_length": 512},
    "method": {"name": "kd"},
    "student": {"form": "depth", "layers": 8},
    "train": {"batch_size": 64, "gradient_accumulation": 8, "precision": "bf16", "max_steps": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models' configurations, a tokenizer beside each, and no weights."""
    folder = tmp_path_factory.mktemp("plan")
    words = tokenizer()
    words.eos_token = words.sep_token
    for name, config in CONFIGS.items():
        words.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "text.txt").write_text("a fine and moving film\n\n" * 400)
    return folder


def memory(folder: Path, model: str, processes: int = 1, **changes: Any) -> Memory:
    recipe = changed(RECIPE, teacher={"model": model, **changes.pop("teacher", {})}, **changes)
    path = write_recipe(folder / "recipe.toml", recipe)
    with configurations_alone():
        prepared = prepare(load_recipe(path, []), path, processes)
        assert {p.device.type for p in prepared.teacher.model.parameters()} == {"meta"}
        plan = make_plan(prepared)
    assert plan.teacher.parameters == PARAMETERS[model]
    return plan.memory


def test_a_model_of_seven_billion_is_planned_without_its_weights(folder: Path):
    one = memory(folder, "llama-2-7b").parts
    assert one["teacher weights"] == 2 * PARAMETERS["llama-2-7b"]
    whole = memory(folder, "llama-2-7b", teacher={"dtype": "fp32"}).parts
    assert whole["teacher weights"] == 2 * one["teacher weights"]
    assert one["moments"] == 2 * one["student weights"] == 2 * one["gradients"]


def test_each_of_several_processes_holds_its_part(folder: Path):
    one = memory(folder, "llama-3.2-1b")
    ddp = memory(folder, "llama-3.2-1b", 8)
    fsdp = memory(folder, "llama-3.2-1b", 8, train={"sharding": "fsdp"})
    assert (one.tokens, ddp.tokens, fsdp.tokens) == (8 * 512, 512, 512)
    assert ddp.parts["moments"] == one.parts["moments"] == pytest.approx(8 * fsdp.parts["moments"], rel=1e-6)
    assert one.parts["activations"] == 8 * ddp.parts["activations"]
    assert fsdp.total < ddp.total and (ddp.host, fsdp.host) == (0, one.parts["student weights"])
    # Embeddings and head are whole in each process, and one block.
    shared = memory(folder, "llama-3.2-1b", 8, teacher={"sharding": "fsdp"}).parts["teacher weights"]
    table, blocks = 128256 * 2048 + 2048, PARAMETERS["llama-3.2-1b"] - 128256 * 2048 - 2048
    assert shared == 2 * (table + blocks // 8 + blocks // 16)


def test_blocks_that_a_device_map_puts_elsewhere_are_told_apart(folder: Path):
    def told(device_map: Any, device: str = "auto") -> tuple[int, int]:
        found = memory(folder, "llama-3.2-1b", teacher={"device_map": device_map}, train={"device": device})
        return found.parts["teacher weights"], found.spread

    rest, whole = 2 * (128256 * 2048 + 2048), 2 * PARAMETERS["llama-3.2-1b"]
    assert told(None) == told("auto", "cpu") == (whole, 0)
    assert told("auto") == (rest, whole - rest)
    assert told({"0": "1.5GB", "cpu": "9GB"}) == (1_500_000_000, whole - 1_500_000_000)
    assert told({"0": "1.5GiB", "cpu": "9GB"}) == (3 * 2**29, whole - 3 * 2**29)
    assert told({"0": "20GB"}) == (whole, 0)


def test_checkpoints_keep_the_input_of_each_block_and_one_block(folder: Path):
    plain = memory(folder, "llama-3.2-1b").parts["activations"]
    kept = memory(folder, "llama-3.2-1b", train={"gradient_checkpointing": True}).parts["activations"]
    assert plain / 8 < kept < plain / 4


def test_a_batch_that_so_many_processes_cannot_split_is_refused(folder: Path):
    with pytest.raises(InputError, match="cannot be split over 3 processes"):
        memory(folder, "llama-3.2-1b", 3)


def activations(checkpointed: bool) -> int:
    """Return the bytes that a real decoder's forward pass keeps for its backward pass, 2 x 64 tokens in fp32."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=100,
        pad_token_id=0,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids, mask = torch.randint(1, 100, (2, 64)), torch.ones(2, 64, dtype=torch.long)
    mask[1, 40:] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.model(input_ids=ids, attention_mask=mask)[0]
    del states
    return sum(kept.values())


def test_activations_are_those_of_a_real_pass(folder: Path):
    words = tokenizer()
    words.save_pretrained(folder / "small")
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = {**LLAMA, **sizes, "intermediate_size": 176, "vocab_size": 220, "max_position_embeddings": 128}
    (folder / "small" / "config.json").write_text(json.dumps(config))
    recipe = changed(
        RECIPE,
        teacher={"model": "small"},
        task={"max_length": 64},
        student={"layers": 4},
        train={"batch_size": 2, "gradient_accumulation": 1, "precision": "fp32", "device": "cpu"},
    )
    path = write_recipe(folder / "small.toml", recipe)
    with configurations_alone():
        plan = make_plan(prepare(load_recipe(path, []), path))
    assert plan.memory.tokens == 2 * 64
    assert plan.memory.parts["activations"] == pytest.approx(activations(checkpointed=False), rel=0.25)
