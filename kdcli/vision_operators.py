"""torchvision beside a PyTorch that its compiled operators do not fit, such as a CUDA build beside a CPU build.

kdcli uses none of these operators. Without them torchvision fails to import, and with it most of transformers: it
describes two that it expects to exist (pytorch/vision, `_meta_registrations.py`). Here they are declared first.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULE = "torchvision._meta_registrations"
"""What describes the operators; torchvision has loaded its compiled ones by then, if they fit."""

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _Declare(MetaPathFinder):
    """Declares the operators that are missing when `MODULE` is looked for; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == MODULE:
            import torch

            for name, schema in SCHEMAS.items():
                if not hasattr(torch.ops.torchvision, name):
                    torch.library.define(f"torchvision::{name}", schema)
        return None


def declare_on_import() -> None:
    """Let torchvision be imported whether or not its operators fit; imports nothing itself."""
    if not any(isinstance(finder, _Declare) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Declare())
