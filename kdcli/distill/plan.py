"""What a recipe would do, told from what was prepared for it, without doing it (`kdcli distill --dry-run`)."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kdcli.data.mixing import shares
from kdcli.distill.memory import Memory, memory_of_step
from kdcli.distill.prepare import Follower, Prepared, shape_only, stage_loop
from kdcli.distill.resolve import Resolved, placed
from kdcli.machine import resolve_precision
from kdcli.models.counts import count_parameters
from kdcli.models.overparam import OverparamReport, candidates, overparameterise, teacher_factors
from kdcli.models.student import StudentBuild, build_student
from kdcli.models.vocabulary import trimmed, vocabulary_megabytes
from kdcli.recipe.schema import OverparamSection
from kdcli.tasks.base import Task
from kdcli.training.distributed import may_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Classes:
    """How many classes a task has, and those with the fewest training rows."""

    number: int
    rarest: dict[str, int]


@dataclass(frozen=True)
class PlannedPart:
    """examples: for training. share: of the examples of every step."""

    name: str
    examples: int
    share: float


@dataclass(frozen=True)
class PlannedTask:
    """sizes: examples (of plain text: blocks) of each set. notes: what a user should know about data and teacher.

    parts: of a task that is made of several.
    """

    name: str
    kind: str
    fingerprint: str
    sizes: dict[str, int]
    classes: Classes | None
    notes: list[str]
    parts: list[PlannedPart]


@dataclass(frozen=True)
class PlannedMethod:
    """notes: what was chosen for the user, and what cannot be compared."""

    name: str
    title: str
    options: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class PlannedTeacher:
    """parameters: None for a black box."""

    origin: str
    preparation: str
    parameters: int | None


@dataclass(frozen=True)
class PlannedStage:
    """terms: {name: weight}."""

    name: str
    steps: int
    learning_rate: float
    terms: dict[str, float]


@dataclass(frozen=True)
class PlannedAssistant:
    form: str
    parameters: int
    notes: list[str]
    stages: list[PlannedStage]


@dataclass(frozen=True)
class PlannedStudent:
    """teacher_layers: the blocks of the teacher, from 0, that its own are copies of."""

    form: str
    parameters: int
    notes: list[str]
    teacher_layers: list[int] | None


@dataclass(frozen=True)
class PlannedVocabulary:
    """The teacher's and the student's: pieces, and the megabytes of their embeddings and of an output a piece."""

    pieces: tuple[int, int]
    megabytes: tuple[float, float]


@dataclass(frozen=True)
class PlannedTuning:
    task: str
    sizes: dict[str, int]
    seeds: int
    against: list[str]


@dataclass(frozen=True)
class PlannedChains:
    """parameters: of the student while it is trained. matched, unmatched: matrices with and without teacher tensors."""

    matrices: int
    tensors: int
    parameters: int
    matched: int
    unmatched: int


@dataclass(frozen=True)
class PlannedStates:
    """What is kept of a teacher's inside while a student trains. exact: False where copies of rows are trained on."""

    student: str
    bytes: int
    dtype: str
    exact: bool


@dataclass(frozen=True)
class PlannedLoop:
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Plan:
    """The models, counts, steps, matched matrices and memory of a run.

    stages: of the student. pairs: (student block, teacher block), counted from 1.
    """

    name: str
    seed: int
    task: PlannedTask
    method: PlannedMethod
    teacher: PlannedTeacher
    assistant: PlannedAssistant | None
    student: PlannedStudent
    vocabulary: PlannedVocabulary | None
    finetune: list[PlannedTuning]
    overparam: PlannedChains | None
    pairs: list[tuple[int, int]]
    stages: list[PlannedStage]
    train: PlannedLoop
    states: list[PlannedStates]
    memory: Memory

    @property
    def every_stage(self) -> list[PlannedStage]:
        """The stages of the assistant, whose training is part of what a student costs, and of the student."""
        return [*(self.assistant.stages if self.assistant is not None else []), *self.stages]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def make_plan(prepared: Prepared) -> Plan:
    """Return the plan of a recipe that has been checked. Trains nothing, writes nothing."""
    resolved, task, start, recipe = prepared.resolved, prepared.task, prepared.teacher, prepared.resolved.recipe
    builds = _builds(prepared)
    student, build = prepared.followers[-1], builds[-1]
    sizes, examples = _sizes(prepared)
    total = resolved.loop.steps(examples)
    stages = [_stages(follower, resolved, total, examples) for follower in prepared.followers]
    assistant = None
    if resolved.assistant is not None:
        first = prepared.followers[0].build
        assistant = PlannedAssistant(first.form, count_parameters(first.model), first.notes, stages[0])
    parameters = count_parameters(build.model)
    chains = _chains(student, build.model) if student.overparam is not None else None
    return Plan(
        name=resolved.name,
        seed=recipe.seed,
        task=PlannedTask(
            task.name,
            task.kind.name,
            task.description["fingerprint"],
            sizes,
            classes_of(task),
            prepared.notes,
            _parts(task, prepared.examples_of_parts),
        ),
        method=PlannedMethod(
            resolved.method.name, resolved.method.title, resolved.options.model_dump(), prepared.method_notes
        ),
        teacher=PlannedTeacher(
            start.origin,
            "fine-tuned first, or taken from the cache" if start.trains else "used as it is",
            count_parameters(start.model) if start.known else None,
        ),
        assistant=assistant,
        student=PlannedStudent(build.form, parameters, build.notes, build.teacher_layers),
        vocabulary=_vocabulary(prepared, build.model),
        finetune=[
            PlannedTuning(
                tuned.name,
                {"train": len(tuned.train), **tuned.scored},
                table.seeds,
                list(dict.fromkeys(table.against)),
            )
            for tuned, table in zip(prepared.downstream, recipe.finetune, strict=True)
        ],
        overparam=chains,
        pairs=student.context.pairs,
        stages=stages[-1],
        train=PlannedLoop(resolved.loop.batch_size, resolve_precision(resolved.loop.precision, resolved.loop.device)),
        states=[
            PlannedStates(name, size, recipe.teacher.cache_dtype, recipe.task.augment is None)
            for name, size in prepared.state_bytes.items()
        ],
        memory=_memory(prepared, builds),
    )


def _builds(prepared: Prepared) -> list[StudentBuild]:
    """Return the models that follow the teacher: as they were prepared, unless their ranks depend on weights."""
    followers, model = prepared.followers, prepared.teacher.model
    if all(follower.section.energy is None for follower in followers):
        return [follower.build for follower in followers]
    if prepared.kept is not None:
        model = trimmed(model, prepared.kept)
    builds = []
    for follower in followers:
        with placed(follower.name):
            seed = prepared.resolved.recipe.seed
            options: Any = {
                "overparam": follower.overparam,
                "labelling": prepared.labelling,
                "kept": prepared.kept,
            }
            builds.append(build_student(model, follower.section, seed=seed, **options))
        if not prepared.resolved.from_base:
            model = builds[-1].model
    return builds


def _vocabulary(prepared: Prepared, student: "PreTrainedModel") -> PlannedVocabulary | None:
    """Return how a student's vocabulary is smaller than its teacher's; None where it is the same."""
    if (trimming := prepared.trimming) is None:
        return None
    sizes = vocabulary_megabytes(prepared.teacher.model), vocabulary_megabytes(student)
    return PlannedVocabulary((trimming.pieces, len(trimming.kept)), sizes)


def _chains(student: Follower, model: "PreTrainedModel") -> PlannedChains:
    """Return the chains that a model will be trained as. model: the student with its true ranks."""
    assert student.overparam is not None
    section, matched, unmatched = student.overparam, 0, 0
    wide, report = _wide(model, section)
    if section.aux_weight > 0:
        found, skipped = teacher_factors(student.tensors_of, wide, student.tensor_pairs, section)
        matched, unmatched = len(found), len(skipped)
    tensors = section.length + 2 if section.factorization == "mpo" else 2
    return PlannedChains(len(report.rows), tensors, count_parameters(wide), matched, unmatched)


def _wide(model: "PreTrainedModel", section: OverparamSection) -> tuple["PreTrainedModel", OverparamReport]:
    """Return the shape of a model with its chains, and what these are: nothing is decomposed."""
    wide = shape_only(model)
    # Which matrices are selected is not known yet: as many as will be.
    chosen = list(candidates(wide, section))[: section.matrices] if section.matrices is not None else None
    return wide, overparameterise(wide, section, chosen)


def _memory(prepared: Prepared, builds: list[StudentBuild]) -> Memory:
    """Return what the training of the assistant or the student needs, whichever is more."""
    resolved, world = prepared.resolved, prepared.world
    sharded = world > 1 and may_shard(resolved.loop.sharding)
    found: list[Memory] = []
    for follower, build in zip(prepared.followers, builds, strict=True):
        model = build.model if follower.overparam is None else _wide(build.model, follower.overparam)[0]
        teacher = follower.follows if found else prepared.teacher.model
        known = teacher if prepared.teacher.known else None
        found.append(
            memory_of_step(resolved, resolved.loop, follower.stages, known, model, processes=world, sharded=sharded)
        )
    return max(found, key=lambda memory: memory.total)


def _sizes(prepared: Prepared) -> tuple[dict[str, int], int]:
    """Return the sizes of a task's parts, and how many training examples there are."""
    task, augment = prepared.task, prepared.resolved.recipe.task.augment
    unit = f" {task.kind.features}" if task.kind.features is not None else ""
    examples = prepared.training_examples
    report = task.scored if not task.scored_by_loss else {}
    name = f"train{unit}" if augment is None else f"train{unit} with copies"
    aside = {"calibration": len(task.calibration)} if task.calibration is not None else {}
    return {name: examples, **aside, f"selection{unit}": sum(prepared.examples(task.selection)), **report}, examples


def _parts(task: Task, examples: list[int]) -> list[PlannedPart]:
    """Return the parts of a task. examples: of each."""
    weights = shares(examples, task.mixing_temperature).tolist()
    return [PlannedPart(*part) for part in zip(task.parts, examples, weights, strict=bool(task.parts))]


def classes_of(task: Task, most: int = 5) -> Classes | None:
    """Return the number of a task's classes, and those with the fewest training rows; None where it has none."""
    counts = task.kind.count(task.train, task.label_names)
    if counts is None:
        return None
    rarest = counts.argsort(kind="stable")[:most]
    return Classes(len(task.label_names), {task.label_names[i]: int(counts[i]) for i in rarest})


def _stages(follower: Follower, resolved: Resolved, total: int, examples: int) -> list[PlannedStage]:
    planned = []
    for stage in follower.stages:
        loop = stage_loop(resolved, stage, total, examples)
        assert loop.max_steps is not None
        terms = {term.name: term.weight for term in stage.terms}
        planned.append(PlannedStage(stage.name, loop.max_steps, loop.learning_rate, terms))
    return planned
