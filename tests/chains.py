"""The tensors of a model's over-parameterised matrices, as tests look at them."""

from torch import Tensor, nn

from kdcli.models.overparam import linears_of
from kdcli.signals import MatrixKey
from kdcli.tensors.parametrization import chain_of, tensors_of


def factors_of(model: nn.Module) -> dict[MatrixKey, tuple[Tensor, ...]]:
    """Return the live tensors of every chain in the blocks."""
    return {key: tensors_of(linear) for key, linear in linears_of(model) if chain_of(linear) is not None}
