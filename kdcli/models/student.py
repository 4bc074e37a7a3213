"""The forms that a student can take."""

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kdcli.errors import InputError
from kdcli.models.blocks import blocks_of, blocks_prefix, module_at, scale_queries
from kdcli.models.classes import has_two_heads
from kdcli.models.embedding import read_alike
from kdcli.models.factoriser import Factoriser
from kdcli.models.families import Family, family_of
from kdcli.models.fused import SplitLinear
from kdcli.models.heads import Labelling, with_pooler
from kdcli.models.image_size import fit_images
from kdcli.models.load import has_head, load_model
from kdcli.models.lowrank import LowRankEmbedding, LowRankLinear, factorise
from kdcli.models.probe import check_numbers
from kdcli.models.reinit import reinitialise, start_again
from kdcli.models.save import stored_type
from kdcli.models.sentence_folder import note_on_pooling
from kdcli.models.shape import ModelShape, both_sides, need_blocks, shape_of
from kdcli.models.timm_models import SIZE
from kdcli.models.vocabulary import trimmed
from kdcli.models.width import set_widths, slice_into, width_shape
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
    if has_two_heads(build.model):
        build.notes.append("two heads: where gold labels and the teacher's predictions teach, each learns from one")
    if (kind := stored_type(build.model)) != torch.float32:
        build.notes.append(f"kept in {str(kind).removeprefix('torch.')}")
    return build


def _see_alike(student: "PreTrainedModel", teacher: "PreTrainedModel") -> None:
    """Let a student that takes images of any size take those of its teacher, in place."""
    image = shape_of(teacher.config).image
    if image is not None and shape_of(student.config).any_size:
        setattr(student.config, SIZE, list(both_sides(image)))


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
    if section.form != "checkpoint":
        need_blocks(
            family_of(teacher.config),
            f'a student of form = "{section.form}"',
            "student.form",
            'use form = "checkpoint" with student.model: another model, or the teacher itself',
        )
    if section.form == "low-rank":
        # A teacher may be in half precision; what is trained is not.
        student = copy.deepcopy(teacher).float()  # type: ignore[call-arg, arg-type]
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


def chosen_layers(section: StudentSection, depth: int, *, uneven: bool = False) -> list[int]:
    """Return the 0-based teacher blocks that a depth student keeps.

    `even` keeps blocks round(m N / n), counted from 1: 12 -> 6 gives 2, 4, ..., 12. `spread` keeps the first, the
    last and blocks at equal distances between: 12 -> 6 gives 0, 2, 4, 7, 9, 11 from 0 (DistilBERT's choice). `ends`
    keeps the first and the last ones: 12 -> 5 gives 0, 1, 9, 10, 11. uneven: of what is cut, see `ModelShape`.
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
    select = section.select or ("ends" if uneven else "even")
    if select == "first":
        return list(range(wanted))
    if select == "last":
        return list(range(depth - wanted, depth))
    if select == "ends":
        # Neighbouring blocks in the middle of a decoder do nearly the same (Gromov et al. 2024, arXiv 2403.17887).
        # Without its first block a model of images is at chance, and no other one matters nearly as much.
        first = max(1, wanted // 2)
        return [*range(first), *range(depth - wanted + first, depth)]
    if select == "spread":
        return [round(m * (depth - 1) / (wanted - 1)) for m in range(wanted)] if wanted > 1 else [depth - 1]
    # Halves go up, as in the uniform layer map: a block starts as the block that it is to follow.
    return [math.floor(m * depth / wanted + 0.5) - 1 for m in range(1, wanted + 1)]


def _depth(teacher: "PreTrainedModel", section: StudentSection, whose: str = "the teacher's") -> StudentBuild:
    """Return a model of some blocks of `teacher`; notes say `whose` they are."""
    depth, family = shape_of(teacher.config).layers, family_of(teacher.config)
    layers = chosen_layers(section, depth, uneven=shape_of(teacher.config).uneven)
    config = copy.deepcopy(teacher.config)
    _set_blocks(config, family, layers)
    student = _empty_like(teacher, config)
    if family.repeated:
        student.load_state_dict(teacher.state_dict())
        notes = [f"{whose} one block, run {counted(len(layers), 'time')} instead of {depth}"]
    else:
        prefix, source = blocks_prefix(teacher), teacher.state_dict()
        student.load_state_dict({key: source[_origin(key, prefix, layers)] for key in student.state_dict()})
        scale_queries(student, layers)
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
    if hasattr(config, "set_output_features_output_indices"):
        # Models that the library also has as backbones name a stage after each block.
        config.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(layers) + 1))]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def _origin(key: str, prefix: str, layers: list[int]) -> str:
    """Return the teacher's name for a student's tensor, whose block m is the teacher's block `layers[m]`."""
    if not key.startswith(prefix):
        return key
    layer, rest = key[len(prefix) :].split(".", 1)
    return f"{prefix}{layers[int(layer)]}.{rest}"


def _empty_like(model: "PreTrainedModel", config: Any) -> "PreTrainedModel":
    is_body = model.base_model is model
    arguments = with_pooler(type(model), getattr(model, "pooler", None) is not None) if is_body else {}
    made = type(model)(config, **arguments).float()  # type: ignore[arg-type, call-arg]
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _width(teacher: "PreTrainedModel", section: StudentSection) -> StudentBuild:
    family, shape = family_of(teacher.config), shape_of(teacher.config)
    wanted = width_shape(shape, family, section)
    if section.init == "projections":
        _check_projected(shape, wanted)
    fewer = StudentSection(form="depth", layers=min(wanted.layers, shape.layers))
    kept = chosen_layers(fewer, shape.layers, uneven=shape.uneven)
    config = copy.deepcopy(teacher.config)
    _set_blocks(config, family, [*kept, *(layer % shape.layers for layer in range(shape.layers, wanted.layers))])
    set_widths(config, family, wanted)
    student = _empty_like(teacher, config)
    heads = counted(wanted.heads, "head")
    if wanted.kv_heads != wanted.heads:
        heads += f" ({wanted.kv_heads} of keys and values)"
    notes = [
        f"{counted(wanted.layers, 'block')}, width {wanted.hidden}, {heads}, feed-forward width {wanted.intermediate}"
    ]
    if section.init == "random":
        return StudentBuild(student.eval(), "width", None, notes)
    if section.init == "projections":
        if hasattr(module_at(teacher, family.word_embeddings), "scalar_embed_scale"):
            raise InputError(
                f"{family.title} multiplies its embeddings by a number that follows from its width, beside the output "
                "layer that shares them: no projection gives a narrower model both",
                where="student.init",
                hint='use init = "teacher"',
            )
        if module_at(teacher, family.projection) is not None and module_at(student, family.projection) is None:
            raise InputError(
                f"{family.title} has no map after embeddings as wide as its blocks; the teacher's would be lost",
                where="student.hidden_size",
                hint=f"use another width than {wanted.hidden}",
            )
        notes.append("its weights are trained projections of the teacher's, merged at the end")
        return StudentBuild(student.eval(), "width", kept, notes, projected=True)
    slice_into(teacher, student, kept)
    notes.append("initialised with leading slices of the teacher's weights")
    return StudentBuild(student.eval(), "width", kept, notes)


def _check_projected(teacher: ModelShape, student: ModelShape) -> None:
    """Raise InputError for a size above the teacher's: a projection has nothing to fill it from."""
    sizes = {
        "hidden_size": ("hidden", "features"),
        "heads": ("heads", "heads"),
        "kv_heads": ("kv_heads", "heads of keys and values"),
        "intermediate_size": ("intermediate", "feed-forward features"),
        "layers": ("layers", "blocks"),
    }
    for name, (size, what) in sizes.items():
        wanted, most = getattr(student, size), getattr(teacher, size)
        if wanted > most:
            raise InputError(
                f"a student of projections has at most the teacher's {most} {what}, not {wanted}",
                where=f"student.{name}",
                hint=f'use at most {most}, or student.init = "teacher"',
            )
    if student.head > teacher.head:
        raise InputError(
            f"a student of projections has heads of at most the teacher's {teacher.head} features, not {student.head}",
            where="student.heads",
            hint=f"use at least {-(-student.hidden // teacher.head)} heads",
        )
    own, most = (shape.heads // shape.kv_heads for shape in (student, teacher))
    if own > most:
        raise InputError(
            f"in a student of projections at most the teacher's {counted(most, 'head')} can share keys and values, not "
            f"{own}",
            where="student.kv_heads",
            hint=f"use at least {-(-student.heads // most)}",
        )


def _check_same_images(student: "PreTrainedModel", teacher: "PreTrainedModel") -> None:
    """Raise InputError where a student cannot read what its teacher reads: images of one size, of as many channels."""
    own, other = shape_of(student.config), shape_of(teacher.config)
    for what, mine, theirs in (
        ("pixels", *(each.image and both_sides(each.image) for each in (own, other))),
        ("channels", own.channels, other.channels),
    ):
        if None not in (mine, theirs) and mine != theirs:
            said = [" x ".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in (mine, theirs)]
            raise InputError(
                f"the student reads images of {said[0]} {what}, the teacher of {said[1]}: both must read the same",
                where="student.model",
                hint="choose a student for images of the teacher's size",
            )


def _checkpoint(
    teacher: "PreTrainedModel", section: StudentSection, labelling: Labelling | None, kept: "np.ndarray | None"
) -> StudentBuild:
    assert section.model is not None and labelling is not None
    notes = [f"from {section.model}"]
    if section.init == "random":
        student = reinitialise(load_model(section.model, labelling.head, new_head=labelling.settings))
        notes = [f"has the shape of {section.model}, with random weights"]
    elif has_head(section.model, labelling.head):
        student = load_model(section.model, labelling.head)
        notes += [*note_on_pooling(section.model, labelling.head), *labelling.align(student, section.model)]
    else:
        student = load_model(section.model, labelling.head, new_head=labelling.settings)
        notes.append("with a new head: it has none of the kind that is needed")
    if kept is not None and kept[-1] < (shape_of(student.config).vocab or 0):
        student = trimmed(student, kept)
    own, theirs = (shape_of(model.config).vocab for model in (student, teacher))
    if own is not None and theirs is not None and own != theirs:
        raise InputError(
            f"the student's vocabulary has {own:,} tokens, the teacher's {theirs:,}: both must read the same tokens",
            where="student.model",
            hint="choose a student with the teacher's tokenizer",
        )
    _see_alike(student, teacher)
    if (image := shape_of(teacher.config).image) is not None and (note := fit_images(student, *both_sides(image))):
        notes.append(note)
    _check_same_images(student, teacher)
    check_numbers(student, "student.model")
    if section.layers is not None:
        need_blocks(family_of(student.config), "a number of layers", "student.layers", "leave it out")
        cut = _depth(student, section, whose="its")
        student, notes = cut.model, [*notes, *cut.notes]
    return StudentBuild(student, "checkpoint", None, notes)
