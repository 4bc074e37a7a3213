"""From a recipe to a run folder: the one road that `kdcli distill` takes."""

import copy
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import transformers
from rich.console import Console
from transformers import set_seed

from kdcli import __version__, runs
from kdcli.errors import ExitCode, InputError
from kdcli.evaluation.comparison import Comparison, compare, describe_model
from kdcli.evaluation.general import General
from kdcli.evaluation.score import evaluate_model
from kdcli.files import atomic_folder
from kdcli.methods import registry
from kdcli.methods.base import Context, Method, Stage, Term
from kdcli.methods.layer_maps import uniform
from kdcli.models.card import model_card
from kdcli.models.counts import count_parameters
from kdcli.models.forms import StudentBuild, build_student
from kdcli.models.load import head_of, load_config
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.objectives.base import Wants
from kdcli.objectives.tensor import TensorObjective
from kdcli.recipe.schema import OverparamSection, Recipe, StudentSection
from kdcli.tasks.augment import augment_task, check_augment
from kdcli.tasks.base import Task
from kdcli.tasks.encode import encode_task
from kdcli.tasks.load import load_task
from kdcli.tasks.metrics import chance_level
from kdcli.tensors.parametrize import OverparamReport, contract_model, overparameterise, teacher_factors
from kdcli.training.distiller import Distiller
from kdcli.training.distributed import agree, is_main, main_does
from kdcli.training.downstream import score_on_tasks
from kdcli.training.hashing import hash_of_weights
from kdcli.training.logits_cache import cached_logits
from kdcli.training.schemes.base import Scheme, Setting
from kdcli.training.teacher import Teacher, make_teacher, metrics_of, resolve_source
from kdcli.training.trainer import COMPLETE, WEIGHTS, LoopSettings, fit, load_weights

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
    loop: LoopSettings


def resolve(recipe: Recipe, recipe_path: Path, task: Task | None = None) -> Resolved:
    """Fill in what the recipe left to the method."""
    method = registry.get(recipe.method.name)
    if task is not None and task.kind not in method.kinds:
        raise InputError(
            f"{method.name} works on {' and '.join(sorted(method.kinds))} tasks; {task.name} is a {task.kind} task",
            where="method.name",
            hint="`kdcli methods` lists what each one needs",
        )
    options = method.options.model_validate(recipe.method.options)
    written = recipe.student.model_dump(exclude_unset=True)
    defaults = method.student if recipe.student.form in (None, method.student.get("form")) else {}
    sizes = {"budget", "rank", "params", "energy"}
    if sizes & set(written):
        defaults = {key: value for key, value in defaults.items() if key not in sizes}
    student = StudentSection.model_validate({**defaults, **written})
    if student.form is None:
        student = StudentSection.model_validate({**student.model_dump(exclude_unset=True), "form": "depth"})
    if recipe.teacher.black_box:
        _judge_black_box(recipe, method, options, student)
    base = recipe_path.resolve().parent
    train = recipe.train
    defaults_of_loop = {**method.train, **(method.text_train if recipe.task.type == "text" else {})}

    def pick(key: str, fallback: Any) -> Any:
        value = getattr(train, key)
        return value if value is not None else defaults_of_loop.get(key, fallback)

    rate = float(pick("learning_rate", 5e-5))
    loop = LoopSettings(
        epochs=float(pick("epochs", 3.0)),
        max_steps=train.max_steps,
        batch_size=train.batch_size,
        gradient_accumulation=train.gradient_accumulation,
        learning_rate=rate,
        scheduler=pick("scheduler", "linear"),
        warmup=float(pick("warmup", 0.1)),
        weight_decay=float(pick("weight_decay", 0.01)),
        max_grad_norm=train.max_grad_norm,
        precision=train.precision,
        device=train.device,
        group_by_length=train.group_by_length,
        eval_every=train.eval_every,
        patience=train.patience,
        select=train.select,
        log_every=train.log_every,
        workers=train.workers,
        seed=recipe.seed,
        metric=task.primary if task is not None else "",
        eval_batch_size=recipe.evaluate.batch_size,
        chain_learning_rate=_chain_rate(recipe, rate),
    )
    return Resolved(
        recipe=recipe,
        name=recipe.name or recipe_path.stem,
        base=base,
        method=method,
        options=options,
        student=_found(student, base),
        loop=loop,
    )


def _judge_black_box(recipe: Recipe, method: Method, options: Any, student: StudentSection) -> None:
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


def _found(student: StudentSection, base: Path) -> StudentSection:
    """Return a section whose model, where it is a folder, is named as seen from anywhere."""
    if student.model is None:
        return student
    return student.model_copy(update={"model": resolve_source(student.model, base)})


def _chain_rate(recipe: Recipe, rate: float) -> float | None:
    """Return the factors' learning rate: one step moves a weight 1.5 + 0.8 L times as far (methods 3.10)."""
    section = recipe.overparam
    if section is None:
        return None
    if section.learning_rate is not None:
        return section.learning_rate
    length = section.length if section.factorization == "mpo" else 0
    return rate / (1.5 + 0.8 * length)


def context_of(teacher: "PreTrainedModel", student: "PreTrainedModel", form: str, task: Task) -> Context:
    """Return what a method may know of the two models: their shapes, never their weights."""
    teacher_shape, student_shape = shape_of(teacher.config), shape_of(student.config)
    return Context(
        teacher=teacher_shape,
        student=student_shape,
        student_form=form,
        kind=task.kind,
        num_labels=max(1, len(task.label_names)),
        pairs=uniform(student_shape.layers, teacher_shape.layers),
    )


@dataclass
class RunResult:
    """A finished run: its record, and the result that a user sees."""

    record: dict[str, Any]
    result: Comparison | General
    exit_code: ExitCode = ExitCode.OK

    def to_json(self) -> dict[str, Any]:
        return self.record

    def table(self) -> Any:
        return self.result.table()


def run_distill(
    recipe: Recipe,
    *,
    recipe_path: Path,
    output: Path | None = None,
    force: bool = False,
    resume: bool = False,
    refresh: bool = False,
    fail_under: float | None = None,
    overrides: list[str] | None = None,
    console: Console | None = None,
) -> RunResult:
    """Train or load the teacher, build the student, distil, contract, evaluate, report.

    Raises InputError for a wrong recipe, model or data; nothing is left behind then.
    """
    console = console or Console(stderr=True)
    if not is_main():
        console = Console(stderr=True, quiet=True)
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    resolve(recipe, recipe_path)
    task = load_task(recipe.task, recipe.evaluate, base=recipe_path.resolve().parent, seed=recipe.seed)
    resolved = resolve(recipe, recipe_path, task)
    root = output or (resolved.base / Path(recipe.output).expanduser() if recipe.output else Path("runs"))
    run: runs.Run = runs.open_run(root, resolved.name, force=force, resume=resume, create=is_main())
    document = recipe.model_dump(exclude_none=True)
    if resume and run.record.get("status") == "done":
        console.print(f"{run.path} is finished already", highlight=False)
        kind: type[Comparison | General] = General if task.kind == "text" else Comparison
        return RunResult(run.record, kind.from_record(run.record))
    if resume and run.record and run.record.get("recipe") != document:
        raise InputError(
            f"{run.path} was started with another recipe",
            hint="go back to that recipe, or start again with --force",
        )
    with _fresh_run(run, resume):
        main_does(
            lambda: run.begin(
                recipe=document,
                source=recipe_path,
                overrides=overrides or [],
                seed=recipe.seed,
                versions=versions(),
            )
        )
        head = head_needed(resolved, task)
        if recipe.task.augment is not None:
            check_augment(recipe.task.augment, resolved.base)
        set_seed(recipe.seed)
        with _timed(seconds, "teacher"):
            teacher = make_teacher(
                recipe,
                task,
                head,
                base=resolved.base,
                console=console,
                refresh=refresh,
                resume=resume,
                work=run.checkpoints / "teacher",
                inspect=lambda model: judge_shapes(model, resolved, task),
            )
            silent = task.kind == "text" or not teacher.known
            teacher_scores = {} if silent else _scores(teacher.model, teacher.tokenizer, task, resolved)
        if teacher_scores:
            _warn_of_chance(teacher_scores, task, console)
        if recipe.task.augment is not None:
            with _timed(seconds, "augment"):
                task = augment_task(task, recipe, base=resolved.base, console=console)
        road = _Road(task, resolved, run, console, seconds, resume=resume)
        made, nearest = None, teacher
        if recipe.assistant is not None:
            section = _found(recipe.assistant, resolved.base)
            if section.form is None:
                section = StudentSection.model_validate({**section.model_dump(exclude_unset=True), "form": "width"})
            made = road.distil(teacher, section, None, folder="assistant", title="assistant: ")
            nearest = replace(teacher, model=made.build.model, path=None)
        student = road.distil(nearest, resolved.student, recipe.overparam)
        build, training = student.build, student.training
        if task.kind == "text" and not student.speaks:
            # Nothing taught its head to speak: what is handed over is the body.
            build = replace(build, model=build.model.base_model)  # type: ignore[arg-type]
        result: Comparison | General
        with _timed(seconds, "evaluate"):
            if task.kind == "text":
                described = [describe_model(model, {}) for model in (teacher.model, build.model)]
                result = General(
                    held_out_loss(training),
                    (described[0].parameters, described[1].parameters),
                    (described[0].megabytes, described[1].megabytes),
                    score_on_tasks(
                        build.model,
                        teacher.model,
                        teacher.tokenizer,
                        recipe,
                        base=resolved.base,
                        run=run,
                        console=console,
                        resume=resume,
                    ),
                )
            else:
                result = compare(
                    task,
                    teacher=describe_model(teacher.model, teacher_scores) if teacher.known else None,
                    student=describe_model(build.model, _scores(build.model, teacher.tokenizer, task, resolved)),
                )
        seconds["total"] = round(time.perf_counter() - begun, 3)
        record = {
            "status": "done",
            "method": {
                "name": resolved.method.name,
                "title": resolved.method.title,
                "paper": resolved.method.paper,
                "options": resolved.options.model_dump(),
            },
            "task": {**task.description, "name": task.name, "kind": task.kind, "primary": task.primary},
            **result.to_json(),
            "teacher_origin": teacher.origin,
            "teacher_path": str(teacher.path) if teacher.path else None,
            "student_form": resolved.student.form,
            "student_head": head_of(build.model),
            "teacher_layers": build.teacher_layers,
            "assistant": made.to_json() if made is not None else None,
            "overparam": student.overparam,
            "contraction": student.contraction,
            "training": training,
            "seconds": seconds,
            "hashes": {
                "teacher": hash_of_weights(teacher.model) if teacher.known else None,
                "student_before": student.hash_before,
                "student": hash_of_weights(build.model),
                "data": task.description["fingerprint"],
            },
        }
        main_does(lambda: _keep(run, record, build, teacher))
        if recipe.export.onnx:
            with _timed(seconds, "export"):
                main_does(lambda: _export(run, build, teacher, task, resolved, console))
            main_does(lambda: run.update({"seconds": seconds}))
    code = ExitCode.OK
    limit = fail_under if fail_under is not None else recipe.evaluate.fail_under
    if limit is not None and isinstance(result, Comparison) and result.student_score < limit:
        console.print(f"gate not met: {task.primary} {result.student_score:.4f} is under {limit}", highlight=False)
        code = ExitCode.GATE
    return RunResult(run.record, result, code)


def judge_shapes(teacher: "PreTrainedModel", resolved: Resolved, task: Task) -> None:
    """Raise InputError for what is wrong with the student's shape or the method's demands, without any work."""
    section = resolved.student
    if section.form == "checkpoint" or section.energy is not None or resolved.recipe.assistant is not None:
        # These need weights, and are judged when the student is built.
        return
    shadow = copy.deepcopy(teacher).to("meta")  # type: ignore[arg-type]
    with torch.device("meta"):
        student = build_student(shadow, section, seed=0).model
    assert section.form is not None
    resolved.method.check(resolved.options, context_of(shadow, student, section.form, task))


def head_needed(resolved: Resolved, task: Task) -> str:
    """Return what must stand on the teacher's body: a classifier; for plain text a masked-LM head, or nothing.

    A head for plain text is needed where some term listens to predictions, and where a teacher is to be trained.
    """
    if task.kind != "text":
        return "sequence-classification"
    teacher = resolved.recipe.teacher
    if teacher.model is None or teacher.finetune not in (None, False):
        return "masked-lm"
    shape = shape_of(load_config(resolve_source(teacher.model, resolved.base)))
    blocks = [(layer, layer) for layer in range(1, shape.layers + 1)]
    stages = resolved.method.build(resolved.options, Context(shape, shape, "checkpoint", task.kind, 1, blocks))
    return "masked-lm" if speaks(stages) else "base"


def speaks(stages: list[Stage]) -> bool:
    """True when some term of weight listens to the student's predictions."""
    return any(t.objective.student_wants().logits for stage in stages for t in stage.terms if t.weight > 0)


def held_out_loss(training: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Return the first and the last held-out loss of the last stage; None where it was not measured."""
    losses = [entry["eval_loss"] for entry in training[-1].get("history", []) if "eval_loss" in entry]
    return (losses[0], losses[-1]) if losses else (None, None)


@dataclass
class Distilled:
    """A student at the end of its training, contracted."""

    build: StudentBuild
    speaks: bool
    hash_before: str
    overparam: dict[str, Any] | None
    contraction: dict[str, Any] | None
    training: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return what run.json says of an assistant."""
        return {
            "form": self.build.form,
            "notes": self.build.notes,
            "parameters": count_parameters(self.build.model),
            "training": self.training,
        }


@dataclass
class _Road:
    """What a student's way from a teacher needs, whichever student it is."""

    task: Task
    resolved: Resolved
    run: runs.Run
    console: Console
    seconds: dict[str, float]
    resume: bool

    def distil(
        self,
        teacher: Teacher,
        section: StudentSection,
        overparam: OverparamSection | None,
        *,
        folder: str = "",
        title: str = "",
    ) -> Distilled:
        """Build a student of `teacher`, train it, and contract it. folder, title: of its checkpoints and progress."""
        resolved, task, seed = self.resolved, self.task, self.resolved.recipe.seed
        set_seed(seed)
        with _timed(self.seconds, f"{folder or 'student'}"):
            build = build_student(teacher.model, section, seed=seed)
        for note in build.notes:
            self.console.print(f"{folder or 'student'}: {note}", highlight=False, soft_wrap=True)
        plain_hash = hash_of_weights(build.model)
        context = context_of(teacher.model, build.model, build.form, task)
        resolved.method.check(resolved.options, context)
        for note in resolved.method.notes(resolved.options, context):
            self.console.print(f"{resolved.method.name}: {note}", highlight=False, soft_wrap=True)
        with _timed(self.seconds, "overparam"):
            chain = _overparameterise(build, teacher.model, context, overparam, self.console)
        stages = resolved.method.build(resolved.options, context)
        with _timed(self.seconds, "train" if not folder else f"{folder} train"):
            training = _train(
                stages,
                build,
                teacher,
                chain,
                task,
                resolved,
                self.run.checkpoints / folder,
                self.run.log / folder,
                self.console,
                title=title,
                resume=self.resume,
            )
        contraction = None
        if chain is not None:
            with _timed(self.seconds, "contract"):
                contraction = contract_model(build.model).to_json()
        return Distilled(
            build,
            speaks(stages),
            plain_hash,
            chain.report.to_json() if chain is not None else None,
            contraction,
            training,
        )


@contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - begun, 3)


@contextmanager
def _fresh_run(run: runs.Run, resume: bool) -> Iterator[None]:
    """Leave nothing behind when the input turns out to be wrong after the folder was made."""
    try:
        yield
    except InputError:
        if is_main() and not resume:
            run.discard()
        raise
    except BaseException:
        if is_main():
            run.mark_failed()
        raise


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import datasets
    import onnxruntime

    return {
        "kdcli": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "onnxruntime": onnxruntime.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": str(torch.get_num_threads()),
    }


def _scores(model: "PreTrainedModel", tokenizer: Any, task: Task, resolved: Resolved) -> dict[str, dict[str, float]]:
    return evaluate_model(
        model,
        tokenizer,
        task,
        batch_size=resolved.recipe.evaluate.batch_size,
        max_length=resolved.recipe.task.max_length,
    )


def _warn_of_chance(scores: dict[str, dict[str, float]], task: Task, console: Console) -> None:
    score = sum(values[task.primary] for values in scores.values()) / len(scores)
    chance = chance_level(task)
    if score <= chance + 0.02:
        console.print(
            f"[bold red]WARNING[/]: the teacher scores {task.primary} {score:.4f}, no better than chance "
            f"({chance:.4f}). A student cannot learn the task from it. Is the model fine-tuned on this task, "
            "and are its labels in the right order (teacher.labels)?",
            highlight=False,
        )


@dataclass
class Chain:
    """The over-parameterised student: what was done, and the teacher's tensors to compare with."""

    report: OverparamReport
    teacher: dict[Any, tuple[torch.Tensor, ...]]


def _overparameterise(
    build: StudentBuild,
    teacher: "PreTrainedModel",
    context: Context,
    section: OverparamSection | None,
    console: Console,
) -> Chain | None:
    if section is None:
        return None
    factors: dict[Any, tuple[torch.Tensor, ...]] = {}
    report = overparameterise(build.model, section)
    if section.aux_weight > 0:
        factors, skipped = teacher_factors(teacher, build.model, context.pairs, section)
        if not factors:
            raise InputError(
                "overparam.aux_weight is above 0, but no matrix of the student has a teacher matrix of its shape",
                where="overparam.aux_weight",
                hint='set aux_weight = 0, or aux_mismatch = "truncate"',
            )
        if skipped:
            console.print(
                f"overparam: no teacher tensors for {len(skipped)} matrices: {', '.join(map(str, skipped[:6]))}"
                + (" ..." if len(skipped) > 6 else ""),
                highlight=False,
                soft_wrap=True,
            )
    return Chain(report, factors)


def _train(
    stages: list[Stage],
    build: StudentBuild,
    teacher: Teacher,
    chain: Chain | None,
    task: Task,
    resolved: Resolved,
    checkpoints: Path,
    log: Path,
    console: Console,
    *,
    title: str,
    resume: bool,
) -> list[dict[str, Any]]:
    encoded = encode_task(task, teacher.tokenizer, resolved.recipe.task.max_length, seed=resolved.loop.seed)
    train, collator = encoded.train, encoded.collator
    total = resolved.loop.steps(len(train))
    records = []
    for number, stage in enumerate(stages, 1):
        terms = list(stage.terms)
        if chain is not None and chain.teacher:
            section = resolved.recipe.overparam
            assert section is not None
            terms.append(Term("tensor", TensorObjective(section.aux_reduction), section.aux_weight))
        loop = stage_loop(resolved.loop, stage, total, len(train))
        if task.kind != "text" and not speaks([stage]):
            # The score of a head that nothing trains says nothing about which checkpoint is best.
            loop = replace(loop, select="last", patience=None)
        scheme = stage.scheme or Scheme()
        rows = scheme.begin(
            Setting(
                student=build.model,
                teacher=teacher.model if teacher.known else None,
                tokenizer=teacher.tokenizer,
                task=task,
                train=train,
                collator=collator,
                loop=loop,
                base=resolved.base,
                cache=resolved.recipe.teacher.cache,
                console=console,
            )
        )
        distiller = make_distiller(build.model, terms, scheme, rows, factors=chain.teacher if chain else None)
        folder = checkpoints / f"{number}-{stage.name}"
        final = folder / "final"
        if resume and agree((final / COMPLETE).exists()):
            load_weights(distiller, final)
            distiller.close()
            records.append({"stage": stage.name, "resumed": True})
        else:
            record = fit(
                distiller,
                train=rows,
                selection=encoded.selection,
                collator=collator,
                metrics=metrics_of(task),
                settings=loop,
                folder=folder,
                log_dir=log / stage.name,
                title=title + (stage.name if len(stages) == 1 else f"{number}/{len(stages)} {stage.name}"),
                console=console,
                scheme=scheme,
                resume=resume,
            )
            records.append({"stage": stage.name, **record})
            main_does(lambda final=final, distiller=distiller: _keep_stage(final, distiller))  # type: ignore[misc]
        scheme.end()
    build.model.eval().to("cpu")  # type: ignore[arg-type]
    teacher.model.to("cpu")  # type: ignore[arg-type]
    return records


def stage_loop(loop: LoopSettings, stage: Stage, total: int, examples: int) -> LoopSettings:
    """Return the loop of one stage: its share of the steps, or its own epochs, and its own learning rate."""
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
        scheduler=stage.scheduler or loop.scheduler,
        chain_learning_rate=chain * rate / loop.learning_rate if chain is not None else None,
    )


def make_distiller(
    student: "PreTrainedModel",
    terms: list[Term],
    scheme: Scheme,
    rows: Any,
    *,
    factors: dict[Any, tuple[torch.Tensor, ...]] | None = None,
) -> Distiller:
    """Return the step of a stage; a fixed teacher gives its logits once, before training, where that saves work."""
    setting, teacher, logits = scheme.setting, scheme.teacher(), scheme.teacher_logits()
    wants = Wants()
    for term in terms:
        if term.weight > 0:
            wants |= term.objective.teacher_wants()
    # Plain text is hidden anew in every epoch: no prediction about it is ever asked for twice.
    asked_again = setting.cache and setting.task.kind != "text" and wants.logits and not wants.gradients
    if logits is None and teacher is not None and asked_again and scheme.teacher_is_fixed and _saves(wants, teacher):
        logits = cached_logits(teacher, rows, setting.collator, batch_size=setting.loop.eval_batch_size)
    return Distiller(student, terms, teacher=teacher, teacher_logits=logits, teacher_factors=factors)


def _saves(wants: Wants, teacher: "PreTrainedModel") -> bool:
    """True when the teacher needs not run to its end once its predictions are known."""
    deepest = max([*wants.hidden, *(layer for layer, _ in wants.matrices)], default=0)
    return deepest < shape_of(teacher.config).layers


def _keep_stage(final: Path, distiller: Distiller) -> None:
    with atomic_folder(final, force=True) as folder:
        safetensors.torch.save_model(distiller, str(folder / WEIGHTS))
        (folder / COMPLETE).touch()


def _keep(run: runs.Run, record: dict[str, Any], build: StudentBuild, teacher: Teacher) -> None:
    with atomic_folder(run.student, force=True) as folder:
        save_model(build.model, folder, teacher.tokenizer)
        (folder / "README.md").write_text(model_card({**run.record, **record}), encoding="utf-8")
    if teacher.path is None and teacher.known:
        with atomic_folder(run.path / "teacher", force=True) as folder:
            save_model(teacher.model, folder, teacher.tokenizer)
        record["teacher_path"] = str(run.path / "teacher")
    run.update(record)
    run.mark_latest()


def _export(
    run: runs.Run, build: StudentBuild, teacher: Teacher, task: Task, resolved: Resolved, console: Console
) -> None:
    from kdcli.export.export import export_model

    section = resolved.recipe.export
    result = export_model(
        build.model,
        teacher.tokenizer,
        run.onnx,
        task=task,
        max_length=resolved.recipe.task.max_length,
        opset=section.opset,
        batch_sizes=section.batch_sizes,
        sequence_lengths=section.sequence_lengths,
        threads=section.threads or os.cpu_count() or 1,
        runs=section.runs,
        teacher=teacher.model if teacher.known else None,
        force=True,
    )
    run.update({"export": result.to_json()})
    # A log file has no width to fit.
    wide = console if console.is_terminal else Console(stderr=True, width=max(console.width, 120))
    wide.print(result.table())
