"""kdcli recipes: what comes with the package, a copy of it that runs, and every field explained."""

import json
import re
import sys
import zipfile
from pathlib import Path
from subprocess import run as run_process

import jsonschema
import pytest
from conftest import World

from kdcli.distill.recipe import load_recipe
from kdcli.methods import registry
from kdcli.recipe.schema import Recipe
from kdcli.recipe.shipped import SCHEMA_FILE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
FILES = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.rglob("*.toml")}


def test_the_list_has_each_recipe_with_a_whole_line_about_it(world: World):
    rows = world.call("recipes", "list", "--json").json["recipes"]
    assert {row["name"] for row in rows} == set(FILES)
    assert all(re.fullmatch(r"[A-Z].{20,90}[.]", row["summary"]) for row in rows), rows
    world.monkeypatch.setenv("COLUMNS", "120")
    lines = world.call("recipes", "list").out.splitlines()
    assert len(lines) == len(rows) and all(row["summary"] in line for row, line in zip(rows, lines, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_what_is_shown_and_what_is_copied_is_the_recipe(name: str, world: World):
    shown = world.call("recipes", "show", name)
    copied = world.call("recipes", "copy", name, "mine.toml", "--json")
    assert (shown.code, copied.code) == (0, 0)
    first, _, rest = Path("mine.toml").read_text(encoding="utf-8").partition("\n")
    assert rest == shown.out and rest in FILES[name].read_text(encoding="utf-8")
    assert load_recipe(Path("mine.toml")) == load_recipe(FILES[name])
    # The file that the first line names is there, and is a schema that the recipe is valid by.
    schema = json.loads(Path(first.removeprefix("#:schema ")).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert copied.json == {"schema_version": 1, "recipe": "mine.toml", "schema": "recipe.schema.json"}


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_the_recipes_of_the_checkout_name_one_file_for_their_schema(path: Path):
    line = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / line.removeprefix("#:schema ")).resolve() == FOLDER / SCHEMA_FILE


def test_a_copy_goes_into_a_folder_and_says_what_is_next(world: World):
    outcome = world.call("recipes", "copy", "methods/kd", "new/folder")
    assert outcome.code == 0 and outcome.out.strip() == "new/folder/kd.toml"
    assert "next: change it, then kdcli distill new/folder/kd.toml --dry-run" in outcome.err
    assert Path("new/folder/kd.toml").is_file() and Path("new/folder/recipe.schema.json").is_file()


def test_nothing_is_overwritten_without_force(world: World):
    Path("quickstart.toml").write_text("mine", encoding="utf-8")
    outcome = world.call("recipes", "copy", "quickstart")
    assert outcome.code == 2 and "quickstart.toml exists already" in outcome.err and "--force" in outcome.err
    assert Path("quickstart.toml").read_text(encoding="utf-8") == "mine"
    assert world.call("recipes", "copy", "quickstart", "--force").code == 0
    assert Path("quickstart.toml").read_text(encoding="utf-8") != "mine"


def test_a_schema_file_of_someone_else_stays(world: World):
    Path("recipe.schema.json").write_text('{"title": "another"}', encoding="utf-8")
    outcome = world.call("recipes", "copy", "quickstart")
    assert outcome.code == 0 and "not written by kdcli" in outcome.err
    assert json.loads(Path("recipe.schema.json").read_text(encoding="utf-8")) == {"title": "another"}


def test_a_copy_where_nothing_can_be_written_is_refused(world: World):
    Path("file").touch()
    outcome = world.call("recipes", "copy", "quickstart", "file")
    assert outcome.code == 2 and "cannot write to file" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["recipes", "show", "quickstrat"], "did you mean quickstart?"),
        (["recipes", "copy", "kd"], "did you mean methods/kd?"),
        (["recipes", "show", "zzz"], "kdcli recipes list"),
        (["recipes", "shwo"], "did you mean kdcli recipes show?"),
        (["distill", "quickstart"], "copy it first: kdcli recipes copy quickstart"),
        (["distill", "recipes/methods/kd.toml"], "copy it first: kdcli recipes copy methods/kd"),
    ],
)
def test_a_wrong_name_is_met_with_the_right_one(arguments: list[str], told: str, world: World):
    outcome = world.call(*arguments)
    assert outcome.code == 2 and told in outcome.err


# The fields


def test_every_field_is_explained_by_its_name(world: World):
    rows = world.call("recipes", "explain", "--json").json["fields"]
    assert {"task", "task.name", "student.budget", "finetune.task.text", "task.augment.finetune.epochs"} <= {
        row["field"] for row in rows
    }
    words = " ".join(world.call("recipes", "explain").out.split())
    for row in rows:
        assert " ".join(row["description"].split()) in words or row["field"].count(".") > 1, row["field"]
    for row in rows[::7]:
        assert row in world.call("recipes", "explain", row["field"], "--json").json["fields"]


def test_a_field_is_told_with_type_range_choices_and_default(world: World):
    budget = world.call("recipes", "explain", "student.budget").out
    assert "a number above 0 and at most 1" in budget
    select = world.call("recipes", "explain", "train.select").out
    assert 'one of "best", "last"' in select and '"best"' in select
    assert "required" in world.call("recipes", "explain", "[task].name").out
    assert "a string or a table" in world.call("recipes", "explain", "finetune[0].task").out


def test_a_table_is_told_with_its_fields(world: World):
    document = world.call("recipes", "explain", "[overparam]", "--json").json
    assert "overparam.length" in [row["field"] for row in document["fields"]]
    assert "Number of middle tensors" in world.call("recipes", "explain", "overparam").out
    [row] = world.call("recipes", "explain", "overparam.factors.768", "--json").json["fields"]
    assert row["field"] == "overparam.factors"


def test_a_methods_options_and_its_defaults_for_other_tables(world: World):
    [alpha] = world.call("recipes", "explain", "method.alpha", "--method", "makd", "--json").json["fields"]
    assert alpha["default"] == registry.get("makd").options.model_fields["alpha"].default
    [epochs] = world.call("recipes", "explain", "train.epochs", "--method", "theseus", "--json").json["fields"]
    assert epochs["default_of_method"] == registry.get("theseus").train["epochs"]
    everything = world.call("recipes", "explain", "--method", "dbkd", "--json").json["fields"]
    assert "method.black_box.command" in [row["field"] for row in everything]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        (["student.budjet"], "did you mean 'budget'?"),
        (["budget"], "did you mean student.budget"),
        (["method.alpha"], "give --method, one of kd"),
        (["method.alpha", "--method", "mkd"], "did you mean"),
        (["method.alhpa", "--method", "kd"], "did you mean 'alpha'?"),
        ([""], "known here"),
    ],
    ids=str,
)
def test_a_field_that_is_not_there_is_met_with_the_nearest(field: list[str], told: str, world: World):
    outcome = world.call("recipes", "explain", *field)
    assert outcome.code == 2 and told in outcome.err


def test_a_field_that_several_kinds_of_tasks_have_is_named_once(world: World):
    hint = world.call("recipes", "explain", "task.thresholds").err.partition("known here: ")[2]
    names = [name.strip() for name in hint.split(",")]
    assert "text" in names and len(names) == len(set(names)), hint


@pytest.mark.parametrize("argument", ["show", "copy"])
def test_a_recipe_that_is_not_named_is_met_with_the_list(argument: str, world: World):
    outcome = world.call("recipes", argument)
    assert outcome.code == 2 and "kdcli recipes list" in outcome.err


@pytest.mark.parametrize(
    "odd", ["\x00", "[]", "a..b", ".", "task.", "method.", "student.layers.x", "\ud800", "x" * 5000]
)
def test_odd_names_end_with_a_message(odd: str, world: World):
    for arguments in (["explain", odd], ["show", odd], ["copy", odd]):
        outcome = world.call("recipes", *arguments)
        assert (outcome.code == 2 and len(outcome.err) < 1000) or outcome.code == 0, (arguments, outcome.err)
    assert not any(path.suffix == ".toml" for path in world.folder.iterdir())


# The package


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_package_has_the_recipes(kind: str, tmp_path: Path):
    def pip(*arguments: str) -> None:
        run_process([sys.executable, "-m", "pip", "-q", *arguments], check=True, cwd=tmp_path)

    source = ROOT
    if kind == "sdist":
        build = "import sys, hatchling.build; print(hatchling.build.build_sdist(sys.argv[1]))"
        pip("install", "--target", "tools", "hatchling")
        run_process(
            [sys.executable, "-c", build, str(tmp_path)],
            check=True,
            cwd=ROOT,
            env={"PYTHONPATH": str(tmp_path / "tools")},
        )
        source = next(tmp_path.glob("*.tar.gz"))
    pip("wheel", "--no-deps", "-w", "built", str(source))
    zipfile.ZipFile(next(tmp_path.glob("built/*.whl"))).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "kdcli", "recipes", "list", "--json"]
    done = run_process(command, check=True, cwd=tmp_path / "site", capture_output=True, text=True)
    assert {row["name"] for row in json.loads(done.stdout)["recipes"]} == set(FILES)
    assert (tmp_path / "site" / "kdcli" / "recipes" / "quickstart.toml").is_file()


def test_the_schema_beside_the_recipes_is_the_one_of_today(world: World):
    today = world.call("recipes", "schema").out
    path = FOLDER / SCHEMA_FILE
    assert path.read_text(encoding="utf-8") == today, f"write it again: kdcli recipes schema > recipes/{SCHEMA_FILE}"


def test_the_schema_is_printed_as_it_is_written(world: World):
    plain, document = world.call("recipes", "schema"), world.call("recipes", "schema", "--json").json
    assert {"schema_version": 1, **json.loads(plain.out)} == document
    assert set(document["properties"]) == set(Recipe.model_fields)
