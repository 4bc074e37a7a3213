"""OPDF (L = 3) on a 3-layer depth student of SST-2, against the same run without.

KDCLI_DATA_DIR=... python tests/benchmarks/opdf_sst2.py [--samples 20000] [--epochs 2] [--output bench]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import need_data, report, run, sst2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("bench"))
    options = parser.parse_args()
    need_data()
    options.output.mkdir(parents=True, exist_ok=True)
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "+SVD": {"overparam": {"factorization": "svd"}},
        "+OPDF": {"overparam": {"length": 3}},
    }
    rows = []
    for name, sections in variants.items():
        results = []
        for seed in range(1, options.seeds + 1):
            document = sst2(
                options.samples,
                teacher_epochs=2,
                seed=seed,
                student={"form": "depth", "layers": 3},
                train={"epochs": options.epochs, "select": "last"},
                **sections,
            )
            results.append(run(f"opdf-{name.strip('+').lower()}-{seed}", document, options.output).to_json())
        scores = [r["student"]["score"] for r in results]
        rows.append(
            {
                "student": name,
                "teacher": statistics.mean(r["teacher"]["score"] for r in results),
                "accuracy": statistics.mean(scores),
                "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                "parameters": results[0]["student"]["parameters"],
                "train seconds": statistics.mean(r["seconds"]["train"] for r in results),
            }
        )
    report(rows, options.output / "opdf_sst2.json")


if __name__ == "__main__":
    main()
