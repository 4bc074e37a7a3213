"""Does the graph say what the model says?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdcli.evaluation.predict import INPUTS
from kdcli.export.session import OnnxModel

TOLERANCE = 1e-4
"""Largest allowed difference of a logit in fp32."""


@torch.inference_mode()
def parity(model: Any, exported: OnnxModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Return the largest absolute difference between the logits of both over real batches."""
    worst = 0.0
    for batch in batches:
        inputs = {key: batch[key] for key in INPUTS if key in batch}
        difference = model(**inputs).logits.float() - exported(**inputs).logits.float()
        worst = max(worst, float(difference.abs().max()))
    return worst
