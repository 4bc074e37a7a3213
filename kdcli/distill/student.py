"""A student: built, over-parameterised, trained stage by stage, contracted."""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import set_seed

from kdcli.distill.alignment import aligned
from kdcli.distill.chains import Chain, growing_chains, over_parameterise
from kdcli.distill.job import Job
from kdcli.distill.prepare import Follower, stage_loop
from kdcli.distill.resolve import trains_head
from kdcli.distill.start import factoriser_of, start_projections
from kdcli.distill.states import FOLDER, can_be_kept, checkpoints_of, teacher_request
from kdcli.distill.teacher import Teacher
from kdcli.distill.top_tokens import cut_of, known_tokens, told_cut
from kdcli.evaluation.score import scorer
from kdcli.files import atomic_folder, remove, write_json
from kdcli.manifest import check_manifest, is_sealed, write_manifest
from kdcli.methods.base import Stage, Term
from kdcli.models.counts import count_parameters
from kdcli.models.embedding import append_dense, settings_of
from kdcli.models.hashing import hash_of_model, hash_of_weights
from kdcli.models.overparam import contract_model
from kdcli.models.placement import take_home
from kdcli.models.processors import hash_of_processor
from kdcli.models.projections import merge
from kdcli.models.save import round_to_stored
from kdcli.models.shape import shape_of
from kdcli.models.student import StudentBuild, build_student
from kdcli.objectives.cores import TensorObjective
from kdcli.signals import Request
from kdcli.tasks.base import Task
from kdcli.terminal import warn
from kdcli.training.distributed import agree, main_does
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.training.step import Distiller
from kdcli.training.teacher_cache import known_outputs
from kdcli.training.teacher_states import KeptStates, StatesCollator, keep_states
from kdcli.training.teacher_tokens import KnownTokens, TokensCollator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "record.json"
"""What a finished stage's training was like, beside its weights."""


@dataclass
class Distilled:
    """A student at the end of its training, contracted.

    head_trained: some term needed its predictions. processor: what it reads by.
    """

    build: StudentBuild
    head_trained: bool
    hash_before: str
    overparam: dict[str, Any] | None
    contraction: dict[str, Any] | None
    training: list[dict[str, Any]]
    processor: Any

    @property
    def model(self) -> "PreTrainedModel":
        return self.build.model

    def handed_over(self, task: Task) -> "Distilled":
        """Return what the run hands over: the body where a general head was not trained; rounded as stored."""
        body_only = task.kind.general and not self.head_trained
        model = self.model.base_model if body_only else self.model
        round_to_stored(model)  # type: ignore[arg-type]
        return replace(self, build=replace(self.build, model=model))  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Return what run.json says of an assistant."""
        return {
            "form": self.build.form,
            "notes": self.build.notes,
            "parameters": count_parameters(self.build.model),
            "training": self.training,
        }


def distil(job: Job, task: Task, teacher: Teacher, follower: Follower) -> Distilled:
    """Build the follower of `teacher`, train it on the rows of `task`, and contract it."""
    resolved, name, seed = job.resolved, follower.name, job.recipe.seed
    folder = "" if name == "student" else name
    set_seed(seed)
    source = teacher.model if teacher.base is None else teacher.base
    with job.timed(f"{folder} start".strip()):
        factoriser = factoriser_of(job, task, source, teacher.processor, follower.section, follower.context, folder)
    with job.timed(name):
        build = build_student(
            source,
            follower.section,
            seed=seed,
            overparam=follower.overparam,
            labelling=job.prepared.labelling,
            factoriser=factoriser,
            kept=job.prepared.kept,
        )
    for note in build.notes:
        job.tell(f"{name}: {note}")
    if build.projected:
        with job.timed(f"{folder} start".strip()):
            start_projections(job, task, source, teacher.processor, build, follower.section)
    plain_hash = hash_of_weights(build.model)
    # Once more, with the weights of its own that a method brings: they are drawn after the student's.
    stages = resolved.method.build(resolved.options, follower.context)
    stages = aligned(stages, follower.alignment, known=teacher.known)
    # Checkpoints of another recipe, other data or another teacher belong to another training.
    identity = {
        "recipe": job.recipe.model_dump(),
        "data": task.description["fingerprint"],
        "teacher": hash_of_model(teacher.model),
        "tokenizer": hash_of_processor(teacher.processor),
        # What is computed from the teacher may be rounded otherwise on another machine.
        "start": plain_hash if build.form == "checkpoint" else None,
        "student": folder,
    }
    with job.timed("overparam"):
        chain = over_parameterise(job, task, teacher, follower, build, factoriser, folder=folder)
    # What it knows of a large model takes memory that the training needs.
    del factoriser
    with job.timed(f"{folder} train".strip()):
        training = _train(job, task, teacher, follower, build, stages, chain, folder=folder, identity=identity)
    merge(build.model)
    keep_bridges(build.model, stages, teacher.model)
    contraction = None
    if chain is not None:
        chain.complete(build.model, job.console)
        with job.timed("contract"):
            contraction = contract_model(build.model).to_json()
    return Distilled(
        build,
        trains_head(stages),
        plain_hash,
        chain.report.to_json() if chain is not None else None,
        contraction,
        training,
        teacher.processor,
    )


def keep_bridges(student: "PreTrainedModel", stages: list[Stage], teacher: "PreTrainedModel") -> None:
    """Put the maps that objectives keep behind the student's embedding, and a norm where the teacher ends with one."""
    terms = [term for stage in stages for term in stage.terms if term.weight > 0]
    for bridge in dict.fromkeys(term.objective.kept for term in terms):
        if bridge is not None:
            normalizes = {"type": "Normalize"} in settings_of(teacher)["modules"][-1:]
            append_dense(student, bridge.weight, bridge.bias, normalize=normalizes)


def _train(
    job: Job,
    task: Task,
    teacher: Teacher,
    follower: Follower,
    build: StudentBuild,
    stages: list[Stage],
    chain: Chain | None,
    *,
    folder: str,
    identity: dict[str, Any],
) -> list[dict[str, Any]]:
    """Train a student stage by stage, and return a record of each. folder: of its checkpoints and curves."""
    from kdcli.training.trainer import fit, load_weights

    resolved, title = job.resolved, f"{folder}: " if folder else ""
    length = resolved.recipe.task.max_length
    encoded = task.kind.prepare(task, teacher.processor, length, seed=resolved.loop.seed)
    train, collator = encoded.train, encoded.collator
    total = resolved.loop.steps(len(train))
    checkpoints = checkpoints_of(job.run.checkpoints, follower.name)
    kept: KeptStates | None = None
    records = []
    for number, stage in enumerate(stages, 1):
        terms = list(stage.terms)
        if chain is not None and chain.teacher:
            terms.append(Term("tensor", TensorObjective(chain.section.aux_reduction), chain.section.aux_weight))
        loop = stage_loop(resolved, stage, total, len(train))
        if not task.kind.chosen_by_loss and not trains_head([stage]):
            # The score of a head that nothing trains says nothing about which checkpoint is best.
            loop = replace(loop, select="last", patience=None)
        scheme = stage.scheme or Scheme()
        rows = scheme.begin(
            Setting(
                student=build.model,
                teacher=teacher.model if teacher.known else None,
                processor=teacher.processor,
                task=task,
                train=train,
                collator=collator,
                loop=loop,
                base=resolved.base,
                cache=bool(resolved.recipe.teacher.cache),
                console=job.console,
                overparam=chain.section if chain is not None else None,
                pairs=tuple(follower.context.pairs),
                start=teacher.base if "teacher" in resolved.from_base else None,
            )
        )
        factors = {**chain.teacher, **scheme.teacher_tensors()} if chain is not None and chain.teacher else None
        work = checkpoints / f"{number}-{stage.name}"
        final = work / "final"
        of = {**identity, "stage": work.name}
        finished = job.resume and agree(_is_usable(final, of, job.console))
        request, states = teacher_request(terms), None
        if follower.states is not None and can_be_kept(request) and not finished:
            kept = kept or keep_states(
                teacher.model,
                rows,
                collator,
                kind=task.kind,
                request=follower.states.request,
                layout=follower.states.layout,
                folder=checkpoints / FOLDER,
                batch_size=loop.eval_batch_size,
                device=loop.device,
                console=job.console,
            )
            states = kept
        tokens, record = None, {}
        if (cut := cut_of(resolved.recipe.teacher.top_k, terms)) is not None and not finished:
            tokens, lost = known_tokens(cut, scheme, build.model, rows, encoded.selection)
            record["cut"] = lost
            job.tell(told_cut(lost))
        distiller = make_distiller(
            build.model, terms, scheme, rows, held=encoded.selection, factors=factors, states=states, tokens=tokens
        )
        if finished:
            load_weights(distiller, final)
            distiller.close()
            records.append(json.loads((final / RECORD).read_text(encoding="utf-8")))
        else:
            source = _Source(rows, encoded.selection, collator)
            source = source.with_states(states) if states is not None else source
            source = source.with_tokens(tokens) if tokens is not None else source
            record |= fit(
                distiller,
                train=source.rows,
                selection=source.held,
                collator=source.collator,
                metrics=None if task.kind.chosen_by_loss else scorer(task, encoded.selection),
                settings=loop,
                folder=work,
                log_dir=job.run.log / folder / stage.name,
                title=title + (stage.name if len(stages) == 1 else f"{number}/{len(stages)} {stage.name}"),
                console=job.console,
                identity=of,
                scheme=scheme,
                growing=growing_chains(chain, build, loop, job.console),
                resume=job.resume,
            )
            records.append({"stage": stage.name, **record})
            main_does(partial(_keep_stage, final, of, distiller, records[-1]))
        scheme.end()
    # They are large, and of no use to anything but this training.
    main_does(lambda: remove(checkpoints / FOLDER))
    build.model.eval().to("cpu")  # type: ignore[arg-type]
    take_home(teacher.model)
    return records


@dataclass(frozen=True)
class _Source:
    """What a stage trains and is scored on, and how rows become batches."""

    rows: Any
    held: Any
    collator: Any

    def with_states(self, states: KeptStates) -> "_Source":
        """Return the same with the places of a teacher's states."""
        return replace(self, rows=states.placed(self.rows), collator=StatesCollator(self.collator, states))

    def with_tokens(self, tokens: KnownTokens) -> "_Source":
        """Return the same with a teacher's most probable tokens."""
        held = tokens.placed(self.held, 1) if len(tokens.tables) > 1 else self.held
        return _Source(tokens.placed(self.rows), held, TokensCollator(self.collator, tokens))


def make_distiller(
    student: "PreTrainedModel",
    terms: list[Term],
    scheme: Scheme,
    rows: Any,
    *,
    held: Any = None,
    factors: dict[Any, tuple[torch.Tensor, ...]] | None = None,
    states: KeptStates | None = None,
    tokens: KnownTokens | None = None,
) -> Distiller:
    """Return the step of a stage; a fixed teacher gives its outputs once, before training, where that saves work.

    rows, held: encoded, for training and for choosing a checkpoint. states, tokens: what is kept of its inside, and of
    its predictions.
    """
    setting, teacher, known = scheme.setting, scheme.teacher(), tokens or scheme.teacher_outputs()
    kind = setting.task.kind
    request = teacher_request(terms)
    kept = setting.cache and kind.outputs_are_kept and not kind.inputs_change
    asked_again = kept and request.logits and not request.gradients
    saves = states is not None or (teacher is not None and _saves(request, teacher))
    held_known = None
    fixed = scheme.teacher_is_fixed and not scheme.changes_batches
    if known is None and teacher is not None and asked_again and fixed and saves:
        ask = partial(
            known_outputs,
            teacher,
            collator=setting.collator,
            outputs=kind.head.outputs,
            per_token=kind.head.per_token,
            batch_size=setting.loop.eval_batch_size,
            console=setting.console,
            device=setting.loop.device,
        )
        known = ask(dataset=rows)
        held_known = ask(dataset=held) if held is not None and kind.chosen_by_loss else None
    return Distiller(
        student,
        terms,
        kind=kind,
        teacher=teacher,
        teacher_outputs=known,
        held_outputs=held_known,
        teacher_states=states,
        teacher_factors=factors,
    )


def _saves(request: Request, teacher: "PreTrainedModel") -> bool:
    """True when the teacher needs not run to its end once its predictions are known."""
    deepest = max([*request.hidden, *(layer for layer, _ in request.matrices | request.linear)], default=0)
    return deepest == 0 or deepest < shape_of(teacher.config).layers


def _is_usable(final: Path, identity: dict[str, Any], console: Console) -> bool:
    """True when a stage was finished, and nothing of what it left was changed since."""
    if not is_sealed(final):
        return False
    problem = check_manifest(final, identity)
    if problem is not None:
        warn(console, f"{final} is made again: {problem}")
    return problem is None


def _keep_stage(final: Path, identity: dict[str, Any], distiller: Distiller, record: dict[str, Any]) -> None:
    from kdcli.training.trainer import save_weights

    with atomic_folder(final, ours=True) as folder:
        save_weights(distiller, folder)
        write_json(folder / RECORD, record)
        write_manifest(folder, identity)
