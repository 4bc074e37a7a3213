"""Examples per second of grouped, dynamically padded batches against padding everything to 128, on SST-2.

    KDCLI_DATA_DIR=... python tests/benchmarks/throughput.py [--samples 2000] [--rounds 3]

Both run the same training step of the same model on the same batches, in turn; the losses must agree.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import encoder, need_data

from kdcli.machine import resolve_precision
from kdcli.models.load import load_tokenizer
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.heads import load_model
from kdcli.tasks.load import load_task
from kdcli.training.sampler import EpochSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    need_data()
    section = TaskSection(name="sst2", train_samples=options.samples)
    task = load_task(section, EvaluateSection(), base=Path())
    tokenizer = load_tokenizer(encoder())
    data = encode(task.train, tokenizer, 128)
    collator = Collator(tokenizer)
    bf16 = resolve_precision("auto", "cpu") == "bf16"

    def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        missing = 128 - batch["input_ids"].shape[1]
        return {
            key: torch.nn.functional.pad(value, (0, missing)) if value.ndim == 2 else value
            for key, value in batch.items()
        }

    def epoch(to_full_length: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = load_model(encoder(), "sequence-classification", new_head={"num_labels": 2}).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.config._attn_implementation = "sdpa"
        for block in model.modules():
            if hasattr(block, "dropout") and isinstance(block.dropout, torch.nn.Dropout):
                block.dropout.p = 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
        order = list(EpochSampler(data["length"], 32, seed=0, group=True))
        losses = []
        begun = time.perf_counter()
        for start in range(0, len(order), 32):
            batch = collator([data[i] for i in order[start : start + 32]])
            batch.pop("index")
            if to_full_length:
                batch = padded(batch)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return len(order) / (time.perf_counter() - begun), statistics.mean(losses)

    ratios = []
    for _ in range(options.rounds):
        (fast, loss), (slow, reference) = epoch(False), epoch(True)
        ratios.append(fast / slow)
        print(f"grouped {fast:.0f} examples/s (mean loss {loss:.4f}), to 128 {slow:.0f} examples/s ({reference:.4f})")
    print(f"ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
