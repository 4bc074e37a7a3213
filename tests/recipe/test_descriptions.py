"""Every field that a recipe may have says what it is."""

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from kdcli.data.sets import named_sets
from kdcli.methods import registry
from kdcli.recipe.schema import Recipe, TaskSection
from kdcli.tasks import registry as kinds


def tables(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield every table inside a type, wherever unions, lists and annotations hide it."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from tables(field.annotation)
    for inner in get_args(kind):
        yield from tables(inner)


ROOTS = (
    Recipe,
    *(registry.get(name).options for name in registry.names()),
    *(kinds.get(name).fields for name in kinds.names()),
)
SCHEMAS = {schema: None for root in ROOTS for schema in tables(root)}


def test_the_walk_reaches_tables_of_methods_and_tables_inside_tables():
    assert {"FinetuneSection", "DownstreamSection", "BlackBoxOptions", "EMDOptions"} <= {s.__name__ for s in SCHEMAS}


def test_the_field_of_the_tasks_name_lists_every_set_that_is_known():
    text = TaskSection.model_fields["name"].description or ""
    assert named_sets().keys() <= set(re.findall(r"\w+", text.partition(", or a name of your own")[0]))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: f"{s.__module__.rpartition('.')[2]}.{s.__name__}")
def test_every_field_is_described_in_whole_sentences(schema: type[BaseModel]):
    for name, field in schema.model_fields.items():
        text = field.description or ""
        assert re.fullmatch(r'["\w].{10,}[.]', text), f"{schema.__name__}.{name}: {text!r}"
        # None says nothing by itself: the description tells what it means, or what to give in its place.
        if field.default is None:
            assert re.search(r"Left out|Give|in place of|instead of|beside", text), (
                f"{schema.__name__}.{name}: {text!r}"
            )
