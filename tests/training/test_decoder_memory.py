"""A step of a decoder over a large vocabulary takes less memory than one table of its logits would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decoder_step.py"
TABLE = 4 * 512 * 49_152 * 4 / 1e6
"""Megabytes of one model's logits; a dense step holds about six of them."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("divergence", ["kl", "js"])
def test_no_table_of_logits_is_held(divergence: str):
    options = ["2x64x49152", "--layers", "1", "--memory-only", "--divergence", divergence]
    outcome = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    (over,) = re.findall(r": (-?\d+) MB over these parts", outcome.stdout)
    assert float(over) < 1.0 * TABLE
