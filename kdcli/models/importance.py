"""Which matrices of a model matter most to its loss (OPF, Gao et al., ACL 2023, section 3.3)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kdcli.signals import MatrixKey


@torch.no_grad()
def zeroing_importance(
    matrices: Mapping[MatrixKey, Sequence[Tensor]], loss: Callable[[], Tensor]
) -> dict[MatrixKey, float]:
    """Return |loss - loss with its weights zeroed| of every matrix. loss: of the model, each time it is called.

    matrices: the weights of each, or views of them; they are zeroed in place and put back as they were.
    """
    whole = loss()
    changes = []
    for weights in matrices.values():
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight.zero_()
        try:
            changes.append((whole - loss()).abs())
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    return dict(zip(matrices, torch.stack(changes).tolist(), strict=True))


def most_important(importance: Mapping[MatrixKey, float], count: int) -> list[MatrixKey]:
    """Return the `count` matrices of the greatest importance, in the model's order; of equal ones the first."""
    ranked = sorted(importance, key=lambda key: -importance[key])
    chosen = set(ranked[:count])
    return [key for key in importance if key in chosen]
