"""ONNX Runtime against PyTorch eager on the real encoder, interleaved, over a batch x sequence grid.

python tests/benchmarks/onnx_latency.py [--runs 50] [--threads 2]
"""

import argparse
import tempfile
from pathlib import Path

from common import encoder
from rich.console import Console

from kdcli.cli.render import latency
from kdcli.export.graph import export_onnx
from kdcli.export.latency import measure
from kdcli.export.session import OnnxModel
from kdcli.models.load import load_tokenizer
from kdcli.tasks.heads import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    model, tokenizer = (
        load_model(encoder(), "sequence-classification", new_head={"num_labels": 2}),
        load_tokenizer(encoder()),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "onnx"
        export_onnx(model.eval(), tokenizer, path)
        result = measure(
            {"encoder": (model, OnnxModel(path, threads=options.threads))},
            batch_sizes=[1, 8],
            sequence_lengths=[16, 128],
            threads=options.threads,
            runs=options.runs,
        )
    Console().print(latency(result))


if __name__ == "__main__":
    main()
