"""A tiny Llama that writes short texts, its tokenizer, and prompts with responses: for methods whose models write."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tiny_recipes import changed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 160
"""Tokens of prompt and response; the layout around a prompt takes most of them."""

ROWS = [
    {
        "instruction": f"Name {thing} number {number}.",
        "response": f"It is {thing} {number}" + " and more" * (number % 3),
    }
    for number in range(12)
    for thing in ("a bird", "a tree")
]
RECIPE: dict[str, Any] = {
    "method": {"name": "seqkd", "max_new_tokens": 12},
    "task": {
        "name": "own",
        "type": "instruct",
        "train": "rows.jsonl",
        "validation": "held.jsonl",
        "max_length": LENGTH,
        "max_prompt_length": LENGTH - 20,
        # No text is written for a score.
        "metrics": ["perplexity"],
    },
    "teacher": {"model": "teacher"},
    "student": {"form": "depth", "layers": 1},
    "train": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32", "device": "cpu"},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 320 tokens that knows the layout of prompts."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    layout = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    texts = [f"{layout}\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n{row['response']}" for row in ROWS]
    words.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def model(words: Any, *, seed: int = 0, layers: int = 2, hidden: int = 32) -> LlamaForCausalLM:
    """Return a random decoder that ends a text after some ten tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=False,
    )
    decoder = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
        # Towards the end of a text in any context: the last states have a mean length of 1.
        decoder.model.norm.weight.mul_(1.5)
    return decoder


def write_world(folder: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Put the teacher and the rows into a folder, and return the recipe, changed."""
    words = tokenizer()
    if not (folder / "teacher").exists():
        model(words).save_pretrained(folder / "teacher")
        words.save_pretrained(folder / "teacher")
    for name, rows in (("rows.jsonl", ROWS), ("held.jsonl", ROWS[:4])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # A test may change what it gets.
    return copy.deepcopy(changed(recipe or RECIPE, **changes))
