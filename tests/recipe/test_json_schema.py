"""The JSON Schema says of a recipe what the program says, as far as a schema can."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import Field, ValidationError

from kdcli.methods import registry
from kdcli.models import families
from kdcli.recipe.fields import Entry, fields_of, fields_of_kinds
from kdcli.recipe.json_schema import recipe_schema
from kdcli.recipe.schema import Recipe
from kdcli.tasks import registry as kinds
from kdcli.tasks.kind import Fields

ROOT = Path(__file__).parents[2]
SCHEMA = recipe_schema(
    {name: registry.get(name).options for name in registry.names()},
    {name: kinds.get(name).fields for name in kinds.names()},
    recognised=kinds.recognisable(),
    families=families.names(),
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
LEAST: dict[str, Any] = {"task": {"name": "sst2"}, "method": {"name": "kd"}, "teacher": {"model": "model"}}
# "value_error" is what fields must be to each other, and the inside of strings: a schema does not tell.
BEYOND = {"value_error"}
WRONG: list[Any] = [{"x": 1}, [[]], [-1.5], -1, 0, 1.5, 10**13, "", "word", True, [], ["word"], [1, 2, 3, 4], {}]


def test_it_is_a_schema_without_null_and_with_a_description_at_every_field():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def walk(part: Any, path: str = "") -> Iterator[str]:
        if isinstance(part, dict):
            for name, field in part.get("properties", {}).items():
                if "description" not in field and "const" not in field:
                    yield f"{path}.{name}"
            for key, value in part.items():
                assert key != "type" or value != "null"
                yield from walk(value, f"{path}.{key}")
        elif isinstance(part, list):
            for value in part:
                yield from walk(value, path)

    assert not list(walk(SCHEMA))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_package_is_valid_by_it(path: Path):
    VALIDATOR.validate(tomllib.loads(path.read_text(encoding="utf-8")))


def test_the_methods_name_chooses_its_options():
    for name in registry.names():
        assert VALIDATOR.is_valid({**LEAST, "method": name})
        defaults = registry.get(name).options().model_dump(exclude_none=True)
        assert VALIDATOR.is_valid({**LEAST, "method": {"name": name, **defaults}})
        assert not VALIDATOR.is_valid({**LEAST, "method": {"name": name, "no_such_option": 1}})
    assert VALIDATOR.is_valid({**LEAST, "method": {"name": "makd", "schedule": "staged"}})
    assert not VALIDATOR.is_valid({**LEAST, "method": {"name": "kd", "schedule": "staged"}})
    assert not VALIDATOR.is_valid({**LEAST, "method": "mkd"})


def put(document: dict[str, Any], entry: Entry, value: Any, tables: dict[tuple[str, ...], Entry]) -> dict[str, Any]:
    """Return a copy of the document with a value in a field, in an array of one table where there are several."""
    changed = dict(document)
    head, *rest = entry.path
    if rest:
        inner = changed.get(head, {})
        table = tables[entry.path[: len(entry.path) - len(rest)]]
        below = Entry(tuple(rest), entry.field, entry.table, entry.many)
        inside = {path[1:]: found for path, found in tables.items() if path[0] == head and len(path) > 1}
        filled = put(inner[0] if isinstance(inner, list) and inner else inner or {}, below, value, inside)
        value = [filled] if table.many else filled
    changed[head] = value
    return changed


def check(document: dict[str, Any], name: str, errors: list[Any]) -> None:
    kinds = {error["type"] for error in errors}
    if not kinds:
        assert VALIDATOR.is_valid(document), (name, document)
    elif not kinds <= BEYOND:
        assert not VALIDATOR.is_valid(document), (name, document, kinds)


ENTRIES = list(fields_of(Recipe))


OPEN = ("method", "method.name", "task.type", "finetune.task.type")
"""What names something that has a schema of its own: the recipe's leaves it open."""


def test_the_types_of_tasks_are_those_that_there_are():
    for name in kinds.names():
        assert VALIDATOR.is_valid({**LEAST, "task": {"name": "own", "type": name}})
    assert not VALIDATOR.is_valid({**LEAST, "task": {"name": "own", "type": "word"}})


@pytest.mark.parametrize("entry", [e for e in ENTRIES if len(e.path) < 4 and e.name not in OPEN], ids=lambda e: e.name)
def test_it_refuses_what_the_program_refuses_of_a_field(entry: Entry):
    tables = {found.path: found for found in ENTRIES if found.table is not None}
    # What a table needs beside the field, so that only the field can be at fault.
    document: dict[str, Any] = dict(LEAST)
    for needed in ENTRIES:
        within = entry.path[: len(needed.path) - 1] == needed.path[:-1] and len(needed.path) > 1
        if within and needed.field.is_required() and needed.path[0] not in LEAST:
            document = put(document, needed, {"name": "sst2"} if needed.table else "word", tables)
    for value in (*WRONG, *([entry.default] if entry.default is not None else [])):
        changed = put(document, entry, value, tables)
        try:
            Recipe.model_validate(changed)
            errors: list[Any] = []
        except ValidationError as error:
            errors = error.errors()
        check(changed, entry.name, errors)


@pytest.mark.parametrize("name", registry.names())
def test_it_refuses_what_the_program_refuses_of_a_methods_option(name: str):
    options = registry.get(name).options
    for entry in (found for found in fields_of(options) if len(found.path) == 1):
        for value in WRONG:
            try:
                options.model_validate({entry.name: value})
                errors: list[Any] = []
            except ValidationError as error:
                errors = error.errors()
            check({**LEAST, "method": {"name": name, entry.name: value}}, f"{name}.{entry.name}", errors)


def test_the_descriptions_name_every_choice_that_the_type_does_not():
    from kdcli.data.glue import GLUE
    from kdcli.methods.hs import NAMES

    words = {entry.name: re.findall(r"[\w+-]+", entry.field.description or "") for entry in ENTRIES}
    assert set(GLUE) <= set(words["task.name"])
    described = re.findall(r'"([\w+-]+)"', registry.get("hs").options.model_fields["layer_map"].description or "")
    assert set(described) == set(NAMES)


def test_a_field_that_no_kind_has_which_data_show_needs_the_type():
    assert {"classification", "regression"} <= set(kinds.recognisable()) and "text" not in kinds.recognisable()
    document = {**LEAST, "task": {"name": "own", "data": "texts", "mask_probability": 0.2}}
    assert not VALIDATOR.is_valid(document)
    assert VALIDATOR.is_valid({**document, "task": {**document["task"], "type": "text"}})
    assert VALIDATOR.is_valid({**LEAST, "task": {"name": "own", "data": "rows.csv", "text": "text", "label": "label"}})


def test_the_families_of_a_teacher_from_scratch_are_those_that_there_are():
    for name in families.names():
        assert VALIDATOR.is_valid({**LEAST, "teacher": {"scratch": {"family": name}}})
    assert not VALIDATOR.is_valid({**LEAST, "teacher": {"scratch": {"family": "bloom"}}})


def test_a_field_of_a_kind_of_task_is_one_of_its_table():
    class First(Fields):
        own: int = Field(default=1, description="A number.")
        both: str = Field(default="", description="A column.")

    class Second(Fields):
        both: list[str] = Field(default=[], description="Columns.")

    options = {"kd": registry.get("kd").options}
    schema = recipe_schema(options, {"first": First, "second": Second}, recognised=["first"], families=["bert"])
    validator = jsonschema.Draft202012Validator(schema)
    for fields in ({"own": 2}, {"both": "x"}, {"both": ["x", "y"]}, {"type": "second"}):
        assert validator.is_valid({**LEAST, "task": {"name": "mine", **fields}})
    for fields in ({"own": "x"}, {"both": 1}, {"type": "third"}, {"other": 1}):
        assert not validator.is_valid({**LEAST, "task": {"name": "mine", **fields}})
    rows = fields_of_kinds({"first": First, "second": Second, "third": First}, ("task",))
    assert [(row.name, row.kinds) for row in rows] == [
        ("task.own", ("first", "third")),
        ("task.both", ("first", "third")),
        ("task.both", ("second",)),
    ]
