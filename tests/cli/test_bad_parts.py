"""Wrong input in tasks of several parts."""

import json
from pathlib import Path

import pytest
from bad_input import Cases
from conftest import World

CASES = Cases()
case = CASES.add

HEAD = """
method = "kd"
[teacher]
model = "teacher"
[train]
max_steps = 1
[task]
name = "mood"
{task}
"""


def rows(world: World, name: str, labels: str = "yn", text: str = "text", label: str = "label") -> str:
    lines = [json.dumps({text: f"{name} {i}", label: labels[i % len(labels)]}) + "\n" for i in range(20)]
    return world.write(f"{name}.jsonl", "".join(lines))


def parts(world: World, *tables: str, task: str = 'text = "text"') -> list[str]:
    """Write a recipe with these parts, each the lines of its table, and return the arguments of the program."""
    world.model()
    for name in ("de", "en"):
        rows(world, name)
    body = "\n".join(f"[[task.part]]\n{table}\n" for table in tables)
    return ["distill", world.write("recipe.toml", HEAD.format(task=task) + body)]


DE = 'name = "de"\ndata = "de.jsonl"'
EN = 'name = "en"\ndata = "en.jsonl"'


@case("recipe.toml:15: task.part[1].name", "unknown task 'en'", "own data: task.part[1].data, task.part[1].train or")
def part_without_rows(world: World) -> list[str]:
    return parts(world, DE, 'name = "en"')


@case("recipe.toml:16: task.part[1].data", "no file at", "missing.jsonl")
def file_of_a_part_is_missing(world: World) -> list[str]:
    return parts(world, DE, 'name = "en"\ndata = "missing.jsonl"')


@case("recipe.toml:10: task.part", "part[0] and part[1] have one name")
def two_parts_of_one_name(world: World) -> list[str]:
    return parts(world, DE, 'name = "DE"\ndata = "en.jsonl"')


@case("recipe.toml:17: task.part[1].metrics", "holds for all parts", "hint: write it in [task]")
def field_of_the_task_in_a_part(world: World) -> list[str]:
    return parts(world, DE, f'{EN}\nmetrics = ["f1"]')


@case("recipe.toml:17: task.part[1].labels", "holds for all parts", "hint: write it in [task]")
def field_of_the_kind_in_a_part(world: World) -> list[str]:
    return parts(world, DE, f'{EN}\nlabels = ["y", "n"]')


@case("recipe.toml:17: task.part[1].lable", "unknown field", "did you mean 'label'?")
def near_miss_in_a_part(world: World) -> list[str]:
    return parts(world, DE, f'{EN}\nlable = "mood"')


@case("recipe.toml:7: task", "the rows are those of its parts: data belongs into a [[task.part]]")
def parts_and_data(world: World) -> list[str]:
    return parts(world, DE, EN, task='text = "text"\ndata = "de.jsonl"')


@case("task.mixing_temperature", "a number from 1", "0")
def temperature_0(world: World) -> list[str]:
    return parts(world, DE, EN, task='text = "text"\nmixing_temperature = 0')


@case("mixing_temperature needs parts")
def temperature_without_parts(world: World) -> list[str]:
    return parts(world, task='text = "text"\ndata = "de.jsonl"\nmixing_temperature = 2')


@case("task.part", "must be an array of 1 to 1000 tables")
def no_parts(world: World) -> list[str]:
    return parts(world, task="part = []")


@case("recipe.toml:10: task.part[0].name", "is missing")
def part_without_a_name(world: World) -> list[str]:
    return parts(world, 'data = "de.jsonl"', EN)


@case("recipe.toml:14: task.part[1]", "give one of data, train and hub, not data and train")
def two_sources_of_a_part(world: World) -> list[str]:
    return parts(world, DE, f'{EN}\ntrain = "de.jsonl"')


@case("recipe.toml:14: task.part[1].label", "part en: dev.jsonl: row 2 has the label 'maybe'", "(n, y)")
def unknown_label_in_the_validation_rows_of_a_part(world: World) -> list[str]:
    rows(world, "dev", "y?")
    text = (world.folder / "dev.jsonl").read_text().replace('"?"', '"maybe"')
    world.write("dev.jsonl", text)
    return parts(world, DE, 'name = "en"\ntrain = "en.jsonl"\nvalidation = "dev.jsonl"')


@case("task.part[1].text", "part en: ", "has no text column 'text'", "'tweet'")
def column_of_a_part_has_another_name(world: World) -> list[str]:
    rows(world, "fr", text="tweet")
    return parts(world, DE, 'name = "fr"\ndata = "fr.jsonl"'.replace('"fr"\n', '"en"\n'))


@case("recipe.toml:16: task.part[1].name", "two parts are both called 'de test'", "give this part another name")
def set_of_a_part_has_the_name_of_another_part(world: World) -> list[str]:
    return parts(world, 'name = "de"\ntrain = "de.jsonl"\ntest = "en.jsonl"', 'name = "de test"\ndata = "en.jsonl"')


@case(
    "recipe.toml:14: task.part[1]", "part fr has the labels a, b, and part de has n, y: they share none", "task.labels"
)
def labels_of_a_part_in_other_words(world: World) -> list[str]:
    rows(world, "fr", "ab")
    return parts(world, DE, 'name = "fr"\ndata = "fr.jsonl"')


@case("task.part[1]", "stsb is a regression task", "de a classification task", "give task.type")
def parts_of_two_kinds(world: World) -> list[str]:
    rows(world, "fr", labels="12")
    text = (world.folder / "fr.jsonl").read_text().replace('"1"', "1.5").replace('"2"', "0.25")
    world.write("fr.jsonl", text)
    return parts(world, DE, 'name = "stsb"\ndata = "fr.jsonl"')


@case("task.part[1]", "other columns than those of the first part")
def pairs_in_one_part_only(world: World) -> list[str]:
    return parts(world, DE, f'{EN}\ntext = ["text", "text"]')


@case("--set task.part[2].data=fr.jsonl: ", "task.part has 2 tables, which count from 0")
def option_for_a_part_that_is_not_there(world: World) -> list[str]:
    return [*parts(world, DE, EN), "--set", "task.part[2].data=fr.jsonl"]


@case("--set task.part[1].data=fr.jsonl: task.part[1].data", "no file at", "fr.jsonl")
def option_with_a_wrong_file_for_a_part(world: World) -> list[str]:
    return [*parts(world, DE, EN), "--set", "task.part[1].data=fr.jsonl"]


@case("--set task.part[1]=fr.jsonl: ", "task.part is [a table, a table], not a table")
def option_for_a_whole_part(world: World) -> list[str]:
    return [*parts(world, DE, EN), "--set", "task.part[1]=fr.jsonl"]


@case("recipe.toml:10: task.part[0].label", "part de: de.jsonl has one class only")
def one_class_in_all_parts(world: World) -> list[str]:
    arguments = parts(world, DE, EN)
    for name in ("de", "en"):
        rows(world, name, "y")
    return arguments


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path) -> None:
    CASES.check(name, world, own_cache)
