"""Width students: their sizes, and what they have of their teacher's weights where they start from slices of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdcli.errors import InputError
from kdcli.models.blocks import block_matrix, blocks_prefix, scale_queries
from kdcli.models.families import Family, family_of
from kdcli.models.fused import weight_of
from kdcli.models.shape import ModelShape, ffn_ratio, ffn_width, shape_of
from kdcli.models.sizes import check_heads
from kdcli.recipe.schema import StudentSection
from kdcli.words import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Places = tuple[Tensor, Tensor]
"""(n,) each: features of the student, and those of the teacher that they start from."""


def width_shape(teacher: ModelShape, family: Family, section: StudentSection) -> ModelShape:
    """Return the sizes of a width student. Raises InputError where they do not fit each other.

    Heads are hidden / heads wide where the teacher's are, and else as wide as the teacher's. Without a number of
    their own, heads of keys and values are as many in proportion to those of queries as the teacher has.
    """
    hidden, apart = section.hidden_size or teacher.hidden, teacher.heads * teacher.head != teacher.hidden
    if apart:
        usual = max(1, round(teacher.heads * hidden / teacher.hidden))
    else:
        usual = hidden // teacher.head if hidden % teacher.head == 0 else teacher.heads
    heads = section.heads or usual
    if hidden % heads:
        raise InputError(
            f"hidden_size {hidden} is not divisible by {heads} heads",
            where="student.heads",
            hint=f"use {counted(_nearest(hidden, heads), 'head')}",
        )
    head = teacher.head if apart else hidden // heads
    check_heads(family, head * heads, heads, "student.heads")
    layers = section.layers if section.layers is not None else teacher.layers
    if isinstance(layers, list):
        raise InputError("a width student takes a number of layers, not a list", where="student.layers")
    intermediate = section.intermediate_size or round(teacher.intermediate * hidden / teacher.hidden)
    if family.sizes.ratio is not None:
        intermediate = _of_ratio(teacher, family, hidden, section.intermediate_size)
    return replace(
        teacher,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(teacher, family, section, heads),
        head=head,
        intermediate=intermediate,
    )


def _of_ratio(teacher: ModelShape, family: Family, hidden: int, wanted: int | None) -> int:
    """Return the feed-forward width where a family has whole numbers of hidden sizes."""
    names = family.sizes
    if wanted is None:
        return ffn_width(names, hidden, ffn_ratio(names, teacher.hidden, teacher.intermediate))
    nearest = ffn_width(names, hidden, ffn_ratio(names, hidden, wanted))
    if nearest != wanted:
        raise InputError(
            f"{family.title} has a feed-forward width of whole hidden sizes ({names.ratio}), and {wanted} is none",
            where="student.intermediate_size",
            hint=f"use {nearest}",
        )
    return wanted


def _kv_heads(teacher: ModelShape, family: Family, section: StudentSection, heads: int) -> int:
    if family.sizes.kv_heads is None:
        if section.kv_heads not in (None, heads):
            raise InputError(
                f"models of {family.title} have as many heads of keys and values as of queries",
                where="student.kv_heads",
                hint="leave it out",
            )
        return heads
    wanted = section.kv_heads
    if wanted is not None and heads % wanted:
        raise InputError(
            f"{counted(heads, 'head')} cannot share {counted(wanted, 'head')} of keys and values equally",
            where="student.kv_heads",
            hint=f"use {_nearest(heads, wanted)}",
        )
    return wanted or _nearest(heads, teacher.kv_heads * heads / teacher.heads)


def _nearest(whole: int, wanted: float) -> int:
    """Return the divisor of `whole` that is nearest to `wanted`."""
    return min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: abs(n - wanted))


def set_widths(config: "PretrainedConfig", family: Family, shape: ModelShape) -> None:
    """Give a configuration these widths and heads, in place."""
    names, before = family.sizes, shape_of(config)
    sizes = {names.hidden: shape.hidden, names.heads: shape.heads}
    if names.intermediate is not None:
        sizes[names.intermediate] = shape.intermediate
    if names.ratio is not None:
        sizes[names.ratio] = ffn_ratio(names, shape.hidden, shape.intermediate)
    sizes |= dict.fromkeys(names.as_hidden, shape.hidden)
    if names.kv_heads is not None:
        sizes[names.kv_heads] = shape.kv_heads
    if names.head is not None:
        sizes[names.head] = shape.head
    # Where embeddings are as wide as the blocks, no random projection may come between them in the student.
    if names.embedding is not None and getattr(config, names.embedding) == before.hidden:
        sizes[names.embedding] = shape.hidden
    for name, value in sizes.items():
        setattr(config, name, value)


def head_features(config: "PretrainedConfig", student: int) -> list[tuple[int, int]]:
    """Return which feature of a teacher's head each feature of a head of `student` features starts from.

    Rotary positions turn features i and i + n/2 of the first n together, by an angle that i / n says: a pair starts
    from the pair that is turned most alike, and there are as many pairs as the narrower head has.
    """
    family, teacher = family_of(config), shape_of(config).head
    turned = (0, 0)
    if family.rotary:
        share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        turned = int(student * share), int(teacher * share)
    own, given = turned[0] // 2, turned[1] // 2
    pairs = [(i, i * given // own) if own <= given else (i * own // given, i) for i in range(min(own, given))]
    pairs += [(own + i, given + j) for i, j in pairs]
    return pairs + [(turned[0] + i, turned[1] + i) for i in range(min(student - turned[0], teacher - turned[1]))]


@dataclass(frozen=True)
class _Slices:
    """Which features of a teacher the features of its student start from."""

    config: "PretrainedConfig"
    given: ModelShape
    own: ModelShape

    def side(self, matrix: str, *, reads: bool) -> Places:
        """Return them for what a matrix of a block reads or gives."""
        if (matrix == "attention_output") if reads else (matrix in ("query", "key", "value")):
            return self._heads(queries=matrix in ("query", "attention_output"))
        inner = "ffn_out" if reads else ("ffn_in", "ffn_gate")
        if matrix in inner:
            return _leading(self.own.intermediate, self.given.intermediate)
        return _leading(self.own.hidden, self.given.hidden)

    def _heads(self, *, queries: bool) -> Places:
        """Return them for all heads: a head of queries starts from one that shares the same keys and values."""
        family = family_of(self.config)
        if not family.rotary and family.sizes.kv_heads is None:
            return _leading(self.own.heads * self.own.head, self.given.heads * self.given.head)
        groups = [shape.heads // shape.kv_heads if queries else 1 for shape in (self.own, self.given)]
        inside = head_features(self.config, self.own.head)
        found = [
            ((group * groups[0] + i) * self.own.head + own, (group * groups[1] + i) * self.given.head + given)
            for group in range(min(self.own.kv_heads, self.given.kv_heads))
            for i in range(min(groups))
            for own, given in inside
        ]
        places = torch.tensor(found, dtype=torch.long)
        return places[:, 0], places[:, 1]

    def vectors(self, own: int, given: int) -> int:
        """Return how many vectors as wide as the blocks lie on an axis of a weight, as where a head reads several."""
        return vectors_on((given, own), (self.given.hidden, self.own.hidden))

    def inside_head(self) -> Places:
        """Return them for one head."""
        places = torch.tensor(head_features(self.config, self.own.head), dtype=torch.long)
        return places[:, 0], places[:, 1]


def vectors_on(axis: tuple[int, int], widths: tuple[int, int]) -> int:
    """Return how many vectors of these widths lie on an axis of so many features; 1 where it is none of them.

    axis, widths: of the teacher and of the student.
    """
    times, rest = divmod(axis[1], widths[1])
    return times if axis[0] != axis[1] and not rest and axis[0] == times * widths[0] else 1


def _leading(own: int, given: int) -> Places:
    places = torch.arange(min(own, given))
    return places, places


@torch.no_grad()
def slice_into(teacher: "PreTrainedModel", student: "PreTrainedModel", kept: Sequence[int]) -> None:
    """Let the weights of a width student start from slices of its teacher's, in place.

    kept: the teacher's block, from 0, that each block of the student follows. Most features are the teacher's leading
    ones; what the teacher has none for stays as it is.
    """
    if next(student.parameters()).is_meta:
        return
    family, prefix = family_of(teacher.config), blocks_prefix(teacher)
    slices = _Slices(teacher.config, shape_of(teacher.config), shape_of(student.config))
    blocks = {0: 0} if family.repeated else dict(enumerate(kept))
    matrices = {matrix.path for matrix in family.matrices.values()}
    source = teacher.state_dict()
    for key, target in student.state_dict().items():
        origin, path = key, ""
        if key.startswith(prefix):
            number, path = key[len(prefix) :].split(".", 1)
            path = path.rpartition(".")[0]
            if path in matrices or int(number) not in blocks:
                continue
            origin = f"{prefix}{blocks[int(number)]}{key[len(prefix) + len(number) :]}"
        value = source.get(origin)
        if value is None or not target.is_floating_point() or value.ndim != target.ndim:
            continue
        if path.startswith(f"{family.attention_module}.") and (*target.shape, *value.shape) == (
            slices.own.head,
            slices.given.head,
        ):
            own, given = slices.inside_head()
            target[own] = value[given]
        else:
            for axis in reversed(range(target.ndim)):
                if (vectors := slices.vectors(target.shape[axis], value.shape[axis])) > 1:
                    target, value = (tensor.unflatten(axis, (vectors, -1)) for tensor in (target, value))
            window = tuple(slice(0, min(a, b)) for a, b in zip(target.shape, value.shape, strict=True))
            target[window].copy_(value[window])
    for own_block, given_block in blocks.items():
        for path in matrices:
            _slice_module(teacher, student, own_block + 1, given_block + 1, family.parts_of(path), slices)
    scale_queries(student, list(blocks.values()))


def _slice_module(
    teacher: "PreTrainedModel", student: "PreTrainedModel", number: int, origin: int, names: list[str], slices: _Slices
) -> None:
    """Slice the matrices of a block that are one module; number, origin: of both blocks, from 1."""
    weights, biases = [], []
    for name in names:
        own, given = block_matrix(student, number, name), block_matrix(teacher, origin, name)
        (rows, given_rows), (columns, given_columns) = (slices.side(name, reads=reads) for reads in (False, True))
        weight = own.weight.clone()
        weight[rows[:, None], columns] = given.weight[given_rows[:, None], given_columns]
        weights.append(weight)
        if own.module.bias is not None:
            bias = own.of(own.module.bias).clone()  # type: ignore[arg-type]
            bias[rows] = given.of(given.module.bias)[given_rows]  # type: ignore[arg-type]
            biases.append(bias)
    joined = (lambda parts: parts[0]) if own.layout is None else (lambda parts: own.layout.joined(parts, 0))
    weight_of(own.module).copy_(joined(weights))
    if biases:
        own.module.bias.copy_(joined(biases))  # type: ignore[operator, union-attr]
