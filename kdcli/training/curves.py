"""A training's curve in TensorBoard, from its history."""

import math
from pathlib import Path
from typing import Any


def write_curve(history: list[dict[str, Any]], folder: Path) -> None:
    """Write what a training logged, under the tags that it would have had while it ran; once a folder.

    history: as `fit` returns it.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import rewrite_logs

    if any(folder.glob("events.*")):
        return
    with SummaryWriter(log_dir=str(folder)) as writer:
        for entry in history:
            step = entry["step"]
            for name, value in rewrite_logs({k: v for k, v in entry.items() if k != "step"}).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    writer.add_scalar(name, value, step)
