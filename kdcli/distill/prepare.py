"""From a recipe to all that can be checked before any work: one preparation for the dry run, the run and `compare`.

What `prepare` accepts, a run refuses only for what shows while it works: a model that diverges, a black box that
answers with no label, a full disk.
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcli.data.rows import array_of
from kdcli.distill.alignment import aligned, alignment_of
from kdcli.distill.downstream import tasks_of
from kdcli.distill.filler import FillerStart, start_filler
from kdcli.distill.resolve import Resolved, context_of, for_task, head_needed, placed, resolve, stages_of, with_start
from kdcli.distill.scale import check_scale
from kdcli.distill.states import StatesPlan, plan_states
from kdcli.distill.teacher import TeacherStart, labelling_of, start_teacher
from kdcli.distill.tokens import check_tokens, notes_of_tokens
from kdcli.distill.top_tokens import check_cut
from kdcli.distill.vocabulary import plan_vocabulary
from kdcli.errors import InputError
from kdcli.export.genai import Form
from kdcli.export.latency import check_grid
from kdcli.gates import Limits
from kdcli.methods.base import Context, Stage, Term
from kdcli.models.blocks import iter_block_matrices, pairs_of_alike
from kdcli.models.families import family_of
from kdcli.models.heads import BASE, Head, Labelling, check_body
from kdcli.models.overparam import check_chains
from kdcli.models.processors import check_processor, check_same_reading
from kdcli.models.shape import token_counts
from kdcli.models.student import StudentBuild, build_student
from kdcli.models.vocabulary import Trimming, trimmed
from kdcli.recipe.schema import FinetuneSection, OverparamSection, Recipe, StudentSection
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task
from kdcli.tasks.parts import sets_of
from kdcli.training.distributed import processes
from kdcli.training.growing import check_turns
from kdcli.training.settings import LoopSettings, check_batch, check_device

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedModel


def check_scored(limits: Limits, task: Task) -> None:
    """Raise InputError for limits of a score where the rows of a task have no gold answers to score with."""
    if task.scored_by_loss and (limits.score is not None or limits.retention is not None):
        name = "fail_under" if limits.score is not None else "fail_under_retention"
        raise InputError(
            f"{task.name} has nothing to score a student with",
            where=f"evaluate.{name}",
            hint=task.kind.unscored or "leave it out",
        )


@dataclass(frozen=True)
class Follower:
    """The assistant or the student as it will be built: its shape and its stages; its weights mean nothing.

    build: on the meta device, unless it is a checkpoint. follows: the same of the model that teaches it.
    alignment: the terms of its stages that are not the method's.
    overparam: the chains that it is trained as; tensors_of: the shape of the model whose tensors they are compared
    with, in `tensor_pairs` of blocks. states: what is kept on disk of the model that teaches it. reading: what a user
    should know about what it reads.
    """

    name: str
    section: StudentSection
    overparam: OverparamSection | None
    build: StudentBuild
    follows: "PreTrainedModel"
    context: Context
    alignment: list[Term]
    stages: list[Stage]
    states: StatesPlan | None
    tensors_of: "PreTrainedModel"
    tensor_pairs: list[tuple[int, int]]
    reading: list[str]

    @property
    def model(self) -> "PreTrainedModel":
        return self.build.model

    @property
    def notes(self) -> list[str]:
        """What its method cannot compare of it, or of the model that teaches it."""
        terms = [term for stage in self.stages for term in stage.terms if term.weight > 0]
        families = {family.name: family for family in map(family_of, (self.model.config, self.follows.config))}
        positions = [
            f"the attention of {family.title} adds terms of positions to q k^T, which are not compared"
            for family in families.values()
            if family.attention != "dot-product" and any(term.objective.student_request().attention for term in terms)
        ]
        return [*positions, *notes_of_tokens(self.stages, self.context)]


@dataclass(frozen=True)
class Prepared:
    """A recipe that has been checked: its task, the start of its teacher, and the shapes of what follows it.

    downstream: the tasks of `[[finetune]]`. head: what stands on the teacher's body. labelling: of the outputs of a
    student from a checkpoint. filler: the masked language model of `[task.augment]`. trimming: of the vocabulary of
    what follows the teacher. world: the processes that it is prepared for.
    """

    resolved: Resolved
    task: Task
    downstream: list[Task]
    head: Head
    labelling: Labelling
    teacher: TeacherStart
    followers: list[Follower]
    filler: FillerStart | None
    trimming: Trimming | None
    world: int

    @property
    def processor(self) -> Any:
        """What the models that follow the teacher read by."""
        return self.teacher.processor if self.trimming is None else self.trimming.tokenizer

    @property
    def kept(self) -> "np.ndarray | None":
        """The ids of the teacher's vocabulary that they have; None for all."""
        return None if self.trimming is None else self.trimming.kept

    def load_sources(self) -> None:
        """Load the user's code and files that the method works with, such as a black box."""
        self.resolved.method.load_sources(self.resolved.options, self.task, self.resolved.base)

    def examples(self, rows: "Dataset") -> list[int]:
        """Return how many examples rows of the task give a model, of each of its parts."""
        return examples_of(self.task, rows, self.processor, self.resolved.recipe.task.max_length)

    @cached_property
    def examples_of_parts(self) -> list[int]:
        """The most examples of each part that a student is trained on: not all rows may give so many copies."""
        augment = self.resolved.recipe.task.augment
        each = 1 + augment.copies if augment is not None else 1
        return [count * each for count in self.examples(self.task.train)]

    @property
    def training_examples(self) -> int:
        """The most examples that a student is trained on."""
        return sum(self.examples_of_parts)

    @cached_property
    def state_bytes(self) -> dict[str, int]:
        """The bytes of the states that are kept of a teacher, by student; with copies of rows about that many."""
        if all(follower.states is None for follower in self.followers):
            return {}
        section, kind = self.resolved.recipe.task, self.task.kind
        encoded = kind.prepare_sample(self.task, self.processor, section.max_length, seed=self.resolved.loop.seed)
        lengths = array_of(encoded.train, "length")
        copies = 1 + (section.augment.copies if section.augment is not None else 0)
        return {
            each.name: copies * int(token_counts(each.follows.config, lengths).sum()) * each.states.layout.token_bytes
            for each in self.followers
            if each.states is not None
        }

    @property
    def notes(self) -> list[str]:
        """What a user should know about the data, of the tasks of `[[finetune]]` with their names, and the models."""
        downstream = [f"{task.name}: {note}" for task in self.downstream for note in task.notes]
        vocabulary = [f"vocabulary: {note}" for note in self.trimming.notes] if self.trimming is not None else []
        reading = [f"{each.name}: {note}" for each in self.followers for note in each.reading]
        return [*self.task.notes, *downstream, *self.teacher.notes, *vocabulary, *reading]

    @property
    def method_notes(self) -> list[str]:
        """What the method chose for the user, and what it cannot compare."""
        method, options = self.resolved.method, self.resolved.options
        notes = [(*method.notes(options, follower.context), *follower.notes) for follower in self.followers]
        schemes = [stage.scheme for follower in self.followers for stage in follower.stages if stage.scheme is not None]
        length = self.resolved.recipe.task.max_length
        features = partial(self.task.kind.feed, self.task.train, self.processor, length)
        notes += [tuple(scheme.notes(features, length)) for scheme in schemes]
        return list(dict.fromkeys(itertools.chain(*notes)))


def prepare(recipe: Recipe, recipe_path: Path, world: int | None = None) -> Prepared:
    """Read a recipe's data, models and their processors, and check that they fit each other. Trains and writes nothing.

    world: the processes that are to run it; None for as many as there are now.
    Raises InputError for whatever is wrong, with the field that would have to change.
    """
    world = world or processes()
    resolved = resolve(recipe, recipe_path)
    base = resolved.base
    task = load_task(recipe.task, recipe.evaluate, base=base)
    resolved = for_task(resolved, task)
    downstream = tasks_of(recipe, base)
    head = head_needed(resolved, task)
    teacher = start_teacher(recipe, task, head, base=base, world=world)
    task.kind.check(task, teacher.processor, recipe.task.max_length)
    remarks = task.kind.remarks(task, teacher.processor, recipe.task.max_length)
    left = {} if task.kind.features is not None else _left(task, teacher.processor, recipe.task.max_length)
    task = replace(
        task, notes=(*task.notes, *remarks), description={**task.description, "remarks": remarks, "left": left}
    )
    _check_loops(resolved, teacher, world)
    for number, (section, other) in enumerate(zip(recipe.finetune, downstream, strict=True)):
        with placed(f"finetune[{number}].task", "task"):
            check_body(teacher.model.config, other.kind.head, teacher.origin, "task.type")
            check_processor(teacher.model, teacher.processor, section.task.max_length)
            other.kind.check(other, teacher.processor, section.task.max_length)
            remarks = other.kind.remarks(other, teacher.processor, section.task.max_length)
            downstream[number] = replace(other, notes=(*other.notes, *remarks))
    filler = start_filler(recipe, task, base, world) if recipe.task.augment is not None else None
    labelling = labelling_of(task.kind, task.label_names, head)
    trimming = plan_vocabulary(resolved, task, downstream, teacher)
    followers = _followers(teacher, resolved, task, head, labelling, trimming)
    student = followers[-1]
    if recipe.export.onnx:
        models = {"teacher": teacher.model.config, "student": student.model.config}
        check_grid(
            models,
            recipe.export.sequence_lengths,
            recipe.export.image_sizes,
            names=("export.sequence_lengths", "export.image_sizes"),
        )
        form = Form(recipe.export.opset, recipe.export.builder, recipe.export.precision, where="export.{}")
        form.by_builder(student.model, head)
    if (
        recipe.overparam is not None
        and recipe.overparam.select == "static"
        and (head == BASE or not task.kind.has_gold)
    ):
        raise InputError(
            'overparam.select = "static" needs the loss of gold answers, and there are none that the student predicts',
            where="overparam.select",
            hint='use "dynamic", or leave it out',
        )
    if recipe.overparam is not None and resolved.student.energy is None:
        check_chains(student.model, recipe.overparam, student.tensors_of, student.tensor_pairs)
    prepared = Prepared(resolved, task, downstream, head, labelling, teacher, followers, filler, trimming, world)
    if recipe.overparam is not None and recipe.overparam.select == "dynamic":
        _check_growth(student, world)
        check_turns(recipe.overparam, steps_of(student, resolved, prepared.training_examples))
    return prepared


def _left(task: Task, processor: Any, max_length: int) -> dict[str, int]:
    """Return how many rows of each set are left, where some are dropped as too long."""
    sets = {"train": task.train, "selection": task.selection}
    counts = {name: (len(rows), sum(examples_of(task, rows, processor, max_length))) for name, rows in sets.items()}
    return {name: left for name, (rows, left) in counts.items() if left < rows}


def examples_of(task: Task, rows: "Dataset", processor: Any, max_length: int) -> list[int]:
    """Return how many examples rows of a task give a model, of each of its parts."""
    return [task.kind.examples(part, processor, max_length) for part in sets_of(rows)]


def stage_loop(resolved: Resolved, stage: Stage, total: int, examples: int) -> LoopSettings:
    """Return the loop of one stage: its share of the steps, or its own epochs, and its own learning rate.

    Its own schedule is a default: what the recipe says comes first.
    """
    loop, written = resolved.loop, resolved.recipe.train
    if stage.epochs is not None and loop.max_steps is None:
        steps = math.ceil(stage.epochs * math.ceil(examples / loop.batch_size))
    else:
        steps = max(1, round(stage.share * total))
    rate = stage.learning_rate or loop.learning_rate
    chain = loop.chain_learning_rate
    return replace(
        loop,
        max_steps=steps,
        learning_rate=rate,
        scheduler=written.scheduler or stage.scheduler or loop.scheduler,
        warmup=stage.warmup if stage.warmup is not None and written.warmup is None else loop.warmup,
        chain_learning_rate=chain * rate / loop.learning_rate if isinstance(chain, float) else chain,
    )


def steps_of(follower: Follower, resolved: Resolved, examples: int) -> list[int]:
    """Return the optimizer steps of each of a follower's stages. examples: that it is trained on."""
    total = resolved.loop.steps(examples)
    return [stage_loop(resolved, stage, total, examples).max_steps or 0 for stage in follower.stages]


def _check_growth(student: Follower, world: int) -> None:
    """Raise InputError where matrices cannot become chains in the middle of a training."""
    reason = None
    if world > 1:
        reason = "which several processes could not follow"
    elif any(stage.scheme is not None and stage.scheme.keeps_parameters for stage in student.stages):
        reason = "while the method remembers the student's parameters"
    elif any(matrix.is_fused for _, matrix in iter_block_matrices(student.model)):
        reason = f"and {family_of(student.model.config).title} has several of them in one"
    if reason is not None:
        raise InputError(
            f'overparam.select = "dynamic" replaces matrices in the middle of a training, {reason}',
            where="overparam.select",
            hint='use "static", or leave it out',
        )


def _check_loops(resolved: Resolved, teacher: TeacherStart, world: int) -> None:
    """Raise InputError for a device that is not there, or a batch that cannot be split over the processes."""
    recipe, loop = resolved.recipe, resolved.loop
    check_device(loop.device)
    check_batch(loop.batch_size, loop.gradient_accumulation, world, "train.batch_size")
    if teacher.trains:
        section = recipe.teacher.finetune
        tuning = section if isinstance(section, FinetuneSection) else FinetuneSection()
        check_batch(tuning.batch_size, 1, world, "teacher.finetune.batch_size")
    for number, table in enumerate(recipe.finetune):
        check_batch(table.batch_size, 1, world, f"finetune[{number}].batch_size")


def _followers(
    teacher: TeacherStart,
    resolved: Resolved,
    task: Task,
    head: Head,
    labelling: Labelling,
    trimming: Trimming | None,
) -> list[Follower]:
    """Return the assistant, if any, and the student, each beside the model that it follows."""
    base, processor, kept = shape_only(teacher.model), teacher.processor, None
    if trimming is not None:
        processor, kept = trimming.tokenizer, trimming.kept
        base = trimmed(base, kept)
    nearest, length = base, resolved.recipe.task.max_length

    def examples() -> int:
        return sum(examples_of(task, task.train, processor, length))

    followers = []
    for name, section in resolved.sections.items():
        with placed(name):
            reading: list[str] = []
            if section.model is not None:
                reading = check_same_reading(teacher.processor, section.model, "student.model")
            if resolved.from_base:
                _check_base(teacher, section, resolved)
            # What the student is cut from answers the task, but for the base of the teacher and a body alone.
            section = with_start(section, has_loss=head != BASE and task.kind.has_gold and not resolved.from_base)
            if section.sequential and (family := family_of(nearest.config)).repeated:
                raise InputError(
                    f"the blocks of {family.title} are one, run again and again, so none comes after another",
                    where="student.sequential",
                    hint="leave it out",
                )
            overparam = resolved.recipe.overparam if name == "student" else None
            build = _shadow(base if resolved.from_base else nearest, section, overparam, labelling, kept)
            context = context_of(nearest, build, task, resolved.recipe)
            stages = stages_of(resolved, context, build.model, nearest if teacher.known else None, examples)
            alignment = alignment_of(nearest, build, section)
            stages = aligned(stages, alignment, known=teacher.known)
            check_tokens(resolved.recipe, stages, context)
        check_scale(resolved.recipe, stages, build.model, overparam)
        states = plan_states(resolved.recipe, task.kind, stages, nearest)
        check_cut(resolved.recipe, task.kind, stages, context.teacher.vocab or 0)
        tensors_of, pairs = nearest, context.pairs or pairs_of_alike(build.model, nearest)
        if hides_teacher(resolved):
            if overparam is not None and overparam.aux_weight > 0 and not teacher.trains:
                raise InputError(
                    f"{resolved.method.name} shows the student nothing of the fine-tuned teacher but its labels, and "
                    "there is no base model whose tensors its own could be compared with",
                    where="overparam.aux_weight",
                    hint="set aux_weight = 0",
                )
            tensors_of = base
            if build.teacher_layers is not None:
                pairs = [(number, layer + 1) for number, layer in enumerate(build.teacher_layers, 1)]
        follower = Follower(
            name, section, overparam, build, nearest, context, alignment, stages, states, tensors_of, pairs, reading
        )
        followers.append(follower)
        nearest = build.model
    return followers


def hides_teacher(resolved: Resolved) -> bool:
    """True when the student must know nothing of its teacher's weights, only of what they were before fine-tuning."""
    return resolved.from_base == {"student"}


def _check_base(teacher: TeacherStart, section: StudentSection, resolved: Resolved) -> None:
    """Raise InputError for a start from the teacher's base model, where there is none."""
    learns = "teacher" in resolved.from_base
    if learns and resolved.assistant is not None:
        raise InputError(
            "an assistant has no base model that its student's teacher could start from",
            where="assistant",
            hint="leave it out, or method.from_base",
        )
    apart = section.form == "checkpoint" or (section.form == "width" and section.init == "random")
    if teacher.trains or (apart and not learns):
        return
    if learns:
        where, hint = "teacher.model", "name the model that it was fine-tuned from"
    else:
        where, hint = "student.form", 'use form = "checkpoint" with the model that it was fine-tuned from, and layers'
    raise InputError(
        f"{resolved.method.name} starts from the model that the teacher was before its fine-tuning, and "
        f"{teacher.origin} is fine-tuned already",
        where=where,
        hint=hint,
    )


def shape_only(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a copy on the meta device; weights that are shared stay shared, which `.to("meta")` would undo."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})


def _on_meta(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _shadow(
    teacher: "PreTrainedModel",
    section: StudentSection,
    overparam: OverparamSection | None,
    labelling: Labelling,
    kept: "np.ndarray | None",
) -> StudentBuild:
    """Return a student of the right shape. Its weights mean nothing, unless it is a checkpoint."""
    if section.form == "checkpoint":
        return build_student(teacher, section, seed=0, labelling=labelling, kept=kept)
    if section.energy is not None:
        # The ranks depend on weights that are not there yet; what a method asks of a shape does not depend on them.
        written = section.model_dump(exclude={"energy"}, exclude_unset=True)
        section = StudentSection.model_validate({**written, "rank": 1})
    with torch.device("meta"):
        return build_student(teacher, section, seed=0, overparam=overparam)
