"""Seconds of a training step with OPDF (L = 3) against the plain step, and the limit that its FLOPs allow.

    python tests/benchmarks/step_time.py [--batch 32] [--sequence 128] [--rounds 8] [--device cuda]

Plain and over-parameterised steps alternate in one process; medians are compared. The limit is
1.3 x (FLOPs of the step + FLOPs of the chain) / FLOPs of the step.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import encoder
from torch.utils.flop_counter import FlopCounterMode

from kdcli.machine import resolve_precision
from kdcli.models.overparam import overparameterise
from kdcli.recipe.schema import OverparamSection
from kdcli.tasks.heads import load_model


def build(over: bool, device: str) -> tuple[Any, torch.optim.Optimizer]:
    model = load_model(encoder(), "sequence-classification", new_head={"num_labels": 2})
    if over:
        overparameterise(model, OverparamSection(length=3, svd_dtype="float32"))
    model.to(device)
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor], bf16: bool) -> None:
    with torch.autocast(batch["labels"].device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if batch["labels"].is_cuda:
        # What the step does may still be in the GPU's queue.
        torch.cuda.synchronize()


def flops(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    optimizer.zero_grad()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    bf16 = resolve_precision(options.precision, options.device) == "bf16"
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.sequence)
    batch = {
        "input_ids": torch.randint(1000, 20_000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, (options.batch,), generator=generator),
    }
    batch = {name: values.to(options.device) for name, values in batch.items()}
    pairs = [build(over, options.device) for over in (False, True)]
    counted = [flops(model, optimizer, batch) for model, optimizer in pairs]
    seconds: list[list[float]] = [[], []]
    for round_ in range(options.rounds + 1):
        for i, (model, optimizer) in enumerate(pairs):
            begun = time.perf_counter()
            step(model, optimizer, batch, bf16)
            if round_:
                seconds[i].append(time.perf_counter() - begun)
    plain, chain = (statistics.median(values) for values in seconds)
    ratio = statistics.median(c / p for p, c in zip(*seconds, strict=True))
    limit = 1.3 * counted[1] / counted[0]
    print(f"precision {'bf16' if bf16 else 'fp32'}, {options.batch} x {options.sequence} tokens")
    print(f"plain {plain:.3f} s ({counted[0] / 1e9:.0f} GFLOP), OPDF L=3 {chain:.3f} s ({counted[1] / 1e9:.0f} GFLOP)")
    print(f"ratio {ratio:.2f}, limit {limit:.2f}: {'met' if ratio <= limit else 'NOT met'}")


if __name__ == "__main__":
    main()
