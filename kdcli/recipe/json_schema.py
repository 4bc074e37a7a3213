"""Recipes as a JSON Schema (draft 2020-12), for completion and checks in editors."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kdcli.recipe.parts import own_of_parts
from kdcli.recipe.schema import PartSection, Recipe, ScratchSection, TaskSection

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(
    methods: Mapping[str, type[BaseModel]],
    kinds: Mapping[str, type[BaseModel]],
    *,
    recognised: Collection[str],
    families: Collection[str],
) -> dict[str, Any]:
    """Return the JSON Schema of a recipe, in which a method's name chooses its options.

    methods: name -> schema of its options. kinds: name of a kind of task -> schema of its own fields; a `[task]` may
    have those of every kind, and needs its type where no kind of `recognised`, those that data may show, has a field.
    families: names of families of models. The schema refuses unknown fields, wrong types and values out of range; what
    fields must be to each other is checked by kdcli alone.
    """
    own = (Recipe, TaskSection, PartSection, ScratchSection)
    roots = [(schema, "validation") for schema in (*own, *methods.values(), *kinds.values())]
    references, document = models_json_schema(roots, ref_template="#/$defs/{model}")  # type: ignore[arg-type]
    tables = {key: _tidy(table) for key, table in document["$defs"].items()}
    recipe = tables.pop(_key(references[(Recipe, "validation")]))
    for name, options in methods.items():
        table = tables[_key(references[(options, "validation")])]
        tables[f"method-{name}"] = {
            **table,
            "properties": {"name": {"const": name}, **table.get("properties", {})},
            "required": ["name", *table.get("required", [])],
        }
    task = tables[_key(references[(TaskSection, "validation")])]
    task["properties"]["type"] = {"description": task["properties"]["type"]["description"], "enum": list(kinds)}
    part = tables[_key(references[(PartSection, "validation")])]
    task["additionalProperties"] = part["additionalProperties"] = False
    for fields in kinds.values():
        for name, field in tables[_key(references[(fields, "validation")])].get("properties", {}).items():
            task["properties"][name] = _either(task["properties"].get(name, field), field)
            if name in own_of_parts(fields):
                part["properties"][name] = task["properties"][name]
    untyped = {name for kind in recognised for name in kinds[kind].model_fields}
    typed = (
        {name for fields in kinds.values() for name in fields.model_fields} - untyped - set(TaskSection.model_fields)
    )
    if typed:
        task["dependentRequired"] = {name: ["type"] for name in sorted(typed)}
    scratch = tables[_key(references[(ScratchSection, "validation")])]
    scratch["properties"]["family"]["enum"] = list(families)
    method = recipe["properties"]["method"]
    recipe["properties"]["method"] = {
        "description": method["description"],
        "anyOf": [{"enum": list(methods)}, *({"$ref": f"#/$defs/method-{name}"} for name in methods)],
    }
    used = _reachable(recipe, tables)
    return {
        "$schema": DIALECT,
        "title": "kdcli recipe",
        **recipe,
        "$defs": {key: table for key, table in tables.items() if key in used},
    }


def _key(reference: Mapping[str, Any]) -> str:
    return reference["$ref"].removeprefix("#/$defs/")


def _either(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field that kinds of tasks give two meanings; the first one describes it."""
    return first if first == second else {"description": first.get("description", ""), "anyOf": [first, second]}


def _tidy(part: Any) -> Any:
    """Return a part of pydantic's schema without titles, null (TOML has none) and whole tables as defaults."""
    if isinstance(part, list):
        return [_tidy(item) for item in part]
    if not isinstance(part, dict):
        return part
    found: dict[str, Any] = {}
    for key, value in part.items():
        if key == "properties":
            found[key] = {name: _tidy(inner) for name, inner in value.items()}
        elif (key == "title" and isinstance(value, str)) or (key == "default" and isinstance(value, dict | None)):
            continue
        else:
            found[key] = _tidy(value)
    if "anyOf" in found:
        kinds = [kind for kind in found.pop("anyOf") if kind != {"type": "null"}]
        found = {**found, **kinds[0]} if len(kinds) == 1 else {**found, "anyOf": kinds}
    return found


def _reachable(part: Any, tables: Mapping[str, Any], found: set[str] | None = None) -> set[str]:
    """Return the keys of the tables that a part of the schema refers to, directly or through others."""
    found = set() if found is None else found
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _reachable(value, tables, found)
    reference = part.get("$ref") if isinstance(part, dict) else None
    if isinstance(reference, str) and (key := reference.removeprefix("#/$defs/")) not in found:
        found.add(key)
        _reachable(tables[key], tables, found)
    return found
