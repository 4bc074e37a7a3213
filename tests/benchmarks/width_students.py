"""Width students on STS-B and SST-2: projections of the teacher's weights against slices of them, on equal terms.

KDCLI_DATA_DIR=... python tests/benchmarks/width_students.py [--samples 1000] [--epochs 2] [--output bench]
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import encoder, need_data, report, run

STARTS: dict[str, dict[str, Any]] = {
    "slices": {"init": "teacher"},
    "projections": {"init": "projections"},
    "projections, no alignment": {"init": "projections", "alignment": 0.0},
}
SIZES = {"form": "width", "hidden_size": 192, "heads": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=["stsb", "sst2"])
    parser.add_argument("--methods", nargs="*", default=["kd", "hs"])
    parser.add_argument("--starts", nargs="*", default=list(STARTS))
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--teacher-epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--teacher", default=None, help="a fine-tuned model for all tasks, in place of the encoder")
    parser.add_argument("--output", type=Path, default=Path("bench"))
    options = parser.parse_args()
    need_data()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for task in options.tasks:
        for method in options.methods:
            for start in options.starts:
                results = []
                for seed in range(1, options.seeds + 1):
                    tuning = {"epochs": options.teacher_epochs, "learning_rate": 1e-4}
                    taught = {"model": options.teacher, "finetune": False}
                    document: dict[str, Any] = {
                        "task": {"name": task, "train_samples": options.samples, "max_length": 64},
                        "method": method,
                        # One teacher for all seeds of students: what is compared are the students.
                        "teacher": taught if options.teacher else {"model": encoder(), "finetune": tuning, "seed": 1},
                        "student": {**SIZES, **STARTS[start]},
                        "train": {
                            "epochs": options.epochs,
                            "learning_rate": options.learning_rate,
                            "select": "last",
                            "precision": "fp32",
                        },
                        "seed": seed,
                    }
                    slug = f"{task}-{method}-{start.replace(', ', '-').replace(' ', '-')}-{seed}"
                    results.append(run(slug, document, options.output).to_json())
                scores = [result["student"]["score"] for result in results]
                rows.append(
                    {
                        "task": task,
                        "method": method,
                        "start": start,
                        "seeds": options.seeds,
                        "teacher": statistics.mean(result["teacher"]["score"] for result in results),
                        "student": statistics.mean(scores),
                        "std": statistics.stdev(scores) if options.seeds > 1 else 0.0,
                        "seconds": statistics.mean(result["training"][0]["seconds"] for result in results),
                    }
                )
                report(rows, options.output / "width_students.json")


if __name__ == "__main__":
    main()
