"""A recipe against the schemas of all that it names: its own, its method's, and those of its kinds of tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kdcli.errors import InputError
from kdcli.recipe.fields import nearest
from kdcli.recipe.locate import Keys
from kdcli.recipe.parts import fields_of_parts, table_of_part
from kdcli.recipe.problems import Problem, problems_of, unknown_field
from kdcli.recipe.schema import SOURCES, PartSection, Recipe, TaskSection


class Kind(Protocol):
    """What a recipe is told by a kind of task."""

    name: ClassVar[str]
    fields: ClassVar[type[Any]]
    provides: ClassVar[frozenset[str]]
    scored_by_loss: ClassVar[bool]
    general: ClassVar[bool]

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Schemas:
    """Where schemas come from. options: of a method, by its name. kind: of a `[task]`. kinds: all of them.

    The first two raise InputError for a name that there is not.
    """

    options: Callable[[str], type[BaseModel]]
    kind: Callable[[TaskSection], Kind]
    kinds: Callable[[], Sequence[Kind]]


@cache
def task_schema(kind: Kind) -> type[TaskSection]:
    """Return the schema of a whole `[task]` of a kind: the common fields and its own, and no others."""

    class WholeTask(kind.fields, TaskSection):  # type: ignore[misc, name-defined]
        model_config = ConfigDict(extra="forbid")

        @model_validator(mode="after")
        def _of_kind(self) -> Self:
            scored = ("metrics", "test", "test_samples") if kind.scored_by_loss else ()
            absent = [name for name in scored if getattr(self, name) is not None]
            if absent:
                raise ValueError(f'type = "{kind.name}" has no {", ".join(absent)}')
            if self.augment is not None and "text" not in kind.provides:
                raise ValueError(
                    f'augment needs texts that keep their answers where words change; type = "{kind.name}" has none'
                )
            # Of parts each is checked as a task of its own.
            if self.part is None:
                self.check(self)
            return self

    return WholeTask


def problems_in(document: dict[str, Any], schemas: Schemas) -> tuple[Recipe | None, list[Problem]]:
    """Return the recipe that a document holds, if it does, and every problem."""
    problems: list[Problem] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems = problems_of(Recipe, error)
    for path, table in _tasks(document):
        found = _problems_of_task(table, path, schemas)
        if found is not None:
            # They are all that there are, with those of the common fields among them.
            problems = [problem for problem in problems if problem.path[: len(path)] != path] + found
    problems += _problems_of_method(document.get("method"), schemas)
    if recipe is not None and not problems:
        problems = list(_problems_between(recipe, schemas))
    return recipe, problems


def _tasks(document: dict[str, Any]) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """Yield the path and the table of each task of a document."""
    stages = document.get("finetune")
    tables: dict[Keys, Any] = {("task",): document.get("task")}
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        if isinstance(stage, dict):
            tables["finetune", f"[{number}]", "task"] = stage.get("task")
    for path, table in tables.items():
        if isinstance(table, str | dict):
            yield path, table if isinstance(table, dict) else {"name": table}


def _kind_of(table: Mapping[str, Any], schemas: Schemas) -> Kind:
    """Return the kind of a table that need not be valid."""
    told: dict[str, Any] = {key: table.get(key) for key in ("name", "type", *SOURCES)}
    told = {"name": "", **{key: value for key, value in told.items() if isinstance(value, str)}}
    parts = table.get("part")
    tables = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    named = [PartSection.model_construct(None, **part) for part in tables]
    return schemas.kind(TaskSection.model_construct(None, **told, part=named or None))


def _problems_of_task(table: dict[str, Any], path: Keys, schemas: Schemas) -> list[Problem] | None:
    """Return the problems of a task's table; None where its type is the problem."""
    if not isinstance(table.get("type"), str | None):
        return None
    try:
        kind = _kind_of(table, schemas)
    except InputError as error:
        return [Problem((*path, "type"), error.message, error.hint)]
    schema = task_schema(kind)
    try:
        schema.model_validate(table)
    except ValidationError as error:
        return told(problems_of(schema, error, prefix=path), table, kind, schemas.kinds())
    found: list[Problem] = []
    for number, part in enumerate(table.get("part") or []):
        found += _problems_of_part(table, part, (*path, "part", f"[{number}]"), kind)
    return told(found, table, kind, schemas.kinds())


def _problems_of_part(table: Mapping[str, Any], part: Mapping[str, Any], prefix: Keys, kind: Kind) -> list[Problem]:
    """Return the problems of one part, at `prefix`, of a task whose table is valid otherwise."""
    allowed = fields_of_parts(kind.fields)
    wrong = [
        Problem((*prefix, name), "holds for all parts", "write it in [task]")
        if name in TaskSection.model_fields or name in kind.fields.model_fields
        else Problem((*prefix, name), "unknown field", nearest([(name,) for name in allowed], (name,)))
        for name in part
        if name not in allowed
    ]
    if wrong:
        return wrong
    schema = task_schema(kind)
    try:
        schema.model_validate(table_of_part(table, part, kind.fields))
    except ValidationError as error:
        return problems_of(schema, error, prefix=prefix)
    return []


def told(problems: list[Problem], table: Mapping[str, Any], kind: Kind, kinds: Sequence[Kind]) -> list[Problem]:
    """Return problems of a task's table; of a field, or a value of it, that other kinds have it is told which."""
    found = []
    for problem in problems:
        name = problem.path[-1]
        having = [f'"{other.name}"' for other in kinds if name in other.fields.model_fields]
        if problem.message == "unknown field" and having:
            hint = f"type = {' or '.join(having)} has it"
            problem = replace(problem, message=f'type = "{kind.name}" has no {name}', hint=hint)
        elif problem.hint is None and name in kind.fields.model_fields:
            taking = [f'"{other.name}"' for other in kinds if _takes(other, name, table.get(name))]
            if taking:
                problem = replace(problem, hint=f"type = {' or '.join(taking)} takes it")
        found.append(problem)
    return found


def _takes(kind: Kind, name: str, value: Any) -> bool:
    """True when a kind has a field that takes a value."""
    if name not in kind.fields.model_fields:
        return False
    try:
        kind.fields.model_validate({name: value})
    except ValidationError:
        return False
    return True


def _problems_of_method(table: Any, schemas: Schemas) -> list[Problem]:
    table = {"name": table} if isinstance(table, str) else table
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return []
    try:
        schema = schemas.options(table["name"])
    except InputError as error:
        return [Problem(("method", "name"), error.message, error.hint)]
    try:
        schema.model_validate({key: value for key, value in table.items() if key != "name"})
    except ValidationError as error:
        return problems_of(schema, error, prefix=("method",))
    return []


def _problems_between(recipe: Recipe, schemas: Schemas) -> Iterator[Problem]:
    """Yield the problems of tables that do not go together, in a recipe that is valid otherwise."""
    kind = schemas.kind(recipe.task)
    if recipe.finetune and not kind.general:
        types = " or ".join(f'"{other.name}"' for other in schemas.kinds() if other.general)
        yield Problem(("finetune",), f"[[finetune]] follows distilling a general student: [task] type = {types}")
    for number, stage in enumerate(recipe.finetune):
        if (other := schemas.kind(stage.task)).scored_by_loss:
            words = f'a model is fine-tuned on a task with a score; type = "{other.name}" has none'
            yield Problem(("finetune", f"[{number}]", "task"), words)
    if kind.scored_by_loss:
        for field in ("fail_under", "fail_under_retention"):
            if getattr(recipe.evaluate, field) is not None:
                yield Problem(("evaluate", field), f'needs a task with a score; type = "{kind.name}" has none')
    if kind.general and recipe.export.onnx:
        yield Problem(
            ("export", "onnx"),
            "a general student is fine-tuned first, and then exported with `kdcli export`",
        )


def unknown_in(document: dict[str, Any], path: Keys, schemas: Schemas) -> Problem | None:
    """Return the problem of a field that no recipe with this method and these kinds of tasks has."""
    try:
        if path[0] == "method" and path[1:] not in ((), ("name",)):
            name = document["method"].get("name")
            return unknown_field(schemas.options(name if isinstance(name, str) else ""), path[1:], prefix=("method",))
        for place, table in _tasks(document):
            if path[: len(place)] == place and len(path) > len(place):
                return unknown_field(task_schema(_kind_of(table, schemas)), path[len(place) :], prefix=place)
    except InputError:
        return None
    return unknown_field(Recipe, path)
