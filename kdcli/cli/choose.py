"""What `eval`, `predict` and `export` share: which model, which task, when the user leaves them out."""

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kdcli.cli.console import info
from kdcli.distill.record import finished
from kdcli.errors import InputError, cut
from kdcli.files import expanded
from kdcli.manifest import check_manifest, is_sealed
from kdcli.names import checked
from kdcli.recipe.load import parts_of, value_of
from kdcli.recipe.parts import own_of_parts
from kdcli.recipe.schema import EvaluateSection, Recipe, TaskSection, parse_delimiter, parse_encoding
from kdcli.runs import Run, latest_run, run_of_model

if TYPE_CHECKING:
    from kdcli.tasks.kind import TaskKind

OPTIONS = frozenset({"text", "label", "labels", "max_length", "type"})
"""Fields of `[task]` that have an option of their own."""
SETTING = re.compile(r'(?:\btask\.)?\b([a-z_]+) = ("[^"]*"|[0-9]+)')
"""A field with its value, as hints write it."""


@dataclass
class Choice:
    """A model's name, and the run that it belongs to, if any."""

    model: str
    run: Run | None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the run. Raises InputError when its record does not hold one."""
        if self.run is None:
            return None
        try:
            return Recipe.model_validate(self.run.document.get("recipe"))
        except ValidationError as error:
            raise InputError(
                f"{self.run.path / 'run.json'} does not hold the recipe of a run of this version of kdcli",
                hint="name the model's folder from a copy outside the run, with --task",
            ) from error

    @property
    def is_student(self) -> bool:
        """True for a run's own student, or one that was fine-tuned from it."""
        # By its name in the run: it may be a link.
        places = (Path(self.model).absolute(), Path(self.model).resolve())
        return self.run is not None and any(
            place.name == "student" or place.parent.name == "finetune" for place in places
        )


def choose_model(model: str | None, task: str | None = None) -> Choice:
    """Return the model that was named, or the newest run's student; of a run on plain text what was fine-tuned.

    Warns when a model of a run, or of the cache, is not what kdcli wrote there.
    Raises InputError without any run, and for a general student that nothing was fine-tuned from.
    """
    choice = _choose(model, task)
    warn_of_changes(choice.model, choice.run)
    return choice


def warn_of_changes(model: str, run: Run | None) -> None:
    """Warn when a model is not what its run wrote, or not what was put into the cache."""
    folder = Path(model)
    problem = run.changed(folder) if run is not None else None
    if problem is None and is_sealed(folder):
        problem = check_manifest(folder)
    if problem is not None:
        info(f"WARNING: {model} is not what kdcli wrote there: {problem}")


def _choose(model: str | None, task: str | None = None) -> Choice:
    if model is None:
        run = latest_run()
        return Choice(_student_to_use(run, task), run)
    path = expanded(model, "MODEL")
    if (path / "run.json").is_file() and not (path / "config.json").exists():
        run = Run(path.resolve())
        if not run.student.is_dir():
            status = record.status if (record := run.record) is not None else "unknown"
            raise InputError(
                f"the run {path} has no student yet (status: {status})",
                hint="make it again: kdcli distill RECIPE --force"
                if status == "done"
                else "go on with it: kdcli distill RECIPE --resume",
            )
        return Choice(_student_to_use(run, task), run)
    model = str(path) if model.startswith("~") else model
    return Choice(model, run_of_model(path) if path.is_dir() else None)


def _student_to_use(run: Run, task: str | None) -> str:
    """Return the folder of a run's student for a task: its own, or one that was fine-tuned from it."""
    record = finished(run)
    if not record.is_general:
        return str(run.student)
    result = record.result
    tasks = [scores.task for scores in result.finetune]
    if not tasks or (task is not None and task not in tasks):
        raise InputError(
            f"the student of {run.path} is a general one, without a head for {task or 'any task'}",
            hint=f"it was fine-tuned on {', '.join(tasks)}" if tasks else "add [[finetune]] tables to the recipe",
        )
    return str(run.tuned(task or tasks[0]))


def teacher_of_run(choice: Choice, where: str, hint: str, *, scored: bool = True) -> str:
    """Return the folder of the teacher that a student was distilled from. where, hint: of errors.

    Raises InputError for a model outside a run, for a run without a teacher, or where it is to be `scored` and has no
    score, and when the folder is gone.
    """
    if choice.run is None:
        raise InputError(f"{choice.model} belongs to no run, so its teacher is not known", where=where, hint=hint)
    record = finished(choice.run)
    if record.teacher_path is None:
        raise InputError(f"{choice.run.path} has no teacher that is a model", where=where, hint=hint)
    if scored and record.result.loss is not None:
        raise InputError(f"the teacher of {choice.run.path} has no score on a task", where=where, hint=hint)
    if not Path(record.teacher_path).is_dir():
        raise InputError(f"the run's teacher is gone: {record.teacher_path}", where=where, hint=hint)
    return record.teacher_path


def choose_task(
    choice: Choice, name: str | None, *, protocol: str | None = None
) -> tuple[TaskSection, EvaluateSection, Path]:
    """Return the task to score on: the one named, with the run's own settings where it is the same task.

    Raises InputError when nothing says which task it is.
    """
    recipe = choice.recipe
    base = Path()
    tuned = {section.task.name: section.task for section in recipe.finetune} if recipe is not None else {}
    if recipe is not None and tuned and (name in tuned or name is None):
        assert choice.run is not None
        section, evaluate = tuned[name or Path(choice.model).name], recipe.evaluate
        base = Path(finished(choice.run).recipe_folder)
    elif recipe is not None and name in (None, recipe.task.name):
        assert choice.run is not None
        section, evaluate = recipe.task, recipe.evaluate
        base = Path(finished(choice.run).recipe_folder)
    elif name is not None:
        length = recipe.task.max_length if recipe is not None else 128
        section, evaluate = TaskSection(name=checked(name, "--task"), max_length=length), EvaluateSection()
    else:
        raise InputError(
            f"which task is {choice.model} to be scored on?",
            where="--task",
            hint="give --task NAME, such as sst2, or rows of a file: --data FILE",
        )
    if protocol is not None:
        evaluate = EvaluateSection.model_validate({**evaluate.model_dump(), "protocol": protocol})
    return section, evaluate, base


@contextlib.contextmanager
def as_options(changes: Sequence[str] = (), *, of_file: bool = False) -> Iterator[None]:
    """Let errors about a recipe's fields name the options of `eval` in their place.

    changes: what `--set` has. of_file: whether it may have more: the rows are those of `--data`.
    """
    try:
        yield
    except InputError as error:
        table, _, field = (error.where or "").partition(".")
        changed = {change.partition("=")[0].strip() for change in changes}
        settable = of_file and field and field not in TaskSection.model_fields
        if table != "task" or not (field in OPTIONS or field in changed or settable):
            raise
        where = f"--set {field}" if field in changed else option_of(field)
        hint = hint_with_options(error.hint) if of_file else error.hint
        raise InputError(error.message, where=where, hint=hint) from error


@contextlib.contextmanager
def as_named() -> Iterator[None]:
    """Let errors about the name of a recipe's task name `--task` in its place, and `--data` for rows of one's own."""
    try:
        yield
    except InputError as error:
        if error.where != "task.name":
            raise
        hint = "score the rows of a file: --data FILE" if "task.data" in (error.hint or "") else error.hint
        raise InputError(error.message, where="--task", hint=hint) from error


def option_of(field: str, value: str | None = None, *, own: frozenset[str] = OPTIONS) -> str:
    """Return the option that stands for a field, with its value. own: fields with one of their own."""
    option, between = (f"--{field.replace('_', '-')}", " ") if field in own else (f"--set {field}", "=")
    return option if value is None else f"{option}{between}{value}"


def hint_with_options(hint: str | None, *, own: frozenset[str] = OPTIONS) -> str | None:
    """Return a hint with options in place of a recipe's fields."""
    return hint and SETTING.sub(lambda found: option_of(found[1], found[2].strip('"'), own=own), hint)


def section_of_data(
    path: Path,
    own: TaskSection | None,
    *,
    text: str | None,
    label: str | None,
    delimiter: str | None,
    encoding: str | None,
    of_type: str | None = None,
    changes: Sequence[str] = (),
) -> TaskSection:
    """Return the task of the rows in a file. own: of the model's run, whose settings hold where no option is given.
    of_type: the name of a kind, those of whose fields alone are kept. changes: FIELD=VALUE of the kind's own fields.

    Raises InputError for an option that cannot be right.
    """
    from kdcli.tasks import registry

    kept: dict[str, Any] = {"metrics": own.metrics} if own is not None else {}
    if own is not None:
        # Of parts, the columns are those of the first one.
        fields = own.fields | (own.part[0].fields if own.part else {})
        # What says which rows a known set has is not about those of a file.
        absent = frozenset() if own.is_own else own_of_parts(registry.kind_of(own).fields)
        with as_options():
            known = registry.get(of_type).fields.model_fields if of_type is not None else fields
        kept |= {name: value for name, value in fields.items() if name in known and name not in absent}
        kept |= {name: getattr(own, name) for name in ("delimiter", "encoding", "split_seed")}
    for change in changes:
        keys, value = parts_of(change, "--set", "label=team")
        if len(keys) > 1 or keys[0] in TaskSection.model_fields:
            raise InputError(
                f"{cut('.'.join(keys))} is no field of a type of task",
                where="--set",
                hint="`kdcli tasks NAME` lists those of each",
            )
        kept[keys[0]] = value_of(value)
    if text is not None:
        columns = [name.strip() for name in text.split(",")]
        if len(columns) > 2 or not all(columns):
            raise InputError(f"takes one column, or two with a comma, not {text!r}", where="--text")
        kept["text"] = columns if len(columns) > 1 else columns[0]
    given: dict[str, Any] = {"delimiter": delimiter, "encoding": encoding}
    for field, parse in (("delimiter", parse_delimiter), ("encoding", parse_encoding)):
        if given[field] is not None:
            try:
                given[field] = parse(given[field])
            except ValueError as error:
                raise InputError(str(error), where=f"--{field}") from error
    if label is not None:
        names = names_with_commas(label, "--label")
        given["label"] = names if len(names) > 1 else names[0]
    chosen = {name: value for name, value in given.items() if value is not None}
    section = TaskSection.model_validate({"name": "data", "data": str(path), **kept, **chosen})
    return section.model_copy(update={"name": path.stem})


def check_effect(kind: "TaskKind", changes: Sequence[str]) -> None:
    """Raise InputError for a field of `--set` that is about training alone. changes: FIELD=VALUE."""
    for change in changes:
        name = parts_of(change, "--set", "label=team")[0][0]
        if name in kind.fields.of_training:
            raise InputError(f"{name} has no effect: nothing is trained", where=f"--set {name}", hint="leave it out")


def names_with_commas(text: str, option: str) -> list[str]:
    """Return the names in a list with commas; spaces round them are none of theirs, quotes are as in CSV.

    Raises InputError for an empty one.
    """
    try:
        [names] = csv.reader([text], skipinitialspace=True)
    except (csv.Error, ValueError):
        names = [""]
    names = [name.strip() for name in names]
    if not all(names):
        raise InputError(f"takes names with commas between them, not {text!r}", where=option)
    return names


def readable_length(config: Any, wanted: int) -> int:
    """Return how many tokens of a text are given to a model: `wanted`, or as many as it has positions for."""
    from kdcli.models.shape import longest_input

    positions = longest_input(config)
    # Batches are padded to a multiple of 8.
    return wanted if positions is None else min(wanted, positions // 8 * 8)


def length_for(config: Any, name: str, asked: int | None, usual: int) -> int:
    """Return how many tokens of a text are given to a model: those of `--max-length`, or the usual ones.

    Raises InputError where the model, by the name, has positions for fewer than were asked for, or reads no text.
    """
    from kdcli.models.families import family_of

    if asked is not None and family_of(config).reads != "text":
        raise InputError(f"counts tokens of text, and {name} reads images", where="--max-length", hint="leave it out")
    limit = readable_length(config, asked or usual)
    if asked is not None and limit < asked:
        raise InputError(
            f"{asked} tokens are more than {name} has positions for",
            where="--max-length",
            hint=f"use at most {limit}",
        )
    return limit


def load_contestant(name: str, where: str = "MODEL") -> tuple[Any, Any]:
    """Return a model (PyTorch model or ONNX session) with its own head, and its processor. where: what names it.

    Raises InputError for a head that no kind of task has, and for a processor that does not fit.
    """
    from kdcli.export.decoder import open_graph
    from kdcli.export.session import is_onnx_folder
    from kdcli.models.heads import BASE, head_of
    from kdcli.models.processors import check_processor, load_processor
    from kdcli.tasks.heads import heads, load_model

    model: Any
    model = open_graph(Path(name)) if is_onnx_folder(Path(name)) else load_model(name)
    if head_of(model, heads()) == BASE:
        raise InputError(f"{name} has no trained head (it is {BASE.title})", where=where)
    processor = load_processor(name)
    check_processor(model, processor, where=where)
    return model, processor
