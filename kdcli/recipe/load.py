"""From a TOML file and `--set` options to a validated recipe, or to a message that says what to change."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kdcli.errors import InputError
from kdcli.recipe.locate import line_of
from kdcli.recipe.schema import Recipe

Path_ = tuple[str, ...]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Return the recipe in `path` with `--set` overrides on top.

    Raises InputError with every problem found: file and line (or the option), field, what was found, and
    what is allowed.
    """
    text = _read(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        where = f"{path}:{place[1]}:{place[2]}" if place else str(path)
        reason = re.sub(r" \(at .*\)$", "", str(error))
        raise InputError(f"not valid TOML: {reason}", where=where) from error
    options: dict[Path_, str] = {}
    for override in overrides or []:
        options[_apply(document, override)] = override
    recipe = _validate(Recipe, document, path, text, options, prefix=())
    assert isinstance(recipe, Recipe)
    _check_method(recipe, path, text, options)
    return recipe


def _read(path: Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a recipe", hint="name a TOML file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        raise InputError(
            f"no recipe at {path}", hint=f"did you mean {path.parent / near[0]}?" if near else None
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text", hint="is it a TOML file?") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _apply(document: dict[str, Any], override: str) -> Path_:
    """Put one `--set FIELD=VALUE` into the document, in place, and return the field's path."""
    field, equals, value = override.partition("=")
    path = tuple(part.strip() for part in field.split("."))
    if not equals or not all(path):
        raise InputError(f"--set takes FIELD=VALUE, such as student.budget=0.25, not {override!r}", where="--set")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    table = document
    for depth, part in enumerate(path[:-1]):
        inner: Any = table.get(part)
        if isinstance(inner, str) and depth == 0 and part in ("task", "method"):
            inner = {"name": inner}
        elif part == "finetune" and isinstance(inner, bool):
            inner = {}
        elif inner is not None and not isinstance(inner, dict):
            raise InputError(f"{'.'.join(path[: depth + 1])} is no table", where=f"--set {override}")
        table[part] = dict(inner or {})
        table = table[part]
    last = path[-1]
    if len(path) == 1 and last in ("task", "method") and isinstance(table.get(last), dict) and isinstance(parsed, str):
        table[last] = {**table[last], "name": parsed}
    else:
        table[last] = parsed
    return path


def _validate(
    schema: type[BaseModel],
    document: dict[str, Any],
    path: Path,
    text: str,
    options: dict[Path_, str],
    prefix: Path_,
) -> BaseModel:
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        problems = _merged([_problem(schema, entry, prefix) for entry in error.errors()])
        lines = []
        for field, message, hint in problems:
            where = _where(field, path, text, options)
            name = ".".join(field)
            lines.append(f"{where}: {name + ': ' if name else ''}{message}" + (f" ({hint})" if hint else ""))
        raise InputError("\n".join(dict.fromkeys(lines))) from error


def _where(field: Path_, path: Path, text: str, options: dict[Path_, str]) -> str:
    for option, words in options.items():
        if field[: len(option)] == option or (option[: len(field)] == field and field not in _written(text)):
            return f"--set {words}"
    line = line_of(text, field)
    return f"{path}:{line}" if line else str(path)


def _written(text: str) -> set[Path_]:
    from kdcli.recipe.locate import lines_of_keys

    return set(lines_of_keys(text))


def _merged(problems: list[tuple[Path_, str, str | None]]) -> list[tuple[Path_, str, str | None]]:
    """Join the alternatives of a field that may have several types into one problem."""
    merged: dict[Path_, tuple[list[str], str | None]] = {}
    for field, message, hint in problems:
        messages, _ = merged.setdefault(field, ([], hint))
        if message not in messages:
            messages.append(message)
    return [(field, " or ".join(messages), hint) for field, (messages, hint) in merged.items()]


def _problem(schema: type[BaseModel], entry: Any, prefix: Path_) -> tuple[Path_, str, str | None]:
    location = [str(part) for part in entry["loc"] if isinstance(part, str) and _is_field(part)]
    field = (*prefix, *location)
    kind, found = entry["type"], entry["input"]
    context = entry.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_at(schema, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return field, "unknown field", hint
    if kind == "missing":
        return field, "is missing", None
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(found), choices, n=1)
        suggestion = f"did you mean {near[0]!r}?" if near else None
        return field, f"{found!r} is not one of {', '.join(map(repr, choices))}", suggestion
    if kind == "value_error":
        return field, str(context.get("error", entry["msg"])), None
    message = entry["msg"][0].lower() + entry["msg"][1:]
    message = message.replace("input should be", "must be").replace("a valid ", "a ")
    return field, f"{message}, not {found!r}", None


def _is_field(part: str) -> bool:
    # pydantic names the branch of a union ("int", "list[nonnegative-int]", "FinetuneSection") like a field.
    return (
        part not in {"int", "str", "bool", "float"} and "[" not in part and not part[:1].isupper() and "-" not in part
    )


def _fields_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    current: Any = schema
    for part in location:
        field = current.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)


def _check_method(recipe: Recipe, path: Path, text: str, options: dict[Path_, str]) -> None:
    from kdcli.methods import registry

    try:
        method = registry.get(recipe.method.name)
    except InputError as error:
        field = ("method", "name")
        raise InputError(
            error.message, where=f"{_where(field, path, text, options)}: method.name", hint=error.hint
        ) from None
    _validate(method.options, recipe.method.options, path, text, options, prefix=("method",))


def validate_section(schema: type[BaseModel], values: dict[str, Any]) -> Any:
    """Return `values` as a section. Raises InputError in the words of a recipe when something does not fit."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = _merged([_problem(schema, entry, ()) for entry in error.errors()])
        raise InputError(
            "\n".join(f"--{'.'.join(f).replace('_', '-')}: {m}" + (f" ({h})" if h else "") for f, m, h in problems)
        ) from error
