"""What rows of data say about the matrices of a model's blocks: moments of their inputs, gradients of a loss."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdcli.models.blocks import BlockMatrix, body_of, by_row, iter_block_matrices
from kdcli.models.finite import NotFiniteError
from kdcli.models.inputs import main_input, mask_of, model_inputs
from kdcli.signals import MatrixKey
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Statistics:
    """What rows say about one matrix y = W x + b, over real tokens.

    mean: E[x], (in,). covariance: of x, (in, in). importance: (out,), the squared gradients of the loss of each
    row of data by W, summed over the rows of data and each row of W (FWSVD, arXiv 2207.00112). sensitivity: (out,),
    the squared gradients by y, summed over all tokens and divided by the number of rows of data. Both are None
    where no loss was given. All fp32, as the cache holds them.
    """

    mean: Tensor
    covariance: Tensor
    importance: Tensor | None = None
    sensitivity: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """True when no number is NaN or infinite."""
        given = (self.mean, self.covariance, self.importance, self.sensitivity)
        return all(bool(torch.isfinite(tensor).all()) for tensor in given if tensor is not None)

    def to(self, device: torch.device) -> "Statistics":
        """Return them on `device`."""
        given = (self.mean, self.covariance, self.importance, self.sensitivity)
        return Statistics(*(tensor.to(device) if tensor is not None else None for tensor in given))  # type: ignore[arg-type]

    @property
    def moments(self) -> Tensor:
        """E[x x^T], (in, in), fp64."""
        return self.covariance.double() + torch.outer(self.mean.double(), self.mean.double())


def collect_statistics(
    model: "PreTrainedModel",
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor] | None = None,
    *,
    layer: int | None = None,
) -> dict[MatrixKey, Statistics]:
    """Return the statistics of every block matrix, on the CPU, from one pass over `batches` on the model's device.

    loss: runs the model on a batch and returns the mean loss of its rows, where a row's may be the sum over its tokens;
    None where gradients are not asked for. The
    model is in eval mode, and is not changed. layer: the one block (1..L) that is looked at; left out, all. Matrices of
    one input share its tensors. Raises NotFiniteError when a sum is NaN or infinite.
    """
    matrices = {key: matrix for key, matrix in iter_block_matrices(model) if layer is None or key[0] == layer}
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
    statistics = {key: found.statistics() for key, found in sums.items()}
    if bad := [key for key, of in statistics.items() if not of.is_finite]:
        raise NotFiniteError(
            f"what training rows say about {counted(len(bad), 'matrix', 'matrices')} contains NaN or inf (first: block "
            f"{bad[0][0]}, {bad[0][1]})",
            hint='check the model and its loss on these rows, or use student.init = "svd"',
        )
    return statistics


@dataclass
class _Sums:
    inputs: "_Inputs"
    importance: Tensor | None = None
    sensitivity: Tensor | None = None
    rows: int = 0

    def statistics(self) -> Statistics:
        mean, covariance = self.inputs.of
        if self.importance is None or self.sensitivity is None:
            return Statistics(mean, covariance)
        return Statistics(mean, covariance, self.importance.float().cpu(), (self.sensitivity / self.rows).float().cpu())


@dataclass
class _Inputs:
    """Sums over the inputs of one or several matrices."""

    first: Tensor
    second: Tensor
    tokens: int = 0

    @cached_property
    def of(self) -> tuple[Tensor, Tensor]:
        """The mean and the covariance; the sums are gone then: of a large model both take much memory."""
        mean = self.first / self.tokens
        covariance = self.second.div_(self.tokens).sub_(torch.outer(mean, mean)).float().cpu()
        self.second = covariance.new_empty(0)
        return mean.float().cpu(), covariance


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
    value = loss(batch) * len(main_input(batch))
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
    known = batch.get("attention_mask")
    shared: dict[int, _Inputs] = {}
    for key, matrix in matrices.items():
        found = calls[matrix.module]
        # Blocks that are run again and again have several inputs a batch: they are one longer row.
        rows = [by_row(x, known) for x, _ in found]
        mask = mask_of(batch, rows[0])[:, :, None]
        given = [x * mask for x in rows]
        x = torch.cat(given, dim=1) if len(given) > 1 else given[0]
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
            parts = [by_row(matrix.of(gradients[id(y)]), known) * mask for _, y in found]
            g = torch.cat(parts, dim=1).float()
            # The squared entries of a row's gradient sum_t g_t x_t^T, summed over columns, without forming it.
            likeness = x.float() @ x.float().transpose(1, 2)
            importance = ((likeness @ g) * g).sum((0, 1)).double()
            sensitivity = g.square().sum((0, 1)).double()
            old = sums[key]
            old.importance = importance if old.importance is None else old.importance + importance
            old.sensitivity = sensitivity if old.sensitivity is None else old.sensitivity + sensitivity
            old.rows += len(x)


def to_tensors(statistics: Mapping[MatrixKey, Statistics]) -> dict[str, Tensor]:
    """Return statistics as named tensors: covariances once for all matrices of one input, and half of each."""
    tensors: dict[str, Tensor] = {}
    inputs: dict[int, int] = {}
    for (layer, name), of in statistics.items():
        number = inputs.setdefault(id(of.covariance), len(inputs))
        if f"{number}.mean" not in tensors:
            tensors[f"{number}.mean"] = of.mean
            rows, columns = torch.triu_indices(*of.covariance.shape)
            tensors[f"{number}.covariance"] = of.covariance[rows, columns]
        tensors[f"{layer}.{name}.inputs"] = torch.tensor(number)
        if of.importance is not None and of.sensitivity is not None:
            tensors[f"{layer}.{name}.importance"] = of.importance
            tensors[f"{layer}.{name}.sensitivity"] = of.sensitivity
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[MatrixKey, Statistics]:
    """Return the statistics that `to_tensors` gave."""
    covariances: dict[int, Tensor] = {}
    found = {}
    for place in (name.removesuffix(".inputs") for name in tensors if name.endswith(".inputs")):
        layer, _, name = place.partition(".")
        number = int(tensors[f"{place}.inputs"])
        mean = tensors[f"{number}.mean"]
        if number not in covariances:
            covariances[number] = mean.new_empty(len(mean), len(mean))
            rows, columns = torch.triu_indices(len(mean), len(mean))
            covariances[number][rows, columns] = covariances[number][columns, rows] = tensors[f"{number}.covariance"]
        given = tensors.get(f"{place}.importance"), tensors.get(f"{place}.sensitivity")
        found[(int(layer), name)] = Statistics(mean, covariances[number], *given)
    return found
