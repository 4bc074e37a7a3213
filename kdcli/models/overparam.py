"""Over-parameterising a model's block matrices, and contracting them again (OPDF, arXiv 2411.06448)."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kdcli.errors import InputError
from kdcli.models.blocks import BlockMatrix, block_matrix, blocks_of, iter_block_matrices
from kdcli.models.counts import count_parameters
from kdcli.models.factoring import check_factors, is_target, nearest_ranks, shape_for
from kdcli.models.factoriser import Factoriser
from kdcli.models.families import family_of
from kdcli.models.fused import make_layers, merge_split
from kdcli.models.lowrank import LowRankLinear
from kdcli.models.shape import need_blocks
from kdcli.recipe.schema import OverparamSection
from kdcli.signals import MatrixKey
from kdcli.tensors.factors import MPOShape
from kdcli.tensors.mpo import auxiliary_indices, central_index, decompose

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from kdcli.models.probe import probe
from kdcli.tensors.parametrization import MPOWeight, chain_of, is_overparameterised, plain_weight, tensors_of


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


@dataclass
class ContractReport:
    """What was contracted, and how far the logits of a probe batch moved; None when it was not measured."""

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


@dataclass(frozen=True)
class _Place:
    """Where a chain can stand: behind a block matrix, or behind the "down" or "up" factor of a low-rank one."""

    key: MatrixKey
    matrix: BlockMatrix
    factor: str = ""

    @property
    def name(self) -> str:
        return f"{self.key[0]}.{self.key[1]}"

    @property
    def whole(self) -> MatrixKey:
        """The block matrix that this is, or is a factor of."""
        return self.key[0], self.matrix.name

    @property
    def layer(self) -> nn.Linear:
        """The layer with the weight; a fused one while the matrix is a share of it."""
        module = self.matrix.module
        return getattr(module, self.factor) if self.factor else module  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        return self.layer.weight if self.factor else self.matrix.weight

    def alone(self) -> nn.Linear:
        """Return a layer for this weight alone, which takes its share of a fused module where there is one."""
        if self.matrix.is_view:
            self.matrix.replace(self.matrix.linear())
        return self.layer


def _places(model: "PreTrainedModel") -> Iterator[_Place]:
    for (layer, name), matrix in iter_block_matrices(model):
        if isinstance(matrix.module, LowRankLinear):
            for factor in ("down", "up"):
                yield _Place((layer, f"{name}.{factor}"), matrix, factor)
        elif isinstance(matrix.module, nn.Linear) or matrix.is_view:
            yield _Place((layer, name), matrix)


def linears_of(model: "PreTrainedModel") -> Iterator[tuple[MatrixKey, nn.Linear]]:
    """Yield every linear layer in the place of a block matrix; a factored one gives "name.down", "name.up".

    A share of a fused module, or a transposed one, is no layer of its own and has no chain: it is left out.
    """
    return ((place.key, place.layer) for place in _places(model) if not place.matrix.is_view)


def _attach(linear: nn.Linear, weight: MPOWeight, *, blank: bool = False) -> None:
    """Put a chain behind a layer's weight: of equal value, or (blank) of zeros, without any decomposition."""
    weight.blank = blank
    parametrize.register_parametrization(linear, "weight", weight, unsafe=True)
    weight.blank = False


def _share(linear: nn.Linear, source: nn.Module) -> None:
    """Put the very chain of `source` behind a layer's weight, as the two shared one weight before."""
    chain = chain_of(source)
    assert chain is not None
    _attach(linear, MPOWeight(chain.shape, chain.gauge, chain.svd_dtype), blank=True)
    linear.parametrizations["weight"] = source.parametrizations["weight"]  # type: ignore[index, operator, union-attr]


def _holders(model: nn.Module) -> dict[int, set[int]]:
    """Return for every parameter (by its id) the modules (by theirs) that hold it."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    return holders


def _wanted(model: "PreTrainedModel", section: OverparamSection) -> tuple[list[tuple[_Place, MPOShape]], list[str]]:
    """Return the places that `section` names with their factor lists, and those that it cannot have.

    Raises InputError when it cannot have any.
    """
    check_factors(section)
    unseen = family_of(model.config).outputs_only is not None
    for name in ("layers", "targets") if unseen else ():
        if getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True):
            need_blocks(family_of(model.config), f"overparam.{name}", f"overparam.{name}", "leave it out")
    if section.layers is not None and (family := family_of(model.config)).repeated:
        raise InputError(
            f"the blocks of {family.title} are one, run again and again, so none can be left out",
            where="overparam.layers",
            hint="leave it out",
        )
    depth = 0 if unseen else len(blocks_of(model))
    if wrong := sorted(layer for layer in section.layers or [] if layer >= depth):
        raise InputError(f"the student has blocks 0 to {depth - 1}, not {wrong[0]}", where="overparam.layers")
    wanted, skipped = [], []
    unfit: set[int] = set()
    for place in _places(model):
        if not unseen and not is_target(place.key[0], place.matrix.name, section):
            continue
        out_features, in_features = place.weight.shape
        try:
            shape = shape_for(out_features, in_features, section)
        except InputError as error:
            # A checkpoint's ranks were chosen without a thought of chains, and may be prime; so may unseen widths.
            if not place.factor and not unseen:
                raise
            if place.factor:
                unfit.add(out_features if place.factor == "down" else in_features)
            skipped.append(f"{place.name} ({error.message})")
            continue
        wanted.append((place, shape))
    if not wanted:
        hint = None
        if unfit:
            rank = min(unfit)
            near = " and ".join(map(str, nearest_ranks(rank, section)))
            hint = (
                f"rank {rank} cannot be split into two factors of similar size; the nearest ranks that can are {near}"
            )
        raise InputError("no matrix is left to over-parameterise", where="overparam", hint=hint)
    sizes = {str(size) for _, shape in wanted for size in shape.matrix}
    unused = sorted(set(section.factors or {}) - sizes)
    if unused and section.aux_mismatch == "skip":
        raise InputError(
            f"no matrix has a side of {unused[0]}; there are {', '.join(sorted(sizes, key=int)) or 'none'}",
            where=f"overparam.factors.{unused[0]}",
        )
    return wanted, skipped


def check_chains(
    student: "PreTrainedModel",
    section: OverparamSection,
    teacher: "PreTrainedModel",
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Raise InputError for blocks and factors that do not fit, and when no teacher tensors could be compared with them.

    pairs: (student block, teacher block), counted from 1. Looks at shapes, never at weights.
    """
    wanted, _ = _wanted(student, section)
    count = len({place.whole for place, _ in wanted})
    if section.matrices is not None and section.matrices > count:
        raise InputError(
            f"{section.matrices} matrices cannot be selected: {count} of the student can be chains",
            where="overparam.matrices",
            hint=f'use up to {count}; overparam.select = "all" takes all',
        )
    if section.aux_weight > 0 and not _comparable(wanted, section, teacher, dict(pairs)):
        raise InputError(
            "overparam.aux_weight is above 0, but no matrix of the student has a teacher matrix of its shape",
            where="overparam.aux_weight",
            hint='set aux_weight = 0, or aux_mismatch = "truncate"',
        )


def _comparable(
    wanted: list[tuple[_Place, MPOShape]], section: OverparamSection, teacher: "PreTrainedModel", blocks: dict[int, int]
) -> bool:
    """True when some chain has teacher tensors beside it, as `teacher_factors` finds them."""
    for place, shape in wanted:
        if place.key[0] not in blocks:
            continue
        if place.factor:
            # A teacher's matrix is split at the student's rank, so that its factors have the same shapes.
            return True
        weight = _teacher_weight(teacher, blocks[place.key[0]], place.matrix.name, "", 0, Factoriser())
        if weight is not None and _teacher_shape(weight, shape, section) is not None:
            return True
    return False


def candidates(model: "PreTrainedModel", section: OverparamSection) -> dict[MatrixKey, list[Tensor]]:
    """Return the plain weights that `section` allows chains for by block matrix: of a low-rank one both its factors."""
    found: dict[MatrixKey, list[Tensor]] = {}
    for place, _ in _wanted(model, section)[0]:
        if chain_of(place.layer) is None:
            found.setdefault(place.whole, []).append(place.weight)
    return found


def lengths_of(model: "PreTrainedModel", section: OverparamSection) -> set[int]:
    """Return the lengths of all chains that `section` allows a model, whether they are there or not."""
    return {shape.length for _, shape in _wanted(model, section)[0]}


def overparameterise(
    model: "PreTrainedModel", section: OverparamSection, chosen: Collection[MatrixKey] | None = None
) -> OverparamReport:
    """Put chains in place of the block matrices that `section` names, in place; the function is unchanged.

    chosen: of these matrices, those that get one; left out, all.
    A weight that several of these layers share becomes one chain that they share; one that is shared with
    another part of the model stays dense, and so do low-rank factors of a rank without fitting factors.
    Raises InputError, with the model untouched, when it is over-parameterised already, when a dimension has
    no factors, or when nothing is left to do.
    """
    if is_overparameterised(model):
        raise InputError("the model is over-parameterised already", hint="contract it first")
    before = count_parameters(model)
    skipped = add_chains(model, section, chosen)
    rows = chain_rows(model)
    if not rows:
        raise InputError(
            "no matrix is left to over-parameterise",
            where="overparam",
            hint=f"left out: {'; '.join(skipped[:3])}" if skipped else None,
        )
    return OverparamReport(rows, before, count_parameters(model), skipped)


def add_chains(
    model: "PreTrainedModel", section: OverparamSection, chosen: Collection[MatrixKey] | None = None
) -> list[str]:
    """Put chains in place of plain block matrices, beside those that are there; return what stays plain, with why."""
    wanted, skipped = _wanted(model, section)
    if chosen is not None:
        wanted = [(place, shape) for place, shape in wanted if place.whole in chosen]
    holders = _holders(model)
    # As they are before any fused module is split.
    layers = [place.layer for place, _ in wanted]
    weights = [layer.weight for layer in layers]
    ours = {id(layer) for layer, (place, _) in zip(layers, wanted, strict=True) if not place.matrix.is_view}
    first: dict[int, _Place] = {}
    for (place, shape), layer, weight in zip(wanted, layers, weights, strict=True):
        if holders[id(weight)] - ours - {id(layer)}:
            skipped.append(f"{place.name} (shared with another part of the model)")
        elif id(weight) in first:
            source = first[id(weight)]
            if layer is not source.layer:
                _share(layer, source.layer)
            skipped.append(f"{place.name} (shares the chain of {source.name})")
        else:
            alone = place.alone()
            if alone is layer:
                first[id(weight)] = place
            _attach(alone, MPOWeight(shape, section.gauge, section.svd_dtype))
            if section.train == "auxiliary":
                tensors_of(alone)[central_index(len(shape))].requires_grad_(False)
    return skipped


def chain_rows(model: "PreTrainedModel") -> list[MatrixReport]:
    """Return a row for every chain in the blocks of a model; one that several layers share counts once."""
    rows: dict[int, MatrixReport] = {}
    for (layer, name), linear in linears_of(model):
        if (chain := chain_of(linear)) is not None:
            shape = chain.shape
            row = MatrixReport(
                block=layer,
                matrix=name,
                shape=shape.matrix,
                out_factors=shape.out_factors,
                in_factors=shape.in_factors,
                bonds=shape.bond_dims(),
                dense=math.prod(shape.matrix),
                chain=shape.parameter_count(),
            )
            rows.setdefault(id(chain), row)
    return list(rows.values())


def count_chained(rows: Sequence[MatrixReport]) -> int:
    """Return the number of block matrices that have chains: two factors of a low-rank one count as one."""
    return len({(row.block, row.matrix.partition(".")[0]) for row in rows})


def contract_model(model: "PreTrainedModel", *, check: bool = True) -> ContractReport:
    """Multiply every chain back into its layer's plain weight, in place; a dense model stays as it is.

    The report holds the largest change of the logits on a probe batch.
    """
    before = count_parameters(model)
    chained = [(path, module) for path, module in model.named_modules() if chain_of(module) is not None]
    names = {id(linear): f"{layer}.{name}" for (layer, name), linear in linears_of(model)}
    reference = probe(model) if check else None
    rows = []
    plain: dict[int, nn.Parameter] = {}
    for path, module in chained:
        chain = chain_of(module)
        assert chain is not None
        shape = chain.shape
        rows.append(
            {
                "matrix": path,
                "name": names.get(id(module), path),
                "shape": shape.matrix,
                "out_factors": shape.out_factors,
                "in_factors": shape.in_factors,
                "bonds": shape.bond_dims(),
                "chain": shape.parameter_count(),
                "dense": math.prod(shape.matrix),
            }
        )
        # Layers that shared a chain share the plain weight again.
        plain[id(chain)] = plain_weight(module, plain.get(id(chain)))
    merge_split(model)
    difference = None
    if reference is not None:
        difference = float((probe(model) - reference).abs().max())
    return ContractReport(rows, before, count_parameters(model), difference)


def overparam_state(model: nn.Module) -> dict[str, Any]:
    """Return the factor lists of every chain by the layer's path, as JSON-able data.

    A layer that shares another's chain has that one's path under "same_as".
    """
    state: dict[str, Any] = {}
    paths: dict[int, str] = {}
    for path, module in model.named_modules():
        chain = chain_of(module)
        if chain is None:
            continue
        if id(chain) in paths:
            state[path] = {"same_as": paths[id(chain)]}
            continue
        paths[id(chain)] = path
        state[path] = {
            "out_factors": list(chain.shape.out_factors),
            "in_factors": list(chain.shape.in_factors),
            "gauge": chain.gauge,
        }
    return state


def restore_overparam(model: "PreTrainedModel", state: dict[str, Any]) -> None:
    """Give `model` the chains that `overparam_state` described; loading their values is for the caller.

    Raises ValueError when the description does not fit the model.
    """
    make_layers(model, state)
    for path, entry in state.items():
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{path} is no linear layer, so it has no chain")
        if "same_as" in entry:
            _share(linear, model.get_submodule(entry["same_as"]))
            continue
        shape = MPOShape(tuple(entry["out_factors"]), tuple(entry["in_factors"]))
        if shape.matrix != (linear.out_features, linear.in_features):
            raise ValueError(f"the chain of {path} does not fit its layer")
        _attach(linear, MPOWeight(shape, entry.get("gauge", "symmetric")), blank=True)


def set_chains(model: "PreTrainedModel", state: dict[str, Any]) -> None:
    """Give `model` the chains that `overparam_state` described, and no others; loading values is for the caller."""
    if overparam_state(model) != state:
        contract_model(model, check=False)
        restore_overparam(model, state)


def teacher_factors(
    teacher: "PreTrainedModel",
    student: "PreTrainedModel",
    pairs: Sequence[tuple[int, int]],
    section: OverparamSection,
    factoriser: Factoriser | None = None,
) -> tuple[dict[MatrixKey, tuple[Tensor, ...]], list[str]]:
    """Return the teacher's tensors for each of the student's chains, and the names of those without.

    pairs: (student block, teacher block), counted from 1. The teacher's matrix is decomposed with the student's factor
    lists; a student's low-rank factors are paired with the factors of the same rank that `factoriser` (left out:
    the SVD) chooses for the teacher's matrix. A matrix of another shape is skipped, or with `aux_mismatch =
    "truncate"` decomposed with factor lists of its own, of which only tensors with the student's i_k and j_k are
    compared, on leading sub-blocks.
    """
    blocks = dict(pairs)
    dtype = getattr(torch, section.svd_dtype)
    found: dict[MatrixKey, tuple[Tensor, ...]] = {}
    skipped = []
    factoriser = factoriser or Factoriser()
    for (layer, name), linear in linears_of(student):
        chain = chain_of(linear)
        if chain is None:
            continue
        matrix, _, factor = name.partition(".")
        rank = linear.out_features if factor == "down" else linear.in_features
        weight = _teacher_weight(teacher, blocks.get(layer), matrix, factor, rank, factoriser)
        shape = _teacher_shape(weight, chain.shape, section) if weight is not None else None
        if weight is None or shape is None:
            skipped.append(f"{layer}.{name}")
            continue
        found[(layer, name)] = decompose(weight.detach(), shape, gauge=section.gauge, dtype=dtype)
    return found, skipped


def _teacher_shape(weight: Tensor, student: MPOShape, section: OverparamSection) -> MPOShape | None:
    """Return the factor lists for a teacher's matrix beside a student's chain; None when nothing compares."""
    if tuple(weight.shape) == student.matrix:
        return student
    if section.aux_mismatch == "skip":
        return None
    try:
        shape = shape_for(weight.shape[0], weight.shape[1], section)
    except InputError:
        return None
    if len(shape) != len(student):
        return None
    places = auxiliary_indices(len(shape))
    alike = [
        k
        for k in places
        if (shape.out_factors[k], shape.in_factors[k]) == (student.out_factors[k], student.in_factors[k])
    ]
    return shape if alike else None


def _teacher_weight(
    teacher: "PreTrainedModel",
    layer: int | None,
    matrix: str,
    factor: str,
    rank: int,
    factoriser: Factoriser,
) -> Tensor | None:
    """Return the teacher's matrix, or the factor of it that has the student's rank; None where there is none."""
    if layer is None:
        return None
    if family_of(teacher.config).outputs_only is not None:
        unseen = dict(iter_block_matrices(teacher)).get((layer, matrix))
        if unseen is None:
            return None
        found = unseen
    elif matrix in family_of(teacher.config).matrices:
        found = block_matrix(teacher, layer, matrix)
    else:
        return None
    module = found.module
    if not factor:
        return module.merged().weight if isinstance(module, LowRankLinear) else found.weight
    if isinstance(module, LowRankLinear):
        return getattr(module, factor).weight
    if rank > min(found.weight.shape):
        return None
    up, down = factoriser.factors((layer, matrix), found.linear(), rank)  # type: ignore[arg-type]
    return down if factor == "down" else up
