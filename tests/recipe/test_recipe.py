"""Recipes: what is valid, what a mistake is told as and where."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.distill.recipe import load_recipe
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.recipe.load import portable, validate_section, with_place
from kdcli.recipe.locate import line_of, lines_of_keys
from kdcli.recipe.schema import OverparamSection, Recipe, StudentSection, TrainSection, parse_count
from kdcli.runs import to_toml

ROOT = Path(__file__).parents[2]
LEAST = 'task = "sst2"\nmethod = "makd"\n[teacher]\nmodel = "google-bert/bert-base-uncased"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), list(overrides))


def error(folder: Path, text: str, *overrides: str) -> InputError:
    """Return the error that a recipe gives, its paths relative to the folder."""
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    found = caught.value
    where = found.where.replace(f"{folder}/", "") if found.where else None
    return InputError(found.message.replace(f"{folder}/", ""), where=where, hint=found.hint)


# What is valid


def test_task_method_and_teacher_are_a_whole_recipe(tmp_path: Path):
    recipe = load(tmp_path, LEAST)
    assert (recipe.task.name, recipe.method.name) == ("sst2", "makd")
    assert recipe.teacher.model == "google-bert/bert-base-uncased"
    assert recipe.seed == 42 and recipe.train == TrainSection() and recipe.student == StudentSection()
    assert recipe.overparam is None and recipe.name is None


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_that_come_with_the_package_are_valid(path: Path):
    recipe = load_recipe(path)
    method = registry.get(recipe.method.name)
    method.options.model_validate(recipe.method.options)


def test_the_recipes_of_the_readme_are_valid(tmp_path: Path):
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    whole = [block for block in blocks if "[teacher]" in block]
    assert whole
    for block in whole:
        load(tmp_path, block)


@pytest.mark.parametrize("page", ["README.md", "recipes/benchmarks/README.md"])
def test_what_a_page_links_to_is_there(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links and all((ROOT / page).parent.joinpath(link).is_file() for link in links)


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024


def test_short_and_long_forms_say_the_same(tmp_path: Path):
    long = '[task]\nname = "sst2"\n[method]\nname = "makd"\n[teacher]\nmodel = "google-bert/bert-base-uncased"\n'
    assert load(tmp_path, LEAST) == load(tmp_path, long)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.replace("\n", "\r\n").encode())
    assert load_recipe(path) == load(tmp_path, LEAST)


def test_whole_numbers_are_numbers(tmp_path: Path):
    assert load(tmp_path, LEAST + "[train]\nepochs = 2\nweight_decay = 0\n").train.epochs == 2.0


def test_methods_read_their_own_options(tmp_path: Path):
    recipe = load(tmp_path, LEAST, "method.alpha=0.25", "method.weights.layer=0.5")
    assert recipe.method.options == {"alpha": 0.25, "weights": {"layer": 0.5}}


def test_what_a_run_keeps_of_a_recipe_is_the_same_recipe(tmp_path: Path):
    text = LEAST.replace('task = "sst2"', '[task]\nname = "x"\ntype = "text"\ndata = "texts"\n').replace(
        'method = "makd"\n', ""
    )
    text = 'method = "kd"\n' + text + '[[finetune]]\ntask = "rte"\n[[finetune]]\ntask = "sst2"\nagainst = ["scratch"]\n'
    recipe = load(tmp_path, text, "overparam.factors={768 = [32, 1, 24]}", "student.layers=[0, 2]")
    again = load(tmp_path, to_toml(recipe.model_dump(exclude_none=True)))
    assert again == recipe and len(again.finetune) == 2


# What a mistake is told as


@pytest.mark.parametrize(
    ("lines", "where", "message", "hint"),
    [
        ("sead = 1", "recipe.toml:1: sead", "unknown field", "did you mean 'seed'?"),
        ("budget = 0.5", "recipe.toml:1: budget", "unknown field", "did you mean student.budget or assistant.budget?"),
        ("seed = -1", "recipe.toml:1: seed", "must be a whole number from 0 to 4,294,967,295, not -1", None),
        ("seed = 1.5", "recipe.toml:1: seed", "must be a whole number from 0 to 4,294,967,295, not 1.5", None),
        ("seed = true", "recipe.toml:1: seed", "must be a whole number from 0 to 4,294,967,295, not true", None),
        ("name = 3", "recipe.toml:1: name", "must be a string, not 3", None),
        ("student = 3", "recipe.toml:1: student", "must be a table, not 3", None),
        ("student.budget = 0", "recipe.toml:1: student.budget", "must be a number above 0 and at most 1, not 0", None),
        ('student.form = "deep"', "recipe.toml:1: student.form", None, "did you mean 'depth'?"),
        ('student.layers = "six"', "recipe.toml:1: student.layers", None, None),
        (
            "student.layers = [0, -1]",
            "recipe.toml:1: student.layers[1]",
            "must be a whole number from 0 to 1,000,000,000, not -1",
            None,
        ),
        ('train = {select = "lest"}', "recipe.toml:1: train.select", None, "did you mean 'last'?"),
        ("\n# why\n\ntrain.warmup = 2", "recipe.toml:4: train.warmup", "must be a number from 0 to 1, not 2", None),
        ("train.batch_size = 2_000.0", "recipe.toml:1: train.batch_size", None, None),
        ("export.opset = 19", "recipe.toml:1: export.opset", "must be a whole number from 20 to 23, not 19", None),
        ("train.Learning-Rate = 1", "recipe.toml:1: train.Learning-Rate", "unknown field", None),
        (
            "overparam.scale = 1",
            "recipe.toml:1: overparam.scale",
            "must be a number above 1 and at most 1,000, not 1",
            None,
        ),
        ("overparam.factors = {768 = [32, 0]}", "recipe.toml:1: overparam.factors.768[1]", None, None),
        ('student.params = "many"', "recipe.toml:1: student.params", None, None),
    ],
)
def test_a_mistake_has_a_line_a_field_and_a_way_out(
    lines: str, where: str, message: str | None, hint: str | None, tmp_path: Path
):
    found = error(tmp_path, f"{lines}\n{LEAST}")
    assert found.where == where
    assert message is None or found.message == message
    assert hint is None or found.hint == hint


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('task = "sst2"\nmethod = \n', "2:10"),
        ('task = "sst2\n', "1:13"),
        ("[task\n", "1:6"),
        ("seed = 1\nseed = 2\n", "2"),
    ],
)
def test_broken_toml_is_told_with_line_and_column(text: str, place: str, tmp_path: Path):
    found = error(tmp_path, text)
    assert found.where.startswith(f"recipe.toml:{place}") and "not valid TOML" in found.message
    assert "(at" not in found.message


def test_a_length_of_an_array_is_told_in_words(tmp_path: Path):
    box = '{name = "dbkd", black_box = {command = []}}'
    found = error(tmp_path, LEAST.replace('"makd"', box))
    assert found.message == "must be an array of 1 or more strings, not []"
    found = error(tmp_path, LEAST.replace('"makd"', '{name = "makd", shares = [0.5]}'))
    assert "must be an array of 3 " in found.message


@pytest.mark.parametrize("missing", ["task", "method", "teacher"])
def test_what_is_missing_is_named_with_an_example(missing: str, tmp_path: Path):
    document = tomllib.loads(LEAST)
    del document[missing]
    found = error(tmp_path, to_toml(document))
    assert found.where == f"recipe.toml: {missing}" and found.message == "is missing"
    assert missing in found.hint and "add" in found.hint


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path):
    text = (
        'seed = "x"\ntask = "sst2"\nmethod = {name = "makd", alhpa = 0.5}\n[teacher]\nmodel = "m"\ncashe = true\n'
        "[train]\nepochs = -1\n"
    )
    lines = error(tmp_path, text, "student.budget=2").message.splitlines()
    assert lines == [
        "recipe.toml: 5 problems",
        '  recipe.toml:1: seed: must be a whole number from 0 to 4,294,967,295, not "x"',
        "  recipe.toml:3: method.alhpa: unknown field (did you mean 'alpha'?)",
        "  recipe.toml:6: teacher.cashe: unknown field (did you mean 'cache'?)",
        "  recipe.toml:8: train.epochs: must be a number above 0 and at most 1,000,000, not -1",
        "  --set student.budget=2: student.budget: must be a number above 0 and at most 1, not 2",
    ]


def test_mistakes_in_a_list_of_tables_have_their_own_lines(tmp_path: Path):
    text = (
        'method = "kd"\n[task]\nname = "x"\ntype = "text"\n[teacher]\nmodel = "m"\n'
        '[[finetune]]\ntask = "rte"\n[[finetune]]\nepoch = 3\nagainst = ["scratch", "techer"]\n'
        '[finetune.task]\nnme = "rte"\n'
    )
    lines = error(tmp_path, text).message.splitlines()
    assert lines == [
        "recipe.toml: 4 problems",
        "  recipe.toml:10: finetune[1].epoch: unknown field (did you mean 'epochs'?)",
        '  recipe.toml:11: finetune[1].against[1]: must be one of "scratch", "teacher", not "techer" '
        "(did you mean 'teacher'?)",
        "  recipe.toml:12: finetune[1].task.name: is missing",
        "  recipe.toml:13: finetune[1].task.nme: unknown field (did you mean 'name'?)",
    ]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("[student]\nbudget = 0.5\nrank = 4", "one of budget, rank, params and energy, not budget and rank"),
        ('[student]\nform = "depth"\nrank = 4', 'form = "depth" has no rank'),
        ('[student]\nform = "low-rank"\nlayers = 4', 'form = "low-rank" has no layers'),
        ('[student]\nform = "checkpoint"', "needs model"),
        ("[train]\nbatch_size = 10\ngradient_accumulation = 4", "multiple of 4"),
        ('[[finetune]]\ntask = "rte"', "a general student"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(lines: str, words: str, tmp_path: Path):
    assert words in error(tmp_path, f"{LEAST}{lines}\n").message


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ('data = "a.csv"\ntrain = "b.csv"\ntext = "t"', "data and train"),
        ('validation = "b.csv"', "need a train file"),
        ('data = "a.csv"', 'needs text = "COLUMN"'),
        ('text = "t"', "needs data, train or hub"),
        ('data = "a.csv"\ntext = ["a", "b", "c"]', "one or two columns"),
        ('type = "text"\ndata = "a.txt"\nlabel = "x"', "no label"),
    ],
)
def test_sources_of_data_that_make_no_sense_are_refused(task: str, words: str, tmp_path: Path):
    text = f'method = "kd"\n[teacher]\nmodel = "m"\n[task]\nname = "own"\n{task}\n'
    found = error(tmp_path, text)
    place, _, field = str(found.where).partition(": ")
    assert words in found.message and field.startswith("task") and int(place.removeprefix("recipe.toml:")) >= 4


def test_what_data_and_models_show_gets_its_line_too(tmp_path: Path):
    path = write(tmp_path, LEAST + "[student]\nform = 'low-rank'\nrank = 999\n")
    late = InputError("too large", where="student.rank", hint="smaller")
    placed = with_place(late, path)
    assert placed.where == f"{path}:7: student.rank" and (placed.message, placed.hint) == ("too large", "smaller")
    assert with_place(late, path, ["student.rank=999"]).where == "--set student.rank=999: student.rank"
    elsewhere = InputError("bad", where="--opset")
    assert with_place(elsewhere, path) is elsewhere
    nowhere = InputError("bad")
    assert with_place(nowhere, path) is nowhere


# --set


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("seed=7", "seed", 7),
        ("name=quarter", "name", "quarter"),
        ('name="7"', "name", "7"),
        ("student.budget=0.25", "student.budget", 0.25),
        ("student.budget = 0.25", "student.budget", 0.25),
        ("student.params=14.5M", "student.params", "14.5M"),
        ("student.layers=[0, 3]", "student.layers", [0, 3]),
        ("train.group_by_length=false", "train.group_by_length", False),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("task=rte", "task.name", "rte"),
        ("task.max_length=64", "task.max_length", 64),
        ("overparam.length=1", "overparam.length", 1),
        ("teacher.finetune.epochs=2", "teacher.finetune.epochs", 2.0),
        ("teacher.finetune=false", "teacher.finetune", False),
        ("teacher.model=a=b", "teacher.model", "a=b"),
    ],
)
def test_set_changes_one_field(override: str, field: str, value: Any, tmp_path: Path):
    before = load(tmp_path, LEAST).model_dump()
    after = load(tmp_path, LEAST, override).model_dump()
    found: Any = after
    for part in field.split("."):
        found = found[part]
    assert found == value
    top = field.split(".")[0]
    assert {k: v for k, v in before.items() if k != top} == {k: v for k, v in after.items() if k != top}


def test_set_keeps_what_stands_beside_it(tmp_path: Path):
    text = LEAST + '[student]\nform = "low-rank"\nbudget = 0.5\n'
    student = load(tmp_path, text, "student.budget=0.25").student
    assert (student.form, student.budget) == ("low-rank", 0.25)
    assert load(tmp_path, text, "task.max_length=64").task.name == "sst2"
    text = LEAST.replace('task = "sst2"', 'task = {name = "sst2", max_length = 64}')
    task = load(tmp_path, text, "task=rte").task
    assert (task.name, task.max_length) == ("rte", 64)


def test_set_without_a_value_removes_a_field(tmp_path: Path):
    text = LEAST + 'finetune = {epochs = 5}\n[student]\nrank = 3\nform = "low-rank"\n[overparam]\nlength = 1\n'
    plain = load(tmp_path, LEAST)
    assert load(tmp_path, text, "student=", "overparam=", "teacher.finetune=") == plain
    assert load(tmp_path, text, "student.rank=", "student.budget=0.5").student == StudentSection(
        form="low-rank", budget=0.5
    )
    assert load(tmp_path, text, "overparam.length = ").overparam == OverparamSection()
    # What is not there, but could be, is nothing to complain about, and is not made either.
    absent = ("student.rank=", "overparam.length=", "overparam=", "method.temperature=", "teacher.finetune.epochs=")
    assert load(tmp_path, LEAST, *absent) == plain
    assert load(tmp_path, LEAST, 'name=""', "name=").name is None


@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        ("task=", "--set task=: task", "is missing"),
        ("method.name=", "--set method.name=: method.name", "is missing"),
        ("student.bugdet=", "--set student.bugdet=: student.bugdet", "unknown field"),
        ("studnet.budget=", "--set studnet.budget=: studnet", "unknown field"),
        ("method.temprature=", "--set method.temprature=: method.temprature", "unknown field"),
        ("seed.x=", "--set seed.x=", "seed is 7, not a table that has fields"),
        ("finetune.epochs=", "--set finetune.epochs=", "finetune is [a table], not a table that has fields"),
    ],
)
def test_set_without_a_value_checks_the_field(override: str, where: str, words: str, tmp_path: Path):
    found = error(tmp_path, "seed = 7\nfinetune = [{task = 'rte'}]\n" + LEAST, override)
    assert found.where == where and words in found.message


def test_the_last_set_of_a_field_counts(tmp_path: Path):
    assert load(tmp_path, LEAST, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "takes FIELD=VALUE"),
        ("=3", "takes FIELD=VALUE"),
        ("a b=3", "takes FIELD=VALUE"),
        ("student..budget=3", "takes FIELD=VALUE"),
        ("seed.x=3", "seed is 42, not a table"),
        ("seed=many", 'must be a whole number from 0 to 4,294,967,295, not "many"'),
        ("sead=1", "did you mean 'seed'?"),
        ("student.budgt=1", "did you mean 'budget'?"),
        ("studnet.budget=1", "did you mean 'student'?"),
        ("method.temprature=2", "did you mean 'temperature'?"),
        ("method=makdd", "did you mean 'makd'?"),
    ],
)
def test_a_wrong_set_is_named_as_it_was_written(override: str, words: str, tmp_path: Path):
    found = error(tmp_path, "seed = 42\n" + LEAST, override)
    assert "--set" in found.where and words in str(found)
    assert "FIELD=VALUE" in words or override in found.where


def test_a_conflict_between_file_and_set_names_both(tmp_path: Path):
    found = error(tmp_path, LEAST + "[student]\nrank = 4\n", "student.budget=0.5")
    assert found.where == "recipe.toml:5 with --set student.budget=0.5: student"


# Lines of keys


def test_keys_are_found_however_they_are_written():
    text = (
        'a = 1 # b = 2\n"c d".e = """\nf = 3\n"""\n[g]\nh = {i = 1, j = [1,\n 2]}\n[g."k.l"]\nm = \'n = 1\'\n'
        "[[o]]\np = 1\n[o.q]\nr = 1\n[[o]]\np = 2\ns = [{t = 1},\n {t = 2}]\n"
    )
    tomllib.loads(text)
    assert lines_of_keys(text) == {
        ("a",): 1,
        ("c d",): 2,
        ("c d", "e"): 2,
        ("g",): 5,
        ("g", "h"): 6,
        ("g", "h", "i"): 6,
        ("g", "h", "j"): 6,
        ("g", "k.l"): 8,
        ("g", "k.l", "m"): 9,
        ("o",): 10,
        ("o", "[0]"): 10,
        ("o", "[0]", "p"): 11,
        ("o", "[0]", "q"): 12,
        ("o", "[0]", "q", "r"): 13,
        ("o", "[1]"): 14,
        ("o", "[1]", "p"): 15,
        ("o", "[1]", "s"): 16,
        ("o", "[1]", "s", "[0]", "t"): 16,
        ("o", "[1]", "s", "[1]", "t"): 17,
    }
    lines = lines_of_keys(text)
    assert line_of(lines, ("g", "h", "unknown")) == 6 and line_of(lines, ("unknown",)) is None


_names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6)
_leaves = st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False), _names, st.lists(st.integers()))
_tables = st.recursive(
    st.dictionaries(_names, _leaves, max_size=4), lambda inner: st.dictionaries(_names, inner | _leaves, max_size=4)
)


def _paths(document: dict[str, Any], path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found = set()
    for key, value in document.items():
        found.add((*path, key))
        if isinstance(value, dict):
            found |= _paths(value, (*path, key))
    return found


@settings(max_examples=25, deadline=None)
@given(_tables)
def test_every_key_of_any_document_is_found(document: dict[str, Any]):
    text = to_toml(document)
    assert tomllib.loads(text) == document
    assert _paths(document) == set(lines_of_keys(text))


# Parameter counts


@pytest.mark.parametrize(
    ("text", "count"), [("14.5M", 14_500_000), ("800k", 800_000), ("1_000", 1000), ("2B", 2 * 10**9), (7, 7)]
)
def test_parameter_counts_have_units(text: str | int, count: int):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "much", "0", "-3M", "nan"])
def test_what_is_no_parameter_count_is_refused(text: str):
    with pytest.raises(ValueError, match="count"):
        parse_count(text)


# A command's options as a section


def test_a_commands_options_are_named_as_options():
    with pytest.raises(InputError, match=r"--svd-dtype: must be one of .*float64"):
        validate_section(OverparamSection, {"svd_dtype": "float16"})


def test_a_portable_recipe_names_whole_paths_and_nothing_else(tmp_path: Path):
    for name in ("rows.csv", "teacher", "text", "words.txt", "answers.csv"):
        (tmp_path / name).touch()
    document = {
        "task": {
            "name": "own",
            "data": "rows.csv",
            "text": "text",
            "augment": {"model": "teacher", "text": "words.txt"},
        },
        "method": {"name": "dbkd", "black_box": {"decisions": "answers.csv"}},
        "teacher": {"model": "teacher", "tokenizer": "google-bert/bert-base-uncased"},
        "output": "out",
    }
    found = portable(Recipe.model_validate(document), "mine", tmp_path)
    assert found["name"] == "mine" and found["output"] == str(tmp_path / "out")
    assert found["task"]["data"] == str(tmp_path / "rows.csv") and found["task"]["text"] == "text"
    assert found["task"]["augment"]["text"] == str(tmp_path / "words.txt")
    assert found["method"]["black_box"]["decisions"] == str(tmp_path / "answers.csv")
    assert found["teacher"]["model"] == str(tmp_path / "teacher")
    assert found["teacher"]["tokenizer"] == "google-bert/bert-base-uncased"
    Recipe.model_validate(found)
