"""torchvision is imported whether or not its compiled operators fit PyTorch."""

import subprocess
import sys

import pytest

pytest.importorskip("PIL")

PROGRAM = """
import sys
import kdcli
assert "torch" not in sys.modules
import torchvision
from torchvision.transforms import v2
import torch
image = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
assert torch.equal(v2.RandomHorizontalFlip(1.0)(image), image.flip(-1))
from transformers import BertForSequenceClassification, ViTImageProcessor
print("ready")
"""


def test_torchvision_and_transformers_import_after_kdcli():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.strip() == "ready", done.stderr
