"""The map from a decoder's last hidden states to logits over its vocabulary, as what the logits are formed from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcli.models.blocks import body_of
from kdcli.models.families import family_of
from kdcli.models.inputs import model_inputs
from kdcli.models.lowrank import LowRankDecoder, LowRankLinear
from kdcli.signals import VocabularyLogits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGREES, HALF_AGREES = 1e-4, 2e-2
"""How far logits may be from the model's own, of their largest; in half precision."""


@dataclass(frozen=True)
class OutputHead:
    """A decoder's last linear map. cap: what its logits are bounded by, smoothly (Gemma 2), or None."""

    layer: Any
    cap: float | None = None

    def logits(self, states: Tensor) -> VocabularyLogits:
        """Return the logits of last hidden states (n, hidden), as the model gives them in the present precision.

        Of low-rank factors A B the states are B x, so that the weight is A, and A B is never formed; that of a chain of
        tensors is formed here, once.
        """
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        layer = self.layer
        if isinstance(layer, LowRankDecoder):
            states, weight = states @ layer.table.up.weight, layer.table.down.weight
        elif isinstance(layer, LowRankLinear):
            states, weight, layer = layer.down(states), layer.up.weight, layer.up
        else:
            weight = layer.weight
        return VocabularyLogits(states, weight, layer.bias, self.cap, dtype)


def output_head(model: "PreTrainedModel") -> OutputHead | None:
    """Return what forms the logits of a decoder; None of another model, and of one that does more to its logits.

    The second is found out by running the model on two tokens.
    """
    layer = model.get_output_embeddings() if family_of(model.config).causal else None
    if layer is None:
        return None
    found = OutputHead(layer, getattr(model.config, "final_logit_softcapping", None))
    return found if _agrees(model, found) else None


@torch.no_grad()
def _agrees(model: "PreTrainedModel", head: OutputHead) -> bool:
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor([[0, model.config.vocab_size - 1]], device=device)
    inputs = model_inputs(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    plain = model(**inputs).logits[0].float()
    formed = head.logits(body_of(model)(**inputs)[0][0]).float()
    model.train(training)
    most = AGREES if next(model.parameters()).dtype == torch.float32 else HALF_AGREES
    return bool((plain - formed).abs().max() <= most * plain.abs().max())
