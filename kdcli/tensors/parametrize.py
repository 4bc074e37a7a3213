"""Over-parameterising a model's block matrices, and contracting them again (OPDF, arXiv 2411.06448)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdcli.errors import InputError
from kdcli.models.anatomy import block_matrix, blocks_of, iter_block_matrices
from kdcli.models.counts import count_parameters
from kdcli.models.lowrank import LowRankLinear, svd_factors
from kdcli.objectives.base import MatrixKey
from kdcli.recipe.schema import OverparamSection
from kdcli.tensors.chain import ChainCache, contract_cached
from kdcli.tensors.factors import MPOShape, shape_for
from kdcli.tensors.mpo import decompose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TARGETS = {"attention": ("query", "key", "value", "attention_output"), "ffn": ("ffn_in", "ffn_out")}


class MPOWeight(nn.Module):
    """A parametrization of `nn.Linear.weight` by a chain of tensors: the layer stays as it is.

    `right_inverse` decomposes a weight (out, in), `forward` contracts the chain.
    """

    def __init__(self, shape: MPOShape, gauge: str = "symmetric", svd_dtype: str = "float64") -> None:
        super().__init__()
        self.shape = shape
        self.gauge = gauge
        self.svd_dtype = svd_dtype
        self.cache = ChainCache()

    def forward(self, *chain: Tensor) -> Tensor:
        return contract_cached(chain, self.shape, self.cache)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return decompose(weight, self.shape, gauge=self.gauge, dtype=getattr(torch, self.svd_dtype))


@dataclass(frozen=True)
class MatrixReport:
    """One matrix as a chain."""

    block: int
    matrix: str
    shape: tuple[int, int]
    out_factors: tuple[int, ...]
    in_factors: tuple[int, ...]
    bonds: tuple[int, ...]
    dense: int
    chain: int


@dataclass
class OverparamReport:
    """What was over-parameterised: a row a matrix, the parameters before and after."""

    rows: list[MatrixReport]
    before: int
    after: int
    skipped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters_before": self.before,
            "parameters_after": self.after,
            "matrices": [asdict(row) for row in self.rows],
            "skipped": self.skipped,
        }

    def table(self) -> Table:
        table = Table(title=f"{self.before:,} -> {self.after:,} parameters")
        for name in (
            "block",
            "matrix",
            "shape",
            "out factors",
            "in factors",
            "bonds",
            "dense",
            "chain",
            "scale",
        ):
            table.add_column(name, justify="left" if name in ("matrix", "shape") else "right")
        for row in self.rows:
            table.add_row(
                str(row.block),
                row.matrix,
                "x".join(map(str, row.shape)),
                "x".join(map(str, row.out_factors)),
                "x".join(map(str, row.in_factors)),
                ",".join(map(str, row.bonds)),
                f"{row.dense:,}",
                f"{row.chain:,}",
                f"{row.chain / row.dense:.4f}",
            )
        return table


@dataclass
class ContractReport:
    """What was contracted, and how far the logits of a probe batch moved."""

    matrices: list[dict[str, Any]]
    before: int
    after: int
    max_abs_difference: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters_before": self.before,
            "parameters_after": self.after,
            "max_abs_difference": self.max_abs_difference,
            "matrices": self.matrices,
        }

    def table(self) -> Table:
        table = Table(title=f"{self.before:,} -> {self.after:,} parameters")
        for name in ("matrix", "shape", "bonds"):
            table.add_column(name)
        for row in self.matrices:
            table.add_row(row["matrix"], "x".join(map(str, row["shape"])), ",".join(map(str, row["bonds"])))
        return table


def linears_of(model: "PreTrainedModel") -> Iterator[tuple[MatrixKey, nn.Linear]]:
    """Yield every linear layer in the place of a block matrix; a factored one gives "name.down", "name.up"."""
    for (layer, name), module in iter_block_matrices(model):
        if isinstance(module, LowRankLinear):
            yield (layer, f"{name}.down"), module.down
            yield (layer, f"{name}.up"), module.up
        elif isinstance(module, nn.Linear):
            yield (layer, name), module


def chain_of(linear: nn.Module) -> MPOWeight | None:
    """Return the chain behind a layer's weight, or None when the weight is plain."""
    if not parametrize.is_parametrized(linear, "weight"):
        return None
    found = linear.parametrizations["weight"][0]  # type: ignore[index, union-attr]
    return found if isinstance(found, MPOWeight) else None


def tensors_of(linear: nn.Module) -> tuple[Tensor, ...]:
    """Return the trainable tensors of an over-parameterised layer, from left to right."""
    holder = linear.parametrizations["weight"]  # type: ignore[index, union-attr]
    return tuple(getattr(holder, f"original{k}") for k in range(holder.ntensors))  # type: ignore[arg-type, union-attr]


def is_overparameterised(model: nn.Module) -> bool:
    """True when some layer's weight is a chain."""
    return any(chain_of(module) is not None for module in model.modules())


def _attach(linear: nn.Linear, weight: MPOWeight) -> None:
    parametrize.register_parametrization(linear, "weight", weight, unsafe=True)


def overparameterise(model: "PreTrainedModel", section: OverparamSection) -> OverparamReport:
    """Put chains in place of the block matrices that `section` names, in place; the function is unchanged.

    A weight that several layers share is left alone after the first. Raises InputError when the model is
    over-parameterised already, when a dimension has no factors, or when nothing is left to do.
    """
    if is_overparameterised(model):
        raise InputError("the model is over-parameterised already", hint="contract it first")
    before = count_parameters(model)
    depth = len(blocks_of(model))
    layers = {layer + 1 for layer in section.layers} if section.layers is not None else set(range(1, depth + 1))
    if wrong := sorted(layer - 1 for layer in layers if layer > depth):
        raise InputError(f"the student has blocks 0 to {depth - 1}, not {wrong[0]}", where="overparam.layers")
    names = {name for target in section.targets for name in TARGETS[target]}
    rows, seen, skipped = [], set(), []
    # All shapes first: an error must not leave a model half done.
    wanted = [
        (key, linear, shape_for(linear.out_features, linear.in_features, section))
        for key, linear in linears_of(model)
        if key[0] in layers and key[1].split(".")[0] in names
    ]
    for (layer, name), linear, shape in wanted:
        if id(linear.weight) in seen:
            skipped.append(f"{layer}.{name}")
            continue
        seen.add(id(linear.weight))
        dense = linear.weight.numel()
        _attach(linear, MPOWeight(shape, section.gauge, section.svd_dtype))
        rows.append(
            MatrixReport(
                layer, name, shape.matrix, shape.out_factors, shape.in_factors, shape.bond_dims(), dense,
                shape.parameter_count(),
            )
        )  # fmt: skip
    if not rows:
        raise InputError("no matrix is left to over-parameterise", where="overparam")
    return OverparamReport(rows, before, count_parameters(model), skipped)


def probe_batch(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Return a small random batch (4 x 16 tokens, the last rows padded) that any model of its kind takes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (4, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[2:, 11:] = 0
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def probe(model: "PreTrainedModel") -> Tensor:
    """Return the model's first output on the probe batch, in eval mode."""
    training = model.training
    output = model.eval()(**probe_batch(model))[0]
    model.train(training)
    return output.float()


def contract_model(model: "PreTrainedModel", *, check: bool = True) -> ContractReport:
    """Multiply every chain back into its layer's plain weight, in place; a dense model stays as it is.

    The report holds the largest change of the logits on a probe batch.
    """
    before = count_parameters(model)
    reference = probe(model) if check else None
    rows = []
    for path, module in list(model.named_modules()):
        weight = chain_of(module)
        if weight is not None:
            rows.append({"matrix": path, "shape": weight.shape.matrix, "bonds": weight.shape.bond_dims()})
            _detach(module)
    difference = None
    if reference is not None:
        difference = float((probe(model) - reference).abs().max())
    return ContractReport(rows, before, count_parameters(model), difference)


@torch.no_grad()
def _detach(linear: nn.Module) -> None:
    """Give a layer its plain weight back, with memory of its own and in its old place before the bias."""
    value = linear.weight.detach().clone()  # type: ignore[union-attr, operator]
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    del linear.weight
    bias = linear._parameters.pop("bias", None)
    linear.weight = nn.Parameter(value)
    linear.register_parameter("bias", bias)


def factors_of(model: "PreTrainedModel") -> dict[MatrixKey, tuple[Tensor, ...]]:
    """Return the live tensors of every chain in the blocks."""
    return {key: tensors_of(linear) for key, linear in linears_of(model) if chain_of(linear) is not None}


def overparam_state(model: nn.Module) -> dict[str, Any]:
    """Return the factor lists of every chain by the layer's path, as JSON-able data."""
    state = {}
    for path, module in model.named_modules():
        weight = chain_of(module)
        if weight is not None:
            state[path] = {
                "out_factors": list(weight.shape.out_factors),
                "in_factors": list(weight.shape.in_factors),
                "gauge": weight.gauge,
            }
    return json.loads(json.dumps(state))


def restore_overparam(model: nn.Module, state: dict[str, Any]) -> None:
    """Give `model` the chains that `overparam_state` described; the tensors' values are for the caller to load."""
    for path, entry in state.items():
        shape = MPOShape(tuple(entry["out_factors"]), tuple(entry["in_factors"]))
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        if shape.matrix != (linear.out_features, linear.in_features):
            raise ValueError(f"the chain of {path} does not fit its layer")
        with torch.no_grad():
            linear.weight.zero_()
        _attach(linear, MPOWeight(shape, entry.get("gauge", "symmetric")))


def teacher_factors(
    teacher: "PreTrainedModel",
    student: "PreTrainedModel",
    pairs: Sequence[tuple[int, int]],
    section: OverparamSection,
) -> tuple[dict[MatrixKey, tuple[Tensor, ...]], list[str]]:
    """Return the teacher's tensors for each of the student's chains, and the names of those without.

    pairs: (student block, teacher block), counted from 1. The teacher's matrix is decomposed with the student's
    factor lists; a student's low-rank factors are paired with the teacher's SVD factors of the same rank.
    A matrix of another shape is skipped, or with `aux_mismatch = "truncate"` compared on leading sub-blocks
    (only where the factors agree and the bonds differ).
    """
    blocks = dict(pairs)
    dtype = getattr(torch, section.svd_dtype)
    found: dict[MatrixKey, tuple[Tensor, ...]] = {}
    skipped = []
    splits: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = {}
    for (layer, name), linear in linears_of(student):
        chain = chain_of(linear)
        if chain is None:
            continue
        matrix, _, part = name.partition(".")
        weight = _teacher_weight(teacher, blocks.get(layer), matrix, part, linear, splits)
        if weight is None or tuple(weight.shape) != chain.shape.matrix:
            skipped.append(f"{layer}.{name}")
            continue
        found[(layer, name)] = decompose(weight.detach(), chain.shape, gauge=section.gauge, dtype=dtype)
    return found, skipped


def _teacher_weight(
    teacher: "PreTrainedModel",
    layer: int | None,
    matrix: str,
    part: str,
    linear: nn.Linear,
    splits: dict[tuple[int, str, int], tuple[Tensor, Tensor]],
) -> Tensor | None:
    if layer is None:
        return None
    module = block_matrix(teacher, layer, matrix)
    if not part:
        return module.weight if isinstance(module, nn.Linear) else None
    if isinstance(module, LowRankLinear):
        return getattr(module, part).weight
    assert isinstance(module, nn.Linear)
    rank = linear.out_features if part == "down" else linear.in_features
    if rank > min(module.weight.shape):
        return None
    key = (layer, matrix, rank)
    if key not in splits:
        splits[key] = svd_factors(module.weight.detach(), rank)
    up, down = splits[key]
    return down if part == "down" else up
