"""From a recipe to a recipe with every default filled in, and what can be checked before any work."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.errors import InputError, UnfitTaskError
from kdcli.files import source_of
from kdcli.methods import registry
from kdcli.methods.base import Context, Method, Stage
from kdcli.methods.layer_maps import uniform
from kdcli.models.heads import BASE, Head
from kdcli.models.load import load_config
from kdcli.models.shape import ModelShape, OuterShape, UnseenError, shape_of
from kdcli.models.student import StudentBuild
from kdcli.recipe.schema import FORM_FIELDS, Recipe, StudentSection
from kdcli.tasks import registry as kinds
from kdcli.tasks.base import Task
from kdcli.tasks.kind import CAPABILITIES, TaskKind
from kdcli.training.settings import LoopSettings
from kdcli.words import joined, one

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Resolved:
    """A recipe with every default filled in."""

    recipe: Recipe
    name: str
    base: Path
    method: Method
    options: Any
    student: StudentSection
    assistant: StudentSection | None
    loop: LoopSettings

    @property
    def from_base(self) -> frozenset[str]:
        """Which of "student" and "teacher" start from what the teacher was before its fine-tuning."""
        return self.method.from_base(self.options)

    @property
    def sections(self) -> dict[str, StudentSection]:
        """The models on the way from the teacher, each taught by the one before: the assistant, if any; the student."""
        student = {"student": self.student}
        return {"assistant": self.assistant, **student} if self.assistant is not None else student


def resolve(recipe: Recipe, recipe_path: Path) -> Resolved:
    """Fill in what the recipe left to the method. Reads no data. Raises InputError for what does not go together."""
    method = registry.get(recipe.method.name)
    kind = kinds.get(recipe.task.type) if recipe.task.type is not None else None
    if kind is not None:
        _check_kind(method, kind, recipe.task.name)
    options = method.options.model_validate(recipe.method.options)
    base = recipe_path.resolve().parent
    student = _student(recipe, method, kind, base)
    assistant = recipe.assistant
    if assistant is not None:
        assistant = _filled(assistant, {"form": "width"}, "assistant", method)
    if recipe.teacher.black_box:
        _check_black_box(recipe, method, options, student)
    return Resolved(
        recipe=recipe,
        name=recipe.name or recipe_path.stem,
        base=base,
        method=method,
        options=options,
        student=student,
        assistant=_found(assistant, base) if assistant is not None else None,
        loop=_loop(recipe, method, kind),
    )


def for_task(resolved: Resolved, task: Task) -> Resolved:
    """Return a resolved recipe with what its task settles. Raises InputError when the method cannot work on it."""
    _check_kind(resolved.method, task.kind, resolved.recipe.task.name)
    resolved.method.check_sources(resolved.options, task, resolved.base)
    loop = _loop(resolved.recipe, resolved.method, task.kind)
    mixture: dict[str, Any] = {"parts": task.parts, "mixing_temperature": task.mixing_temperature}
    student = _student(resolved.recipe, resolved.method, task.kind, resolved.base)
    return replace(resolved, student=student, loop=replace(loop, metric=task.primary, **mixture))


def _loop(recipe: Recipe, method: Method, kind: TaskKind | None) -> LoopSettings:
    tokens = kind is not None and "vocabulary" in kind.provides
    return LoopSettings.from_train(recipe, {**method.train, **(method.text_train if tokens else {})})


def _student(recipe: Recipe, method: Method, kind: TaskKind | None, base: Path) -> StudentSection:
    on_images = kind is not None and "images" in kind.provides
    defaults = {"form": "depth", **method.student, **(method.image_student if on_images else {})}
    return _found(_filled(recipe.student, defaults, "student", method), base)


def _check_kind(method: Method, kind: TaskKind, name: str) -> None:
    if lacking := sorted(method.needs - kind.provides):
        raise UnfitTaskError(
            f"{method.name} works on {joined(kinds.providing(method.needs))} tasks: it needs "
            f"{joined([CAPABILITIES[name] for name in lacking])}; {name} is {one(kind.name)} task",
            where="method.name",
            hint=f"use {', '.join(other.name for other in registry.usable()[0] if other.needs <= kind.provides)}",
        )


def _check_black_box(recipe: Recipe, method: Method, options: Any, student: StudentSection) -> None:
    """Raise InputError for a recipe that asks more of a black box than answers."""
    if not method.teacherless(options):
        raise InputError(
            f"answers of a black box are not enough for {method.name} as it is set up",
            where="teacher.black_box",
            hint='use method "dbkd" with black_box = {callable, command or decisions = ...}',
        )
    if student.form != "checkpoint":
        raise InputError(
            "a student cannot be cut from a black box", where="student.form", hint='use form = "checkpoint"'
        )
    if recipe.assistant is not None:
        raise InputError("an assistant cannot be cut from a black box", where="assistant", hint="leave it out")
    if recipe.overparam is not None and recipe.overparam.aux_weight > 0:
        raise InputError(
            "a black box has no tensors to compare with", where="overparam.aux_weight", hint="set aux_weight = 0"
        )


def _filled(section: StudentSection, defaults: dict[str, Any], table: str, method: Method) -> StudentSection:
    """Return a section with `defaults`, a form among them, in place of what it leaves out.

    Raises InputError for a field that belongs to another form, where the recipe names none.
    """
    form = defaults["form"]
    if section.form not in (None, form):
        return section
    if unsupported := section.unsupported_fields(form):
        fitting = [f'form = "{name}"' for name in FORM_FIELDS if not section.unsupported_fields(name)]
        raise InputError(
            f'form = "{form}", which {method.name} takes for the {table} where none is given, has no '
            f"{', '.join(unsupported)}",
            where=f"{table}.{unsupported[0]}",
            hint=f"add {' or '.join(fitting)}" if fitting else None,
        )
    written = section.model_dump(exclude_unset=True)
    sizes = {"budget", "rank", "params", "energy"}
    if sizes & set(written):
        defaults = {key: value for key, value in defaults.items() if key not in sizes}
    return StudentSection.model_validate({**defaults, **written})


def _found(student: StudentSection, base: Path) -> StudentSection:
    """Return a section whose model, where it is a folder, is named as seen from anywhere."""
    if student.model is None:
        return student
    return student.model_copy(update={"model": source_of(student.model, base)})


def context_of(teacher: "PreTrainedModel", build: StudentBuild, task: Task, recipe: Recipe) -> Context:
    """Return what a method may know of the two models: their shapes, never their weights."""
    from kdcli.models.lowrank import LowRankEmbedding

    teacher_shape, student_shape = shape_of(teacher.config), shape_of(build.model.config)
    return Context(
        teacher=teacher_shape,
        student=student_shape,
        student_form=build.form,
        kind=task.kind,
        pairs=_pairs(build, student_shape, teacher_shape),
        seed=recipe.seed,
        augmented=recipe.task.augment is not None,
        projected=build.projected,
        factored_embeddings=any(isinstance(module, LowRankEmbedding) for module in build.model.modules()),
        max_length=recipe.task.max_length,
    )


def _pairs(build: StudentBuild, student: ModelShape, teacher: ModelShape) -> list[tuple[int, int]]:
    """Return which teacher block each student block follows: of decoders and of images, the one that it is a copy of.

    The last one follows the last: both are compared after the norm that follows it.
    """
    if isinstance(student, OuterShape) or isinstance(teacher, OuterShape):
        return []
    if teacher.uneven and build.teacher_layers is not None and len(build.teacher_layers) == student.layers:
        followed = [*build.teacher_layers[:-1], teacher.layers - 1]
        return [(number, layer + 1) for number, layer in enumerate(followed, 1)]
    return uniform(student.layers, teacher.layers)


def with_start(section: StudentSection, *, has_loss: bool) -> StudentSection:
    """Return the section of a low-rank student with what its factors start from; others as they are.

    has_loss: the model that it is cut from answers the task, so that its loss has gradients. Raises InputError for a
    start that needs them where there are none.
    """
    if section.form != "low-rank":
        return section
    start = section.init or ("both" if has_loss else "activations")
    for name, needs in (("init", start in ("gradients", "both")), ("ranks", section.ranks == "spread")):
        if needs and not has_loss:
            raise InputError(
                f'{name} = "{getattr(section, name)}" needs the gradients of a loss, and the model that the student is '
                "cut from does not answer the task",
                where=f"student.{name}",
                hint='use init = "activations" or "svd"' if name == "init" else 'use ranks = "even"',
            )
    if section.budget == 1.0:
        # Nothing is factorised, but for the embeddings.
        start = "svd" if section.embedding_rank is None else start
        return section.model_copy(update={"init": start, "ranks": "even"})
    divides = section.rank is None and section.energy is None
    ranks = section.ranks or ("spread" if has_loss and divides else "even")
    looks = start != "svd" or ranks == "spread"
    idle = {
        "sequential": section.sequential and start not in ("activations", "both"),
        "init_samples": section.init_samples != StudentSection.model_fields["init_samples"].default and not looks,
    }
    if unused := [name for name, is_idle in idle.items() if is_idle]:
        raise InputError(
            f'init = "{start}" does not look at the inputs of training rows',
            where=f"student.{unused[0]}",
            hint='leave it out, or use init = "both" or "activations"',
        )
    return section.model_copy(update={"init": start, "ranks": ranks})


@contextmanager
def placed(name: str, table: str = "student") -> Iterator[None]:
    """Let errors about a table name the one that has its fields: `[assistant]` those of `[student]`."""
    try:
        yield
    except InputError as error:
        where = error.where and re.sub(rf"^{table}(?=\.|$)", name, error.where)
        hint = error.hint and re.sub(rf"(?<![\w.]){table}\.(?=\w)", f"{name}.", error.hint)
        raise type(error)(error.message, where=where or name, hint=hint) from error


def stages_of(
    resolved: Resolved,
    context: Context,
    student: "PreTrainedModel",
    teacher: "PreTrainedModel | None",
    examples: Callable[[], int],
) -> list[Stage]:
    """Return the method's stages. Raises InputError for what it, or the scheme of a stage, cannot work with.

    examples: counts those of training.
    """
    with _refusing_unseen(resolved.method.name):
        resolved.method.check(resolved.options, context)
        stages = resolved.method.build(resolved.options, context)
    _check_seen(resolved.method.name, stages, context)
    for stage in stages:
        if stage.scheme is not None:
            stage.scheme.check(resolved.loop, student, teacher, examples())
    return stages


@contextmanager
def _refusing_unseen(method: str) -> Iterator[None]:
    """Let the error for a size inside a model whose outputs alone are seen name the method that asked for it."""
    try:
        yield
    except UnseenError as error:
        raise _unseen(method, error.title, error.reason) from error


def _unseen(method: str, title: str, reason: str) -> InputError:
    return InputError(
        f"{method} looks inside both models, and of {title} kdcli sees outputs only, because {reason}",
        where="method.name",
        hint="use a method that compares predictions alone, such as kd, or models of other families: `kdcli families` "
        "lists them",
    )


def _check_seen(method: str, stages: list[Stage], context: Context) -> None:
    """Raise InputError where a method asks for more than outputs of a model of which only these are seen."""
    terms = [term for stage in stages for term in stage.terms if term.weight > 0]
    for shape, requests in (
        (context.teacher, [term.objective.teacher_request() for term in terms]),
        (context.student, [term.objective.student_request() for term in terms]),
    ):
        if isinstance(shape, OuterShape) and any(request.inside for request in requests):
            raise _unseen(method, shape.title, shape.reason)


def head_needed(resolved: Resolved, task: Task) -> Head:
    """Return what must stand on the teacher's body: the head of the kind of task; for a general student it, or nothing.

    For such a student a head is needed where some term compares predictions, and where a teacher is to be trained.
    """
    if not task.kind.general:
        return task.kind.head
    teacher = resolved.recipe.teacher
    if teacher.model is None or teacher.finetune not in (None, False):
        return task.kind.head
    shape = shape_of(load_config(source_of(teacher.model, resolved.base)))
    blocks = [(layer, layer) for layer in range(1, shape.layers + 1)]
    stages = resolved.method.build(resolved.options, Context(shape, shape, "checkpoint", task.kind, blocks))
    return task.kind.head if trains_head(stages) else BASE


def trains_head(stages: list[Stage]) -> bool:
    """True when some term of weight needs the student's predictions."""
    return any(t.objective.student_request().logits for stage in stages for t in stage.terms if t.weight > 0)
