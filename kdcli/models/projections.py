"""Width students whose weights are trained projections of the teacher's (idea: Low-Rank Clone, arXiv 2505.12781).

While it is trained, every block matrix of such a student is write^T W read with the teacher's matrix W, and its table
of words is E read with the teacher's table E; norms, biases and all other weights are trained themselves.
`merge` makes a plain model of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcli.models.blocks import (
    BlockMatrix,
    block_matrix,
    block_of,
    blocks_of,
    blocks_prefix,
    by_row,
    module_at,
    query_factor,
    scale_of,
)
from kdcli.models.families import Family, family_of
from kdcli.models.fused import merge_split
from kdcli.models.inputs import model_inputs
from kdcli.models.shape import ModelShape, shape_of
from kdcli.models.width import head_features
from kdcli.signals import EMBEDDINGS, MatrixKey
from kdcli.tensors.projection import (
    Moment,
    ProjectedWeight,
    attach,
    directions,
    fitted_norm,
    merge_projections,
    projected_of,
    reading,
    selection,
    share,
    side_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Moments = Mapping[str, Moment]
"""By the paths of a teacher's modules: of what a linear map reads, and of what a norm gives."""


@torch.no_grad()
def moments_of(teacher: "PreTrainedModel", batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Moment]:
    """Return the moments of a teacher's vectors at the real tokens of `batches`, on the CPU, in one pass over them."""
    found: dict[str, Moment] = {}
    mask: Tensor | None = None

    def add(path: str, vectors: Tensor) -> None:
        vectors = by_row(vectors, mask)
        real = vectors[mask] if mask is not None and vectors.shape[:-1] == mask.shape else vectors.flatten(0, -2)
        found.setdefault(path, Moment()).add(real)

    hooks = []
    readers = {block_matrix(teacher, *key).module for key in _keys(teacher)} | _head_maps(teacher)
    for path, module in teacher.named_modules():
        if module in readers:
            hooks.append(module.register_forward_pre_hook(lambda _, given, path=path: add(path, given[0])))  # type: ignore[misc]
        elif _is_norm(module):
            hooks.append(module.register_forward_hook(lambda _, given, output, path=path: add(path, output)))  # type: ignore[misc]
    training = teacher.training
    teacher.eval()
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            teacher(**model_inputs(teacher, batch))
    finally:
        teacher.train(training)
        for hook in hooks:
            hook.remove()
    return {path: moment.cpu() for path, moment in found.items()}


@dataclass(frozen=True)
class _Inner:
    """The spaces inside a block, by what is in them; ffn: what the feed-forward layer's second map reads.

    query, key: with a factor by which scores over sqrt(head size) keep their size. value, context: values, and what
    the attention makes of them, a head of queries each.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    context: Tensor
    ffn: Tensor


class _Projection:
    """The spaces of a student beside its teacher's weights, and the weights that follow from them."""

    def __init__(self, teacher: "PreTrainedModel", student: "PreTrainedModel", kept: Sequence[int], moments: Moments):
        self.teacher, self.student, self.kept, self.moments = teacher, student, kept, moments
        self.family: Family = family_of(teacher.config)
        self.sizes: tuple[ModelShape, ModelShape] = (shape_of(teacher.config), shape_of(student.config))
        self.widths = self.sizes[0].hidden, self.sizes[1].hidden
        self.paths = {module: path for path, module in teacher.named_modules()}
        self.modules = dict(teacher.named_modules())
        self.hidden = self._hidden()
        self.heads = self._common_heads() if self.family.attention == "relative-bias" else None

    def _hidden(self) -> Tensor:
        """Return the space of the hidden states: the principal directions of all that norms give and the head reads.

        What the head reads counts by itself, as it may be few of the tokens.
        """
        heads, spreads = _head_maps(self.teacher), []
        for module in self.teacher.modules():
            found = self.moments.get(self.paths[module])
            if (_is_norm(module) or module in heads) and found is not None and len(found.mean) == self.widths[0]:
                spread = found.spread(getattr(module, "bias", None) is not None)
                spreads.append(spread / spread.trace().clamp(min=1e-12))
        total = torch.stack(spreads).sum(0) if spreads else torch.eye(self.widths[0], dtype=torch.float64)
        return directions(total, self.widths[1])

    def matrix(self, layer: int, name: str) -> BlockMatrix:
        """Return the teacher's matrix that block `layer` (1..) of the student follows."""
        return block_matrix(self.teacher, self.kept[layer - 1] + 1, name)

    def weight(self, layer: int, name: str) -> Tensor:
        """Return that matrix, (out, in), in fp64, times what multiplies its output."""
        return self._scaled(layer, name, self.matrix(layer, name).weight).double()

    def bias(self, layer: int, name: str) -> Tensor:
        """Return its bias, (out,), in fp64, times the same."""
        matrix = self.matrix(layer, name)
        return self._scaled(layer, name, matrix.of(matrix.module.bias)).double()  # type: ignore[arg-type]

    def _scaled(self, layer: int, name: str, tensor: Tensor) -> Tensor:
        block = block_of(self.teacher, self.kept[layer - 1] + 1)
        scale = scale_of(block, self.family.scales.get(name))
        return tensor.detach() if scale is None else tensor.detach() * scale.detach().view(-1, *[1] * (tensor.ndim - 1))

    def input(self, layer: int, name: str) -> Moment:
        """Return the moments of what that matrix reads."""
        return self.moments[self.paths[self.matrix(layer, name).module]]

    def _head_scores(self, layer: int) -> Tensor:
        """Return (heads,): how much each head of a block adds to the variance of the attention's output."""
        weight, spread = self.weight(layer, "attention_output"), self.input(layer, "attention_output").covariance
        size = self.sizes[0].head
        own = [slice(h * size, (h + 1) * size) for h in range(self.sizes[0].heads)]
        alone = [(weight[:, part] @ spread[part, part] * weight[:, part]).sum() for part in own]
        return torch.stack(alone)

    def _common_heads(self) -> list[int]:
        """Return the heads of all blocks, where blocks share a table with a column a head."""
        scores = torch.stack([self._head_scores(layer) for layer in range(1, len(blocks_of(self.student)) + 1)])
        return self._best((scores / scores.sum(1, keepdim=True)).sum(0), self.sizes[1].heads)

    @staticmethod
    def _best(scores: Tensor, count: int) -> list[int]:
        return sorted(scores.topk(count).indices.tolist())

    def inner(self, layer: int) -> _Inner:
        """Return the spaces inside block `layer` (1..) of the student."""
        teacher, student = self.sizes
        context, active = self.input(layer, "attention_output"), self.input(layer, "ffn_out")
        spaces = [
            torch.zeros(given * teacher.head, own * student.head, dtype=torch.float64)
            for given, own in ((teacher.heads, student.heads), (teacher.kv_heads, student.kv_heads))
            for _ in range(2)
        ]
        query, attended, key, value = spaces
        queries, keys = (self._output(layer, name) for name in ("query", "key"))
        spread = context.spread(self._biased(layer, "attention_output"))
        place = 0
        for group, (shared, heads) in enumerate(self._groups(layer)):
            keys_of = _block(shared, teacher.head), _block(group, student.head)
            blocks = [_block(head, teacher.head) for head in heads]
            both = [_share(keys, keys_of[0]), *(_share(queries, own) for own in blocks)]
            score = self._score_space(torch.stack(both).sum(0))
            # A head's values are what it attends to: one space for all heads that share them.
            seen = directions(torch.stack([spread[own, own] for own in blocks]).sum(0), student.head)
            key[keys_of], value[keys_of] = score, seen
            for own in blocks:
                at = own, _block(place, student.head)
                query[at], attended[at] = score, seen
                place += 1
        keeps = (student.head / teacher.head) ** 0.25
        worth = active.covariance.diagonal() * self.weight(layer, "ffn_out").square().sum(0)
        ffn = selection(len(worth), self._best(worth, student.intermediate))
        return _Inner(query * keeps, key * keeps, value, attended, ffn)

    def _groups(self, layer: int) -> list[tuple[int, list[int]]]:
        """Return the heads of keys and values that are kept, each with the heads of queries that share it and are."""
        teacher, student = self.sizes
        if self.heads is not None:
            return [(head, [head]) for head in self.heads]
        scores = self._head_scores(layer).unflatten(0, (teacher.kv_heads, -1))
        best = scores.topk(student.heads // student.kv_heads, dim=1)
        kept = self._best(best.values.sum(1), student.kv_heads)
        return [(one, sorted((one * scores.shape[1] + best.indices[one]).tolist())) for one in kept]

    def _score_space(self, spread: Tensor) -> Tensor:
        """Return the space of a head of queries, and of the keys that it is compared with; spread: of both."""
        teacher, student = (shape.head for shape in self.sizes)
        if not self.family.rotary:
            return directions(spread, student)
        return selection(teacher, [given for _, given in self._features()])

    def _features(self) -> list[tuple[int, int]]:
        return sorted(head_features(self.teacher.config, self.sizes[1].head))

    def _biased(self, layer: int, name: str) -> bool:
        return self.matrix(layer, name).module.bias is not None

    def _output(self, layer: int, name: str) -> Tensor:
        """Return E[y y^T] of a block matrix's output y = W x + b."""
        weight, given = self.weight(layer, name), self.input(layer, name)
        second, shift = weight @ given.second @ weight.T, weight @ given.mean
        if not self._biased(layer, name):
            return second
        bias = self.bias(layer, name)
        return second + torch.outer(shift, bias) + torch.outer(bias, shift) + torch.outer(bias, bias)

    def fill(self) -> None:
        """Give every parameter of the student outside its block matrices the value that follows from the spaces."""
        prefix, family = blocks_prefix(self.student), self.family
        matrices = {matrix.path for matrix in family.matrices.values()}
        inner = [self.inner(layer) for layer in range(1, len(blocks_of(self.student)) + 1)]
        for path, module in self.student.named_modules():
            inside, origin, number = "", path, 0
            if path.startswith(prefix):
                number, _, inside = path[len(prefix) :].partition(".")
                number = int(number)
                origin = f"{prefix}{number if family.repeated else self.kept[number]}{'.' * bool(inside)}{inside}"
            if inside in matrices or origin not in self.modules:
                continue
            source = self.modules[origin]
            if _is_norm(module):
                self._fill_norm(module, source, origin)
                continue
            # Maps beside the queries and keys that the table does not name make queries and keys of positions.
            score = inside.startswith(f"{family.attention_module}.") and isinstance(module, nn.Linear)
            for name, parameter in module.named_parameters(recurse=False):
                if f"{inside}.{name}".removeprefix(".") in family.scales.values():
                    # It is part of the matrix whose output it multiplies.
                    nn.init.ones_(parameter)
                    continue
                value = getattr(source, name).detach().double()
                if name == "bias" and origin in self.moments:
                    value += self._missing(source, origin)
                for axis in range(value.ndim):
                    bare = name not in ("weight", "bias") and axis < value.ndim - 1
                    space = None if bare else self._space(module, axis, value.shape[axis], parameter.shape[axis])
                    if score and axis == 0:
                        space = inner[number].query
                    if axis == 1 and space is not None and origin in self.moments:
                        space = reading(self._spread(source, origin), space)
                    if space is not None:
                        value = torch.tensordot(value, space, dims=([axis], [0])).movedim(-1, axis)
                _set(parameter, value)
            for name, buffer in module.named_buffers(recurse=False):
                if (given := getattr(source, name, None)) is not None and given.shape == buffer.shape:
                    buffer.copy_(given)
        for layer, spaces in enumerate(inner, 1):
            self._fill_block(layer, spaces)
        self._fill_embeddings()

    def _spread(self, source: nn.Module, origin: str) -> Tensor:
        return self.moments[origin].spread(getattr(source, "bias", None) is not None)

    def _missing(self, source: Any, origin: str) -> Tensor:
        """Return what the mean of an input adds to a map's output beside what the student's input tells of it."""
        given = self.moments[origin]
        if len(given.mean) != self.widths[0]:
            return torch.zeros((), dtype=torch.float64)
        read = reading(self._spread(source, origin), self.hidden)
        return source.weight.detach().double() @ (given.mean - read @ (self.hidden.T @ given.mean))

    def _space(self, module: nn.Module, axis: int, teacher: int, student: int) -> Tensor | None:
        """Return the space of an axis of a weight outside of norms and block matrices; None where it stays."""
        if (isinstance(module, nn.Embedding) and axis == 0) or (isinstance(module, nn.Conv2d) and axis > 0):
            return None
        if (teacher, student) == self.widths:
            return self.hidden
        times = teacher // self.widths[0]
        if isinstance(module, nn.Linear) and (teacher, student) == (times * self.widths[0], times * self.widths[1]):
            # A head may read several vectors at once.
            return torch.block_diag(*[self.hidden] * times)
        if self.heads is not None and (teacher, student) == (self.sizes[0].heads, self.sizes[1].heads):
            return selection(teacher, self.heads)
        return None

    def _fill_norm(self, module: nn.Module, source: nn.Module, origin: str) -> None:
        gain, bias = (
            None if (one := getattr(source, name, None)) is None else one.detach().double()
            for name in ("weight", "bias")
        )
        assert gain is not None
        if len(gain) != self.widths[0] or len(module.weight) != self.widths[1]:  # type: ignore[arg-type]
            fitted = gain, bias
            if len(module.weight) != len(gain):  # type: ignore[arg-type]
                # A norm of each head keeps the size of its vectors, whatever the projections are.
                kept = [given for _, given in self._features()]
                keeps = (self.sizes[0].head / self.sizes[1].head) ** 0.25
                fitted = gain[kept] * keeps, None if bias is None else bias[kept] * keeps
        else:
            centres = isinstance(source, nn.LayerNorm)
            fitted = fitted_norm(gain, bias, self.moments.get(origin), self.hidden, centres=centres)
        for name, value in zip(("weight", "bias"), fitted, strict=True):
            if value is not None:
                _set(getattr(module, name), value)

    def _fill_block(self, layer: int, inner: _Inner) -> None:
        """Put projections behind the matrices of a block, and give it the biases that fit them."""
        factor = query_factor(self.student.config, layer, self.kept[layer - 1] + 1)
        spaces = {
            "query": (inner.query * factor, self.hidden),
            "key": (inner.key, self.hidden),
            "value": (inner.value, self.hidden),
            "attention_output": (self.hidden, inner.context),
            "ffn_in": (inner.ffn, self.hidden),
            "ffn_gate": (inner.ffn, self.hidden),
            "ffn_out": (self.hidden, inner.ffn),
        }
        for path in dict.fromkeys(matrix.path for matrix in self.family.matrices.values()):
            names = self.family.parts_of(path)
            parts = [block_matrix(self.student, layer, name) for name in names]
            if parts[0].is_view and not _has_equal_shares(parts[0]):
                for part in parts:
                    part.replace(part.linear())
                for name in names:
                    self._fill_module(layer, [name], spaces)
            else:
                self._fill_module(layer, names, spaces)

    def _fill_module(self, layer: int, names: list[str], spaces: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Do so for the matrices that one module of the student gives, in the order of its output."""
        own: Any = block_matrix(self.student, layer, names[0]).module
        space, given, biased = spaces[names[0]][1], self.input(layer, names[0]), self._biased(layer, names[0])
        read = reading(given.spread(biased), space)
        writes = [spaces[name][0] for name in names]
        weight = torch.cat([self._scaled(layer, name, self.matrix(layer, name).weight) for name in names])
        attach(own, ProjectedWeight(weight, write=torch.cat(writes), read=read, parts=len(names)))
        if biased:
            # Of what the student's input cannot say of the teacher's, the mean is known.
            missing = given.mean - read @ (space.T @ given.mean)
            found = []
            for name, write in zip(names, writes, strict=True):
                found.append(write.T @ (self.bias(layer, name) + self.weight(layer, name) @ missing))
            _set(own.bias, torch.cat(found))

    def _fill_embeddings(self) -> None:
        """Put a projection behind the word embeddings, or behind the map after them where they are narrower."""
        tables: list[Any] = [module_at(model, self.family.word_embeddings) for model in (self.teacher, self.student)]
        maps: list[Any] = [module_at(model, self.family.projection) for model in (self.teacher, self.student)]
        if maps[0] is not None and maps[1] is not None:
            weight = maps[0].weight.detach()
            alike = weight.shape[1] == maps[1].weight.shape[1]
            attach(maps[1], ProjectedWeight(weight, write=self.hidden, read=None if alike else self.hidden))
        elif tables[0] is not None and tables[1] is not None:
            weight, plain = tables[0].weight.detach(), tables[1].weight
            tied = [module for module in self.student.modules() if module._parameters.get("weight") is plain]
            attach(tables[1], ProjectedWeight(weight, write=None, read=self.hidden))
            for module in tied:
                if module is not tables[1]:
                    share(module, tables[1])


@torch.no_grad()
def project(teacher: "PreTrainedModel", student: "PreTrainedModel", kept: Sequence[int], moments: Moments) -> None:
    """Make a width student of projections of its teacher's weights, in place. The teacher is not changed.

    kept: the teacher's block, from 0, that each block of the student follows. The space of the hidden states are the
    principal directions of the teacher's; of heads and of the feed-forward layer's features those are kept that add the
    most to their block's output, and what is read is reconstructed from what is left by least squares.
    """
    _Projection(teacher, student, kept, moments).fill()


def projections_of(model: "PreTrainedModel", keys: Iterable[MatrixKey]) -> dict[MatrixKey, Tensor]:
    """Return for outputs of a student of projections (teacher's width, its own): a teacher's output times it compares.

    keys: of block matrices; (0, EMBEDDINGS) is the embedding output. Those without projections are left out.
    """
    family, found = family_of(model.config), {}
    for layer, name in keys:
        if name == EMBEDDINGS:
            after, table = module_at(model, family.projection), module_at(model, family.word_embeddings)
            side = (
                side_of(after, "write") if after is not None else side_of(table, "read") if table is not None else None
            )
        else:
            matrix = block_matrix(model, layer, name)
            side = side_of(matrix.module, "write")
            if side is not None and matrix.is_fused:
                side = side.chunk(len(matrix.names))[matrix.names.index(name)]
        if side is not None:
            found[(layer, name)] = side
    return found


def is_projected(model: nn.Module) -> bool:
    """True when some layer's weight is a projection of a teacher's."""
    return any(projected_of(module) is not None for module in model.modules())


def _head_maps(model: "PreTrainedModel") -> set[nn.Module]:
    """Return the linear maps outside the blocks that read vectors as wide as the hidden states; none with a table."""
    width, inside = shape_of(model.config).hidden, set(blocks_of(model).modules())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    maps = (module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside)
    return {module for module in maps if module.in_features == width and id(module.weight) not in tables}


def _keys(model: "PreTrainedModel") -> list[MatrixKey]:
    layers = range(1, len(blocks_of(model)) + 1)
    return [(layer, name) for layer in layers for name in family_of(model.config).matrices]


def _is_norm(module: nn.Module) -> bool:
    """True for a norm over features: the only modules whose weight has one axis."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


def _block(number: int, size: int) -> slice:
    return slice(number * size, (number + 1) * size)


def _share(spread: Tensor, own: slice) -> Tensor:
    """Return the part of moments that is of some features, over its trace."""
    part = spread[own, own]
    return part / part.trace().clamp(min=1e-12)


def _has_equal_shares(matrix: BlockMatrix) -> bool:
    """True for a fused module whose maps are side by side and equally wide, as projections of a whole module are."""
    layout = matrix.layout
    return not matrix.transposed and (layout is None or (layout.heads == 1 and len(set(layout.widths)) == 1))


def merge(model: "PreTrainedModel") -> int:
    """Multiply all projections of a model into plain weights, in place, and return how many layers had some."""
    count = merge_projections(model)
    merge_split(model)
    return count


def _set(parameter: Tensor, value: Tensor) -> None:
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter.copy_(value)
