"""Where the teacher comes from: loaded, fine-tuned once and kept, or made from scratch."""

import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors import SafetensorError

from kdcli import __version__
from kdcli.errors import InputError
from kdcli.evaluation.score import calibrate
from kdcli.files import atomic_folder, cache_dir, fingerprint, source_of, write_json
from kdcli.machine import resolve_precision
from kdcli.manifest import check_manifest, is_sealed, write_manifest
from kdcli.models.checkpoint import open_checkpoint
from kdcli.models.families import family_of
from kdcli.models.finite import NotFiniteError, at_fault, check_weights
from kdcli.models.hashing import hash_of_model
from kdcli.models.heads import Head, Labelling, check_body, head_parameters
from kdcli.models.image_size import fit_images
from kdcli.models.load import has_head, load_config, load_model, refusal_of_head
from kdcli.models.placement import Placement, spread
from kdcli.models.probe import check_numbers
from kdcli.models.processors import (
    check_processor,
    hash_of_processor,
    is_image_processor,
    load_processor,
    pixels_of,
)
from kdcli.models.save import save_model
from kdcli.models.scratch import build_scratch
from kdcli.models.sentence_folder import note_on_pooling
from kdcli.models.shape import need_blocks
from kdcli.recipe.schema import Recipe, TeacherFinetuneSection
from kdcli.tasks.base import Owner, Task
from kdcli.tasks.kind import TaskKind
from kdcli.tasks.load import fingerprint_of
from kdcli.terminal import tell
from kdcli.training.curves import write_curve
from kdcli.training.distributed import agree, main_does

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from kdcli.training.finetune import finetune
from kdcli.words import one


@dataclass
class Teacher:
    """The model to copy from, its classes in the task's order.

    known: False for a black box, of which only answers are known; `model` is then the student's start, which lends
    its shape and its processor, and nothing else. base: what it was before its fine-tuning, where students are cut
    from that.
    """

    model: "PreTrainedModel"
    processor: Any
    origin: str
    path: Path | None = None
    known: bool = True
    base: "PreTrainedModel | None" = None
    training: dict[str, Any] = field(default_factory=dict)
    """The record of its fine-tuning, now or when it was cached; empty for one that is used as it is."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was decided about one that is used as it is: its own files do not say so."""


def seed_of(recipe: Recipe) -> int:
    """Return the seed that shapes a teacher: its own, or else the recipe's."""
    return recipe.seed if recipe.teacher.seed is None else recipe.teacher.seed


def needs_training(recipe: Recipe, source: str | None, head: Head) -> bool:
    """True when the teacher must be fine-tuned: from scratch, asked for, or without the head that is needed."""
    section = recipe.teacher
    if section.black_box:
        return False
    if section.scratch is not None or section.finetune not in (None, False):
        return True
    assert source is not None
    if has_head(source, head, revision=section.revision, trust_remote_code=section.trust_remote_code):
        return False
    if section.finetune is False:
        raise InputError(
            f"{refusal_of_head(source, head, revision=section.revision)}, and teacher.finetune = false forbids "
            "training one",
            where="teacher.model",
            hint="give a fine-tuned model, or leave finetune out",
        )
    if head.causal:
        # A language is not learnt on the side.
        raise InputError(
            refusal_of_head(source, head, revision=section.revision),
            where="teacher.model",
            hint="name a causal language model; a new head on this body is trained where teacher.finetune asks for it",
        )
    return True


@dataclass(frozen=True)
class TeacherStart:
    """A teacher before any work: loaded, its classes in the task's order; or, where it `trains`, untrained.

    known: as in `Teacher`. notes: what a user should know about its classes.
    """

    model: "PreTrainedModel"
    processor: Any
    origin: str
    path: Path | None = None
    known: bool = True
    trains: bool = False
    notes: tuple[str, ...] = ()


def start_teacher(recipe: Recipe, task: Task, head: Head, *, base: Path, world: int) -> TeacherStart:
    """Return the start of a recipe's teacher, with a head.

    world: the processes that train. Trains nothing and writes nothing. Raises InputError for all that is wrong with
    the teacher, its processor or its classes.
    """
    section = recipe.teacher
    source = source_of(section.model, base) if section.model is not None else None
    if source is not None and head.causal:
        check_body(load_config(source), head, section.model, "teacher.model")
    trains = needs_training(recipe, source, head)
    if trains and not task.kind.has_gold:
        raise InputError(
            f"{task.name} is {one(task.kind.name)} task, which has no gold answers to train a teacher on",
            where="teacher",
            hint=f"give {task.kind.head.title}, with finetune left out",
        )
    if trains and section.labels is not None:
        raise InputError(
            "teacher.labels names the classes of a trained head, and this teacher gets a new one",
            where="teacher.labels",
            hint="leave it out: a new head has the task's own labels",
        )
    if trains:
        _check_trained(recipe)
    elif section.device_map is not None and world > 1:
        raise InputError(
            f"the teacher is to be spread over all GPUs, which {world} processes share",
            where="teacher.device_map",
            hint='start one process, or use teacher.sharding = "fsdp"',
        )
    if section.scratch is not None:
        if head.reads == "text" and next(iter(task.kind.texts(task.train)), None) is None:
            raise InputError(
                f'its tokenizer is made from the texts of the task, and type = "{task.kind.name}" has none',
                where="teacher.scratch",
                hint="name a teacher.model",
            )
        model, processor = build_scratch(
            section.scratch,
            task.kind.texts(task.train),
            head,
            task.kind.configure(task.label_names),
            seed=seed_of(recipe),
        )
        return TeacherStart(model, processor, "from scratch", trains=True)
    if section.black_box:
        assert recipe.student.model is not None
        source = source_of(recipe.student.model, base)
    assert source is not None
    torch.manual_seed(seed_of(recipe))
    model, notes = _with_head(recipe, task, source, head, trains)
    # A model's own processor is that of its revision.
    reader = (source_of(section.tokenizer, base), None) if section.tokenizer else (source, section.revision)
    processor = task.kind.processor(load_processor(*reader))
    check_processor(model, processor, recipe.task.max_length)
    if is_image_processor(processor) and (note := fit_images(model, *pixels_of(processor)[1:])) is not None:
        notes = (*notes, f"teacher: {note}")
    check_numbers(model, "student.model" if section.black_box else "teacher.model")
    if section.black_box:
        return TeacherStart(model, processor, "a black box", known=False)
    if trains:
        if isinstance(section.finetune, TeacherFinetuneSection) and section.finetune.head_only:
            _check_head(model, head)
        # What is trained is kept to the bit, whatever its start came in.
        model.config.dtype = torch.float32
    elif section.device_map is not None or section.sharding != "none":
        name = "device_map" if section.device_map is not None else "sharding"
        need_blocks(family_of(model.config), f"teacher.{name}", f"teacher.{name}", "leave it out")
        limits = section.device_map if isinstance(section.device_map, dict) else {}
        spread(model, Placement(None if section.device_map is None else limits, section.sharding == "fsdp"))
    path = Path(source) if not trains and Path(source).exists() else None
    return TeacherStart(model, processor, section.model or source, path, trains=trains, notes=notes)


def _check_head(model: "PreTrainedModel", head: Head) -> None:
    """Raise InputError for a head without weights of its own: there is nothing to train beside the body."""
    if not head_parameters(model):
        raise InputError(
            f"{head.title} has no weights beside its body's, so there is no head to train alone",
            where="teacher.finetune.head_only",
            hint="leave it out",
        )


def _check_trained(recipe: Recipe) -> None:
    """Raise InputError for what only a fixed teacher can have."""
    section = recipe.teacher
    for name, given in (
        ("dtype", section.dtype == "bf16"),
        ("device_map", section.device_map is not None),
        ("sharding", section.sharding != "none"),
    ):
        if given:
            raise InputError(
                f"teacher.{name} is for a teacher that is used as it is, and this one is fine-tuned first",
                where=f"teacher.{name}",
                hint="leave it out; train.sharding and train.gradient_checkpointing hold for its training, too",
            )


def weights_of(recipe: Recipe, source: str) -> torch.dtype | None:
    """Return the number type of a fixed teacher's weights in memory; None is fp32."""
    section = recipe.teacher
    if section.dtype == "auto":
        stored = open_checkpoint(source, section.revision, any_family=section.trust_remote_code).dtype
        halves = stored == "bfloat16" and resolve_precision(recipe.train.precision, recipe.train.device) == "bf16"
        return torch.bfloat16 if halves else None
    return torch.bfloat16 if section.dtype == "bf16" else None


def _with_head(
    recipe: Recipe, task: Task, source: str, head: Head, trains: bool
) -> tuple["PreTrainedModel", tuple[str, ...]]:
    """Return a teacher with the head that its file has, its classes in the task's order, or else with a new one.

    A new one has a teacher that is to be fine-tuned and has none, or one for other classes; and a black box, of which
    only the names of the classes are asked. With it come notes about the classes.
    """
    section = recipe.teacher
    origin: Any = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    load = partial(load_model, source, head, **origin)
    if not trains and not section.black_box:
        load = partial(load, weights=weights_of(recipe, source))
    if not section.black_box and has_head(
        source, head, revision=section.revision, trust_remote_code=section.trust_remote_code
    ):
        model = load()
        try:
            owner = Owner(section.model or source)
            owner.notes.extend(note_on_pooling(source, head, section.revision))
            task.kind.align(model, task.label_names, owner, section.labels)
            return model, tuple(owner.notes)
        except InputError:
            if section.finetune in (None, False):
                raise
    return load(new_head=task.kind.configure(task.label_names)), ()


def make_teacher(
    start: TeacherStart,
    recipe: Recipe,
    task: Task,
    head: Head,
    *,
    console: Console,
    refresh: bool,
    resume: bool,
    work: Path,
    log: Path | None = None,
) -> Teacher:
    """Return the teacher that `start` becomes: as it is, or fine-tuned.

    A fine-tuned one is kept in the cache under a name made of everything that shaped it (base weights, data,
    settings, seed), and reused; `refresh` makes it again. `work` is where a training keeps its checkpoints,
    `log` where TensorBoard finds its curve, whether it was trained now or before.
    """
    if not start.trains:
        # As its students, so that their scores are comparable.
        settings = _calibrated(recipe, task, start.model, start.processor) if start.known else {}
        return Teacher(start.model, start.processor, start.origin, start.path, start.known, settings=settings)
    return _finetuned(
        recipe,
        task,
        start.model,
        start.processor,
        head,
        console=console,
        refresh=refresh,
        resume=resume,
        work=work,
        log=log,
    )


def _calibrated(recipe: Recipe, task: Task, model: "PreTrainedModel", processor: Any) -> dict[str, Any]:
    """Put what is decided about a teacher into its configuration, and return it."""
    with at_fault("teacher.model"):
        return calibrate(
            model,
            processor,
            task,
            max_length=recipe.task.max_length,
            batch_size=recipe.evaluate.batch_size,
            owner="the teacher",
            device=recipe.train.device,
        )


def labelling_of(kind: TaskKind, labels: tuple[str, ...], head: Head | None = None) -> Labelling:
    """Return what a task asks of the outputs of a student from a checkpoint. head: another one than its kind's."""
    settings = kind.configure(labels)
    remedy = "name a checkpoint of this task, or one without a trained head, such as the one it was trained from"

    def align(model: "PreTrainedModel", name: str) -> list[str]:
        owner = Owner(name, "student.model", None, remedy)
        kind.align(model, labels, owner)
        model.config.problem_type = settings.get("problem_type", model.config.problem_type)
        return owner.notes

    return Labelling(head or kind.head, settings, align)


def _finetuned(
    recipe: Recipe,
    task: Task,
    model: "PreTrainedModel",
    processor: Any,
    head: Head,
    *,
    console: Console,
    refresh: bool,
    resume: bool,
    work: Path,
    log: Path | None,
) -> Teacher:
    section = recipe.teacher
    settings = section.finetune if isinstance(section.finetune, TeacherFinetuneSection) else TeacherFinetuneSection()
    identity = {
        "base": hash_of_model(model),
        "tokenizer": hash_of_processor(processor),
        # Other rows only score it.
        "task": fingerprint_of(_shaping(task)),
        "max_length": recipe.task.max_length,
        "fields": task.kind.drawn(task.fields),
        "finetune": settings.model_dump(),
        "precision": resolve_precision(recipe.train.precision, recipe.train.device),
        "group_by_length": recipe.train.group_by_length,
        "seed": seed_of(recipe),
        **({"mixing_temperature": task.mixing_temperature} if task.parts else {}),
        "format": 2,
    }
    folder = cache_dir() / "teachers" / fingerprint(identity)
    origin = section.model or "from scratch"
    if not refresh and (kept := _kept(folder, identity, head, processor, origin, console)) is not None:
        if log is not None:
            main_does(partial(write_curve, kept.training.get("history", []), log))
        return kept
    tell(console, f"teacher: {origin}, fine-tuning on {task.name}")
    record = finetune(
        model,
        processor,
        task,
        settings,
        recipe.train,
        max_length=recipe.task.max_length,
        seed=seed_of(recipe),
        work=work,
        console=console,
        resume=resume,
        title="teacher",
        log=log,
        identity=identity,
        head_only=settings.head_only,
    )

    # Where it was trained it is not left: what follows starts from models on the CPU.
    model.eval().to("cpu")  # type: ignore[arg-type]
    _calibrated(recipe, task, model, processor)
    written: list[Path] = []

    def keep() -> None:
        try:
            with atomic_folder(folder, ours=True) as temporary:
                save_model(model, temporary, processor)
                write_json(temporary / "kdcli.json", {"identity": identity, "version": __version__, "training": record})
                write_manifest(temporary, identity)
            written.append(folder)
            shutil.rmtree(work, ignore_errors=True)
        except (InputError, OSError, SafetensorError) as error:
            # The cache only saves time: what was trained for hours must not be lost to it.
            tell(console, f"teacher: cannot be kept for other runs: {error}")

    main_does(keep)
    return Teacher(model, processor, origin=origin, path=folder if agree(bool(written)) else None, training=record)


def _shaping(task: Task) -> dict[str, Any]:
    """Return the parts of a task that shape a teacher."""
    calibration = {"calibration": task.calibration} if task.calibration is not None else {}
    return {"train": task.train, "labels": {"names": list(task.label_names)}, **calibration}


def _kept(
    folder: Path, identity: dict[str, Any], head: Head, processor: Any, origin: str, console: Console
) -> Teacher | None:
    """Return the teacher that the cache holds in `folder`; None when there is none, or it is not as it was written.

    processor: the one that it was trained with, as the recipe gives it. That of the folder gives what this model
    takes, and a student may take more.
    """
    if not agree(is_sealed(folder)):
        return None
    found, problem = None, agree(check_manifest(folder, identity))
    if problem is None:
        try:
            model = load_model(str(folder), head)
            check_weights(model, "the teacher")
            record = json.loads((folder / "kdcli.json").read_text(encoding="utf-8"))["training"]
            found = Teacher(model, processor, origin=origin, path=folder, training=record)
        except (InputError, NotFiniteError) as error:
            problem = error.message
        # All processes train, or none.
        problem = agree(problem)
    if problem is not None:
        tell(console, f"cache: {folder} is made again: {problem}")
        return None
    tell(console, f"teacher: {origin}, fine-tuned before, from {folder}")
    return found
