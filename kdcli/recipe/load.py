"""From a TOML file and `--set` options to a validated recipe, or to a message that says what to change."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kdcli.errors import InputError, cut
from kdcli.files import expanded
from kdcli.recipe.check import Schemas, problems_in, unknown_in
from kdcli.recipe.fields import is_place, show
from kdcli.recipe.locate import Keys, line_of, lines_of_keys
from kdcli.recipe.problems import Problem, problems_of
from kdcli.recipe.schema import Recipe
from kdcli.recipe.toml import BrokenTOML, parse, read_text

_NEEDED = {
    ("task",): 'add task = "sst2", or a [task] table for your own data',
    ("method",): 'add method = "makd"; `kdcli methods` lists what there is',
    ("teacher",): 'add a [teacher] table with model = "HUB NAME OR FOLDER"',
    ("task", "name"): "give the task a name",
    ("method", "name"): "`kdcli methods` lists what there is",
}


def read_recipe(
    path: Path, schemas: Schemas, overrides: list[str] | None = None, *, variant: Sequence[str] = ()
) -> Recipe:
    """Return the recipe in `path` with `--set FIELD=VALUE` overrides on top, and then those of a `--variant`.

    schemas: of the methods and kinds of tasks that it may name.

    A value is read as TOML, or as a plain string where it is none; tables that are not there yet are made. Without a
    value (`student.rank=`) the field is removed.
    Raises InputError with every problem found: file and line (or the option), field, what was found, and
    what is allowed.
    """
    text = read_text(path)
    try:
        document = parse(text)
    except BrokenTOML as error:
        raise InputError(f"not valid TOML: {error.reason}", where=f"{path}:{error.line}:{error.column}") from error
    source = _Source(path, text)
    for option, override in _options(overrides, variant):
        source.options[_apply(document, override, option, schemas)] = f"{option} {cut(override)}"
    return _checked(document, schemas, source.error)


def recipe_of(document: dict[str, Any], schemas: Schemas) -> Recipe:
    """Return the recipe that a document is. Raises InputError with every problem found. schemas: of what it names."""
    return _checked(
        copy.deepcopy(document),
        schemas,
        lambda problems: InputError("\n  ".join(f"{problem.name}: {problem.text}" for problem in problems)),
    )


def _checked(document: dict[str, Any], schemas: Schemas, refusal: Callable[[list[Problem]], InputError]) -> Recipe:
    recipe, problems = problems_in(document, schemas)
    if recipe is None or problems:
        raise refusal(problems)
    return recipe


def _options(overrides: list[str] | None, variant: Sequence[str]) -> list[tuple[str, str]]:
    """Return (option, FIELD=VALUE) of every change to a recipe, in the order in which they apply."""
    return [*(("--set", words) for words in overrides or []), *(("--variant", words) for words in variant)]


MOST_TOLD = 20
"""Problems that one message tells."""

_PATHS = {
    *("data", "train", "validation", "test", "pairs", "queries", "corpus", "relevances"),
    *("model", "tokenizer", "decisions", "augment.text", "vocabulary.text", "test.*"),
}
"""Fields that may hold a path, by their own name, or with that of their table where another table has it, too."""


def portable(recipe: Recipe, name: str, base: Path) -> dict[str, Any]:
    """Return a recipe as a document that says the same in any folder: with its name, and with whole paths.

    base: the folder that its relative paths start from.
    """

    def whole(table: dict[str, Any], owner: str = "") -> dict[str, Any]:
        return {key: moved(owner, key, value) for key, value in table.items()}

    def moved(owner: str, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return whole(value, key)
        if isinstance(value, list):
            return [whole(part, key) if isinstance(part, dict) else moved(owner, key, part) for part in value]
        if not {key, f"{owner}.{key}", f"{owner}.*"} & _PATHS or not isinstance(value, str):
            return value
        # A hub's name, or a column's, is no path.
        path = base / expanded(value, f"{owner}.{key}" if owner else key)
        return str(path.resolve()) if path.exists() else value

    document = whole(recipe.model_dump(exclude_none=True))
    if recipe.output is not None:
        document["output"] = str((base / expanded(recipe.output, "output")).resolve())
    return {**document, "name": name}


def validate_section(schema: type[BaseModel], values: dict[str, Any]) -> Any:
    """Return a command's options as a section. Raises InputError that names the options that do not fit."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [
            (f"--{'.'.join(problem.path).replace('_', '-')}: " if problem.path else "") + problem.text
            for problem in problems_of(schema, error)
        ]
        raise InputError("\n  ".join(lines)) from error


def _apply(document: dict[str, Any], override: str, option: str, schemas: Schemas) -> Keys:
    """Put one FIELD=VALUE of an option into the document, in place, and return the field's path."""
    path, value = parts_of(override, option, "student.budget=0.25")
    where = f"{option} {cut(override)}"
    last = path[-1]
    if not value.strip():
        # Tables on the way to a field that is not there are not made.
        changed = copy.deepcopy(document)
        if _table_of(changed, path, where).pop(last, None) is not None:
            document.update(changed)
            if len(path) == 1:
                del document[last]
        elif (problem := unknown_in(changed, path, schemas)) is not None:
            raise InputError(problem.message, where=f"{where}: {problem.name}", hint=problem.hint)
        return path
    table, parsed = _table_of(document, path, where), value_of(value)
    if path in (("task",), ("method",)) and isinstance(table.get(last), dict) and isinstance(parsed, str):
        parsed = {**table[last], "name": parsed}
    table[last] = parsed
    return path


def _table_of(document: dict[str, Any], path: Keys, where: str) -> dict[str, Any]:
    """Return the table of the document that a field belongs to, made where it is not there yet.

    A table in a list, `finetune[0]`, is one that is there.
    """
    table: Any = document
    for depth, part in enumerate(path[:-1], 1):
        if isinstance(table, list):
            number = int(part[1:-1])
            if number >= len(table) or not isinstance(table[number], dict):
                tables = f"{sum(isinstance(inner, dict) for inner in table)} tables, which count from 0"
                raise InputError(f"{Problem(path[: depth - 1], '').name} has {tables}", where=where)
            table[number] = dict(table[number])
            table = table[number]
            continue
        inner: Any = table.get(part)
        if isinstance(inner, list) and depth + 1 < len(path) and is_place(path[depth]):
            table[part] = table = list(inner)
            continue
        if depth == 1 and part in ("task", "method") and isinstance(inner, str):
            inner = {"name": inner}
        elif path[:depth] == ("teacher", "finetune") and isinstance(inner, bool):
            inner = {}
        elif inner is not None and not isinstance(inner, dict):
            raise InputError(
                f"{cut('.'.join(path[:depth]))} is {show(inner)}, not a table that has fields",
                where=where,
            )
        table[part] = dict(inner or {})
        table = table[part]
    return table


def _path(name: str) -> Keys:
    """Return the parts of a dotted TOML key, or nothing when it is none. The place in `finetune[0]` is a part, too."""
    name = re.sub(r"(?<=\w)(\[\d+\])", r'."\1"', name)
    try:
        inner: Any = parse(f"{name.strip()} = 0")
    except BrokenTOML:
        return ()
    path: Keys = ()
    while isinstance(inner, dict) and len(inner) == 1:
        [(part, inner)] = inner.items()
        path = (*path, part)
    return path if inner == 0 else ()


def parts_of(override: str, option: str, example: str) -> tuple[Keys, str]:
    """Return the path and the value of FIELD=VALUE. Raises InputError, with an example, where it is none."""
    name, equals, value = override.partition("=")
    path = _path(name)
    if not equals or not path:
        raise InputError(f"takes FIELD=VALUE, such as {example}, not {cut(override)!r}", where=option)
    return path, value


def value_of(text: str) -> Any:
    """Return the value of FIELD=VALUE: as TOML, or else as text."""
    text = text.strip()
    try:
        document = parse(f"value = {text}")
    except BrokenTOML:
        return text
    return document["value"] if document.keys() == {"value"} else text


def with_place(
    error: InputError, path: Path, overrides: list[str] | None = None, *, variant: Sequence[str] = ()
) -> InputError:
    """Return an error whose `where` is a recipe's field (`student.rank`) with file and line, or the option, before it.

    Any other error is returned as it is.
    """
    field_ = _path(error.where or "")
    if not field_ or field_[0] not in Recipe.model_fields:
        return error
    changes = _options(overrides, variant)
    options = {_path(words.partition("=")[0]): f"{option} {cut(words)}" for option, words in changes}
    source = _Source(path, read_text(path), options)
    return type(error)(error.message, where=f"{source.where(field_)}: {error.where}", hint=error.hint)


@dataclass
class _Source:
    """Where a recipe's fields come from: lines of a file, and options, such as {("seed",): "--set seed=7"}."""

    path: Path
    text: str
    options: dict[Keys, str] = field(default_factory=dict)

    @cached_property
    def lines(self) -> dict[Keys, int]:
        return lines_of_keys(self.text)

    def error(self, problems: list[Problem]) -> InputError:
        """Return one error that tells all problems, in the order of the file's lines, options last."""
        found = sorted(problems, key=self._order)[:MOST_TOLD]
        hints = [_NEEDED.get(p.path, p.hint) if p.missing else p.hint for p in found]
        places = [self.where(p.path) + (f": {p.name}" if p.path else "") for p in found]
        if len(found) == 1:
            return InputError(found[0].message, where=places[0], hint=hints[0])
        lines = [
            f"{place}: {problem.message}" + (f" ({hint})" if hint else "")
            for place, problem, hint in zip(places, found, hints, strict=True)
        ]
        told = f", of which these are the first {MOST_TOLD}" if len(problems) > MOST_TOLD else ""
        return InputError("\n  ".join([f"{self.path}: {len(problems)} problems{told}", *lines]))

    def _order(self, problem: Problem) -> tuple[bool, int]:
        return self.where(problem.path).startswith("--"), line_of(self.lines, problem.path) or 0

    def where(self, path: Keys) -> str:
        """Return `FILE:LINE`, or the option that set the field; both when a table's parts come from both."""
        exact = [words for option, words in self.options.items() if path[: len(option)] == option]
        if exact:
            return exact[-1]
        below = [words for option, words in self.options.items() if path and option[: len(path)] == path]
        options = ", ".join(below)
        if below and path not in self.lines:
            return options
        line = line_of(self.lines, path)
        place = f"{self.path}:{line}" if line else str(self.path)
        return f"{place} with {options}" if below else place
