"""Memory and speed of a `kd` step of decoders, against the sum of its parts and of the passes that it needs.

    python tests/benchmarks/decoder_step.py TEACHER [--layers 15] [--batch 4] [--sequence 512] [--rounds 3]
                                            [--precision fp32] [--device cpu] [--divergence kl] [--checkpointing]

TEACHER: a folder of a decoder, or LAYERSxWIDTHxVOCABULARY for a random one. The student has the same shape with fewer
blocks. Memory is the highest of whole steps: on a processor what is resident beyond what is so after a step of a tiny
model. A pass is the library's own: the teacher's forward pass, the student's forward and backward pass with the
library's loss, and the optimizer's step; rounds of the step and of its passes alternate. Seconds are those of the
process on a processor, so that others on the machine count little: give it one thread (OMP_NUM_THREADS=1).
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdcli.objectives.distribution import Categorical
from kdcli.objectives.gold import GoldObjective
from kdcli.objectives.output import OutputObjective
from kdcli.objectives.term import Divergence, Term
from kdcli.tasks.causal_lm import KIND
from kdcli.tasks.heads import load_model
from kdcli.training.step import Distiller

MB = 1e6


def random_batch(vocabulary: int, batch: int, sequence: int) -> dict[str, Tensor]:
    """Return a batch of whole rows, as the kind's collator makes them."""
    ids = torch.randint(5, vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(batch * sequence).view(batch, sequence)
    predicted = positions[:, :-1].flatten()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "predicted_positions": predicted,
        "real_positions": positions.flatten(),
        "predicted_among_real": predicted,
        "targets": ids[:, 1:].flatten(),
        "prediction_weights": torch.full((len(predicted),), 1.0 / len(predicted)),
        "example_weights": torch.full((batch,), 1.0 / batch),
    }


def resident(device: str, *, peak: bool = False) -> float:
    """Return megabytes in use now, or the most since `forget_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / MB
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024 / MB


def forget_peak(device: str) -> None:
    """Let the highest use begin from what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def models(teacher: str, layers: int, device: str) -> tuple[Any, Any]:
    """Return the teacher and a random student with fewer blocks."""
    if Path(teacher).exists():
        large = load_model(teacher, "causal-lm")
    else:
        blocks, width, vocabulary = map(int, teacher.split("x"))
        config = AutoConfig.for_model(
            "llama",
            num_hidden_layers=blocks,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_attention_heads=max(1, width // 64),
            num_key_value_heads=max(1, width // 192),
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        large = AutoModelForCausalLM.from_config(config)
    config = copy.deepcopy(large.config)
    config.num_hidden_layers = layers
    return large.to(device).eval(), AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).train()


def make_step(teacher: Any, student: Any, divergence: str) -> tuple[Distiller, torch.optim.Optimizer]:
    """Return the step of `kd`, half of its weight on the gold tokens, and its optimizer."""
    distribution = Categorical(Divergence(divergence))
    terms = [Term("output", OutputObjective(distribution), 0.5), Term("task", GoldObjective(Categorical()), 0.5)]
    distiller = Distiller(student, terms, kind=KIND, teacher=teacher).train()
    teacher.requires_grad_(False)
    return distiller, torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--divergence", default="kl")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--memory-only", action="store_true")
    options = parser.parse_args()
    device = options.device
    if device == "cpu":
        tiny, optimizer = make_step(*models("2x64x512", 1, device), options.divergence)
        tiny(random_batch(512, 2, 8))["loss"].backward()
        optimizer.step()
        del tiny, optimizer
    before = resident(device)
    teacher, student = models(options.teacher, options.layers, device)
    sizes = [sum(p.numel() * p.element_size() for p in model.parameters()) / MB for model in (teacher, student)]
    batch = random_batch(teacher.config.vocab_size, options.batch, options.sequence)
    batch = {name: values.to(device) for name, values in batch.items()}
    if options.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller, optimizer = make_step(teacher, student, options.divergence)
    half = torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def forward_and_backward() -> None:
        with half:
            loss = distiller(batch)["loss"]
        loss.backward()

    def teacher_pass() -> None:
        with torch.no_grad(), half:
            teacher(**inputs, use_cache=False)

    def student_pass() -> None:
        with half:
            loss = student(**inputs, labels=batch["labels"], use_cache=False).loss
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def timed(work: Callable[[], None]) -> float:
        clock = time.perf_counter if device == "cuda" else time.process_time
        begun = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - begun

    for step in range(3):
        if step == 1:
            forget_peak(device)
        forward_and_backward()
        update()
    peak = resident(device, peak=True) - before
    # The student's gradients and the two moments of AdamW are as large as its weights.
    fixed = sizes[0] + 4 * sizes[1]
    print(f"{options.batch} x {options.sequence} tokens, {options.precision}, {device}, {options.divergence}")
    print(f"weights: teacher {sizes[0]:.0f} MB, student {sizes[1]:.0f} MB; gradients and moments {3 * sizes[1]:.0f} MB")
    print(
        f"before any model {before:.0f} MB; highest beyond that {peak:.0f} MB: {peak - fixed:.0f} MB over these parts"
    )
    if options.memory_only:
        return
    found: dict[str, list[float]] = {"step": [], "teacher": [], "student": [], "optimizer": []}
    for _ in range(options.rounds):
        found["step"].append(timed(forward_and_backward) + timed(update))
        found["teacher"].append(timed(teacher_pass))
        found["student"].append(timed(student_pass))
        found["optimizer"].append(timed(update))
    medians = {name: statistics.median(values) for name, values in found.items()}
    passes = sum(medians.values()) - medians["step"]
    tokens = options.batch * options.sequence
    print(", ".join(f"{name} {value:.3f} s" for name, value in medians.items()))
    print(
        f"step {tokens / medians['step']:.0f} tokens/s, passes {tokens / passes:.0f} tokens/s: "
        f"step / passes {medians['step'] / passes:.3f}"
    )


if __name__ == "__main__":
    main()
