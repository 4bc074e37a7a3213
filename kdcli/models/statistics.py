"""What rows of data say about the matrices of a model's blocks: moments of their inputs, gradients of a loss."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcli.models.blocks import BlockMatrix, body_of, iter_block_matrices
from kdcli.models.inputs import model_inputs
from kdcli.signals import MatrixKey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """What rows say about one matrix y = W x + b, over real tokens.

    mean: E[x], (in,). moments: E[x x^T], (in, in). importance: (out,), the squared gradients of the loss of each
    row of data by W, summed over the rows of data and each row of W (FWSVD, arXiv 2207.00112). sensitivity: (out,),
    the squared gradients by y, summed over all tokens and divided by the number of rows of data. Both are None
    where no loss was given. All fp64.
    """

    mean: Tensor
    moments: Tensor
    importance: Tensor | None = None
    sensitivity: Tensor | None = None

    @property
    def covariance(self) -> Tensor:
        """E[(x - E[x]) (x - E[x])^T], (in, in)."""
        return self.moments - torch.outer(self.mean, self.mean)


def collect_statistics(
    model: "PreTrainedModel", batches: Iterable[Batch], loss: Callable[[Batch], Tensor] | None = None
) -> dict[MatrixKey, Statistics]:
    """Return the statistics of every block matrix from one pass over `batches`, which are on the model's device.

    loss: runs the model on a batch and returns the mean loss of its rows; None where gradients are not asked for. The
    model is in eval mode, and is not changed. Matrices of one input share their moments' memory.
    """
    matrices = dict(iter_block_matrices(model))
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {matrix.module: [] for matrix in matrices.values()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        # The first layer that is hooked starts the graph, whatever parameters are frozen.
        if loss is not None and not output.requires_grad:
            output = output.detach().requires_grad_()
        calls[module].append((inputs[0].detach(), output))
        return output

    sums: dict[MatrixKey, _Sums] = {}
    hooks = [module.register_forward_hook(note) for module in calls]
    try:
        for batch in batches:
            with torch.set_grad_enabled(loss is not None):
                gradients = _run(model, batch, loss, calls)
            _add(sums, matrices, calls, gradients, batch)
            for found in calls.values():
                found.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {key: found.statistics() for key, found in sums.items()}


@dataclass
class _Sums:
    inputs: "_Inputs"
    importance: Tensor | None = None
    sensitivity: Tensor | None = None
    rows: int = 0

    def statistics(self) -> Statistics:
        mean, moments = self.inputs.means()
        if self.importance is None or self.sensitivity is None:
            return Statistics(mean, moments)
        return Statistics(mean, moments, self.importance, self.sensitivity / self.rows)


@dataclass
class _Inputs:
    """Sums over the inputs of one or several matrices."""

    first: Tensor
    second: Tensor
    tokens: int = 0
    found: tuple[Tensor, Tensor] | None = None

    def means(self) -> tuple[Tensor, Tensor]:
        if self.found is None:
            self.found = (self.first / self.tokens, self.second / self.tokens)
        return self.found


def _run(
    model: "PreTrainedModel",
    batch: Batch,
    loss: Callable[[Batch], Tensor] | None,
    calls: Mapping[nn.Module, list[tuple[Tensor, Tensor]]],
) -> dict[int, Tensor]:
    """Run the model, and return by the id of every kept output the gradient of the summed loss by it."""
    if loss is None:
        body_of(model)(**model_inputs(model, batch))
        return {}
    value = loss(batch) * len(batch["input_ids"])
    outputs = [output for found in calls.values() for _, output in found]
    gradients = torch.autograd.grad(value, outputs, allow_unused=True)
    return {
        id(output): torch.zeros_like(output) if gradient is None else gradient
        for output, gradient in zip(outputs, gradients, strict=True)
    }


@torch.no_grad()
def _add(
    sums: dict[MatrixKey, _Sums],
    matrices: Mapping[MatrixKey, BlockMatrix],
    calls: Mapping[nn.Module, list[tuple[Tensor, Tensor]]],
    gradients: Mapping[int, Tensor],
    batch: Batch,
) -> None:
    mask = batch["attention_mask"][:, :, None]
    shared: dict[int, _Inputs] = {}
    for key, matrix in matrices.items():
        found = calls[matrix.module]
        # Blocks that are run again and again have several inputs a batch: they are one longer row.
        x = torch.cat([given * mask for given, _ in found], dim=1) if len(found) > 1 else found[0][0] * mask
        name = found[0][0].data_ptr()
        if key not in sums:
            width = x.shape[-1]
            fresh = _Inputs(x.new_zeros(width, dtype=torch.float64), x.new_zeros(width, width, dtype=torch.float64))
            sums[key] = _Sums(next((sums[k].inputs for k in sums if shared.get(name) is sums[k].inputs), fresh))
        inputs = sums[key].inputs
        if name not in shared:
            shared[name] = inputs
            flat = x.reshape(-1, x.shape[-1]).float()
            inputs.first += flat.sum(0)
            inputs.second += flat.T @ flat
            inputs.tokens += int(mask.sum()) * len(found)
        if gradients:
            parts = [matrix.of(gradients[id(output)]) * mask for _, output in found]
            g = torch.cat(parts, dim=1).float()
            # The squared entries of a row's gradient sum_t g_t x_t^T, summed over columns, without forming it.
            likeness = x.float() @ x.float().transpose(1, 2)
            importance = ((likeness @ g) * g).sum((0, 1)).double()
            sensitivity = g.square().sum((0, 1)).double()
            old = sums[key]
            old.importance = importance if old.importance is None else old.importance + importance
            old.sensitivity = sensitivity if old.sensitivity is None else old.sensitivity + sensitivity
            old.rows += len(x)

