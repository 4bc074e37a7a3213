"""The forms that a student can take."""

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kdcli.errors import InputError
from kdcli.models.blocks import blocks_of, module_at
from kdcli.models.embedding import read_alike
from kdcli.models.factoriser import Factoriser
from kdcli.models.families import Family, family_of
from kdcli.models.fused import SplitLinear
from kdcli.models.heads import Labelling, without_pooler
from kdcli.models.load import has_head, load_model
from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear, factorise
from kdcli.models.probe import check_numbers
from kdcli.models.reinit import start_again
from kdcli.models.save import stored_type
from kdcli.models.sentence_folder import note_on_pooling
from kdcli.models.shape import ModelShape, shape_of
from kdcli.models.sizes import check_heads
from kdcli.models.vocabulary import trimmed
from kdcli.recipe.schema import OverparamSection, StudentSection
from kdcli.words import counted

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class StudentBuild:
    """A new student, the 0-based teacher blocks that its blocks are copies of, and notes for the user.

    projected: its weights are yet to become projections of the teacher's (`kdcli.models.projections.project`).
    """

    model: "PreTrainedModel"
    form: str
    teacher_layers: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    projected: bool = False


def build_student(
    teacher: "PreTrainedModel",
    section: StudentSection,
    *,
    seed: int,
    overparam: OverparamSection | None = None,
    labelling: Labelling | None = None,
    factoriser: Factoriser | None = None,
    kept: "np.ndarray | None" = None,
) -> StudentBuild:
    """Return a student of `section.form` made from `teacher`, which is not changed.

    overparam: the chains that it will be trained as, which not every rank has factors for. labelling: of the outputs
    of a student from a checkpoint, which needs it. factoriser: chooses the factors of a low-rank student; left out, the
    SVD's. kept: the ids of the vocabulary that `teacher` was trimmed to, and a student from a checkpoint is to be.
    Raises InputError when the sizes asked for do not fit the teacher.
    """
    build = _build(teacher, section, seed, overparam, labelling, factoriser, kept)
    read_alike(build.model, teacher)
    if section.dtype is not None:
        build.model.config.dtype = getattr(torch, section.dtype)
    if (kind := stored_type(build.model)) != torch.float32:
        build.notes.append(f"kept in {str(kind).removeprefix('torch.')}")
    return build


def _build(
    teacher: "PreTrainedModel",
    section: StudentSection,
    seed: int,
    overparam: OverparamSection | None,
    labelling: Labelling | None,
    factoriser: Factoriser | None,
    kept: "np.ndarray | None",
) -> StudentBuild:
    torch.manual_seed(seed)
    reads = section.form in ("depth", "low-rank") or (section.form == "width" and section.init != "random")
    if reads and any(
        isinstance(module, LowRankLinear | LowRankEmbedding | SplitLinear) for module in teacher.modules()
    ):
        raise InputError(
            f"a {section.form} student takes its weights from whole matrices, and the teacher's are low-rank factors",
            where="student.form",
            hint="use a teacher without them; `kdcli contract MODEL --merge-lowrank --out DIR` multiplies them",
        )
    if section.form == "low-rank":
        student = copy.deepcopy(teacher)
        notes = factorise(student, section, overparam, factoriser)
        return StudentBuild(student, "low-rank", list(range(shape_of(teacher.config).layers)), notes)
    if section.form == "depth":
        return _depth(teacher, section)
    if section.form == "width":
        if section.init == "projections" and overparam is not None:
            raise InputError(
                "weights that are projections of the teacher's have no chains of their own",
                where="student.init",
                hint='set student.init = "teacher", or leave [overparam] out',
            )
        return _width(teacher, section)
    if section.form == "checkpoint":
        return _checkpoint(teacher, section, labelling, kept)
    raise InputError("the student has no form", where="student.form")


def chosen_layers(section: StudentSection, depth: int) -> list[int]:
    """Return the 0-based teacher blocks that a depth student keeps.

    `even` keeps blocks round(m N / n), counted from 1: 12 -> 6 gives 2, 4, ..., 12. `spread` keeps the first, the
    last and blocks at equal distances between: 12 -> 6 gives 0, 2, 4, 7, 9, 11 from 0 (DistilBERT's choice).
    """
    wanted = section.layers if section.layers is not None else max(1, depth // 2)
    source = section.model or "the teacher"
    if isinstance(wanted, list):
        wrong = [layer for layer in wanted if layer >= depth]
        if wrong:
            raise InputError(f"{source} has blocks 0 to {depth - 1}, not {wrong[0]}", where="student.layers")
        if not wanted or sorted(set(wanted)) != wanted:
            raise InputError("student.layers must be block numbers in rising order", where="student.layers")
        return wanted
    if wanted > depth:
        raise InputError(
            f"{source} has {counted(depth, 'block')}, so a student of {wanted} cannot be cut from it",
            where="student.layers",
            hint=f"use 1 to {depth}",
        )
    if section.select == "first":
        return list(range(wanted))
    if section.select == "last":
        return list(range(depth - wanted, depth))
    if section.select == "spread":
        return [round(m * (depth - 1) / (wanted - 1)) for m in range(wanted)] if wanted > 1 else [depth - 1]
    # Halves go up, as in the uniform layer map: a block starts as the block that it is to follow.
    return [math.floor(m * depth / wanted + 0.5) - 1 for m in range(1, wanted + 1)]


def _depth(teacher: "PreTrainedModel", section: StudentSection, whose: str = "the teacher's") -> StudentBuild:
    """Return a model of some blocks of `teacher`; notes say `whose` they are."""
    depth, family = shape_of(teacher.config).layers, family_of(teacher.config)
    layers = chosen_layers(section, depth)
    config = copy.deepcopy(teacher.config)
    _set_blocks(config, family, layers)
    student = _empty_like(teacher, config)
    if family.repeated:
        student.load_state_dict(teacher.state_dict())
        notes = [f"{whose} one block, run {counted(len(layers), 'time')} instead of {depth}"]
    else:
        prefix, source = _blocks_prefix(teacher), teacher.state_dict()
        student.load_state_dict({key: source[_origin(key, prefix, layers)] for key in student.state_dict()})
        numbers = f"{'block' if len(layers) == 1 else 'blocks'} {', '.join(map(str, layers))}"
        what = f"{numbers} of {whose} blocks 0 to {depth - 1}"
        notes = [f"has the shape of {what}" if section.init == "random" else f"keeps {what}"]
        if family.first_only and layers[0] != 0:
            notes.append(f"without the {', '.join(family.first_only)} of block {layers[0]}: no first block has one")
    if section.init == "random":
        start_again(student, blocks_of(student))
    return StudentBuild(student.eval(), "depth", layers, notes)


def _set_blocks(config: "PretrainedConfig", family: Family, layers: list[int]) -> None:
    """Give a configuration as many blocks as `layers` names (from 0), each with that block's own settings."""
    for name in family.sizes.by_block:
        settings = getattr(config, name)
        setattr(config, name, [settings[layer] for layer in layers])
    setattr(config, family.sizes.layers, len(layers))


def _origin(key: str, prefix: str, layers: list[int]) -> str:
    """Return the teacher's name for a student's tensor, whose block m is the teacher's block `layers[m]`."""
    if not key.startswith(prefix):
        return key
    layer, rest = key[len(prefix) :].split(".", 1)
    return f"{prefix}{layers[int(layer)]}.{rest}"


def _blocks_prefix(model: "PreTrainedModel") -> str:
    body = "" if model.base_model is model else model.base_model_prefix + "."
    return f"{body}{family_of(model.config).blocks}."


def _empty_like(model: "PreTrainedModel", config: Any) -> "PreTrainedModel":
    pooled = model.base_model is not model or getattr(model, "pooler", None) is not None
    arguments = {} if pooled else without_pooler(type(model))
    return type(model)(config, **arguments).to(dtype=next(model.parameters()).dtype)  # type: ignore[arg-type, call-arg]


def _width(teacher: "PreTrainedModel", section: StudentSection) -> StudentBuild:
    shape, family = shape_of(teacher.config), family_of(teacher.config)
    hidden = section.hidden_size or shape.hidden
    head_size = shape.hidden // shape.heads
    heads = section.heads or (hidden // head_size if hidden % head_size == 0 else shape.heads)
    if hidden % heads:
        fitting = [h for h in range(1, hidden + 1) if hidden % h == 0]
        raise InputError(
            f"hidden_size {hidden} is not divisible by {heads} heads",
            where="student.heads",
            hint=f"use {counted(min(fitting, key=lambda h: abs(h - heads)), 'head')}",
        )
    check_heads(family, hidden, heads, "student.heads")
    layers = section.layers if section.layers is not None else shape.layers
    if isinstance(layers, list):
        raise InputError("a width student takes a number of layers, not a list", where="student.layers")
    intermediate = section.intermediate_size or round(shape.intermediate * hidden / shape.hidden)
    if section.init == "projections":
        _check_projected(shape, hidden, heads, intermediate, layers)
    kept = chosen_layers(StudentSection(form="depth", layers=min(layers, shape.layers)), shape.layers)
    config, names = copy.deepcopy(teacher.config), family.sizes
    _set_blocks(config, family, [*kept, *(layer % shape.layers for layer in range(shape.layers, layers))])
    for name, value in ((names.hidden, hidden), (names.heads, heads), (names.intermediate, intermediate)):
        setattr(config, name, value)
    # Where embeddings are as wide as the blocks, no random projection may come between them in the student.
    if names.embedding is not None and getattr(config, names.embedding) == shape.hidden:
        setattr(config, names.embedding, hidden)
    for name in names.as_hidden:
        setattr(config, name, hidden)
    student = _empty_like(teacher, config)
    notes = [f"{counted(layers, 'block')}, width {hidden}, {counted(heads, 'head')}, feed-forward width {intermediate}"]
    if section.init == "random":
        return StudentBuild(student.eval(), "width", None, notes)
    if section.init == "projections":
        if module_at(teacher, family.projection) is not None and module_at(student, family.projection) is None:
            raise InputError(
                f"{family.title} has no map after embeddings as wide as its blocks; the teacher's would be lost",
                where="student.hidden_size",
                hint=f"use another width than {hidden}",
            )
        notes.append("its weights are trained projections of the teacher's, merged at the end")
        return StudentBuild(student.eval(), "width", kept, notes, projected=True)
    _slice_into(teacher, student, kept)
    notes.append("initialised with leading slices of the teacher's weights")
    return StudentBuild(student.eval(), "width", kept, notes)


def _check_projected(teacher: ModelShape, hidden: int, heads: int, intermediate: int, layers: int) -> None:
    """Raise InputError for a size above the teacher's: a projection has nothing to fill it from."""
    sizes = {
        "hidden_size": (hidden, teacher.hidden, "features"),
        "heads": (heads, teacher.heads, "heads"),
        "intermediate_size": (intermediate, teacher.intermediate, "feed-forward features"),
        "layers": (layers, teacher.layers, "blocks"),
    }
    for name, (wanted, most, what) in sizes.items():
        if wanted > most:
            raise InputError(
                f"a student of projections has at most the teacher's {most} {what}, not {wanted}",
                where=f"student.{name}",
                hint=f'use at most {most}, or student.init = "teacher"',
            )
    own, most = hidden // heads, teacher.hidden // teacher.heads
    if own > most:
        raise InputError(
            f"a student of projections has heads of at most the teacher's {most} features, not {own}",
            where="student.heads",
            hint=f"use at least {-(-hidden // most)} heads",
        )


def _slice_into(teacher: "PreTrainedModel", student: "PreTrainedModel", kept: list[int]) -> None:
    prefix, family = _blocks_prefix(teacher), family_of(teacher.config)
    source = teacher.state_dict()
    parts = {matrix.path: matrix.parts for matrix in family.matrices.values()}
    copied = range(1 if family.repeated else len(kept))
    with torch.no_grad():
        for key, target in student.state_dict().items():
            inside = key.startswith(prefix)
            if inside and int(key[len(prefix) :].split(".", 1)[0]) not in copied:
                continue
            value = source.get(key if family.repeated else _origin(key, prefix, kept))
            if value is None or not target.is_floating_point() or value.ndim != target.ndim:
                continue
            path = key[len(prefix) :].partition(".")[2].rpartition(".")[0] if inside else ""
            shares = (tensor.chunk(parts.get(path, 1)) for tensor in (target, value))
            for own, given in zip(*shares, strict=True):
                window = tuple(slice(0, min(a, b)) for a, b in zip(own.shape, given.shape, strict=True))
                own[window].copy_(given[window])


def _checkpoint(
    teacher: "PreTrainedModel", section: StudentSection, labelling: Labelling | None, kept: "np.ndarray | None"
) -> StudentBuild:
    assert section.model is not None and labelling is not None
    notes = [f"from {section.model}"]
    if has_head(section.model, labelling.head):
        student = load_model(section.model, labelling.head)
        notes += [*note_on_pooling(section.model, labelling.head), *labelling.align(student, section.model)]
    else:
        student = load_model(section.model, labelling.head, new_head=labelling.settings)
        notes.append("with a new head: it has none of the kind that is needed")
    if kept is not None and kept[-1] < student.config.vocab_size:
        student = trimmed(student, kept)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise InputError(
            f"the student's vocabulary has {student.config.vocab_size:,} tokens, the teacher's "
            f"{teacher.config.vocab_size:,}: both must read the same tokens",
            where="student.model",
            hint="choose a student with the teacher's tokenizer",
        )
    check_numbers(student, "student.model")
    if section.layers is not None:
        cut = _depth(student, section, whose="its")
        student, notes = cut.model, [*notes, *cut.notes]
    return StudentBuild(student, "checkpoint", None, notes)
