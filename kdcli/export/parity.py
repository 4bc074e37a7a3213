"""Comparing a graph's outputs with its model's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdcli.export.session import OnnxModel
from kdcli.models.finite import check_finite
from kdcli.models.inputs import model_inputs

TOLERANCE = 1e-4
"""Largest allowed difference of an output in fp32."""


@torch.inference_mode()
def parity(model: Any, exported: OnnxModel, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Return the largest absolute difference between each output of both, by name, over real batches.

    Raises NotFiniteError when outputs of one of them contain NaN or inf: no difference would say how far they are.
    """
    worst = dict.fromkeys(exported.outputs, 0.0)
    for batch in batches:
        found, copied = model(**model_inputs(model, batch)), vars(exported(**model_inputs(exported, batch)))
        for name in exported.outputs:
            own, graph = found[name].float(), copied[name].float()
            check_finite(own, "the model")
            check_finite(graph, "the exported graph")
            worst[name] = max(worst[name], float((own - graph).abs().max()))
    return worst
