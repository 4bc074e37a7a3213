"""The program as a whole: help, exit codes, what goes to stdout, and how it ends when it is cut short."""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import NAMED, RECIPE, ROWS, Outcome, World
from families import tiny
from rich.console import Console

import kdcli
from kdcli.cli.app import COMMANDS, run
from kdcli.cli.recipes import COMMANDS as RECIPES
from kdcli.distill.recipe import load_recipe
from kdcli.distill.run import run_distill
from kdcli.errors import InputError
from kdcli.files import to_json_text
from kdcli.methods import registry
from kdcli.models.counts import count_parameters
from kdcli.models.families import FAMILIES


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


# Help and versions


def test_the_version_is_the_packages(world: World):
    assert world.call("--version") == Outcome(0, f"kdcli {kdcli.__version__}\n", "")


def test_python_m_is_the_same_program():
    result = python("-m", "kdcli", "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"kdcli {kdcli.__version__}\n", "")


def test_help_names_every_command(world: World):
    outcome = world.call("--help")
    assert outcome.code == 0 and outcome.err == ""
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(summary.split()[0])}", outcome.out, re.MULTILINE), name
    assert world.call("-h").out == outcome.out


def test_no_arguments_give_the_help_and_exit_code_2(world: World):
    outcome = world.call()
    assert outcome.code == 2 and outcome.out == world.call("--help").out


@pytest.mark.parametrize("command", [*COMMANDS, *(f"recipes {name}" for name in RECIPES)])
def test_the_help_of_every_command_has_examples_with_options_that_exist(command: str, world: World):
    outcome = world.call(*command.split(), "--help")
    assert outcome.code == 0 and outcome.err == "" and "--json" in outcome.out
    assert world.call(*command.split(), "-h").out == outcome.out
    examples = [line.strip() for line in outcome.out.splitlines() if f"kdcli {command}" in line and "Usage" not in line]
    assert len(examples) >= 2, outcome.out
    known = set(re.findall(r"--[a-z][a-z-]+", outcome.out.replace("\n".join(examples), "")))
    for example in examples:
        own = example.split(f"kdcli {command}", 1)[1]
        assert set(re.findall(r"(?<= )--[a-z][a-z-]+", own)) <= known, example


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - {"recipes"}), *(f"recipes {name}" for name in RECIPES)])
def test_help_shows_words_in_square_brackets(command: str, world: World):
    place = (COMMANDS | {f"recipes {name}": row for name, row in RECIPES.items()})[command][0]
    module, member = place.split(":")
    function = getattr(importlib.import_module(module), member)
    written = [function.__doc__ or ""]
    for hint in get_type_hints(function, include_extras=True).values():
        written += [getattr(one, "help", None) or "" for one in getattr(hint, "__metadata__", ())]
    words = set(re.findall(r"\[[^\s\]]+\]", "\n".join(written)))
    assert command not in ("families", "export") or words
    shown = world.call(*command.split(), "--help").out
    assert not [word for word in words if word not in shown]


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from kdcli.cli.app import COMMANDS, run\n"
        "for arguments in [['--help'], ['--version'], *([name, '--help'] for name in COMMANDS)]:\n"
        "    assert run(arguments) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnxruntime', 'sklearn', 'scipy', 'numpy'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_shell_completes_commands(world: World):
    for name, value in {"_KDCLI_COMPLETE": "complete_bash", "COMP_WORDS": "kdcli e", "COMP_CWORD": "1"}.items():
        world.monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        run([])
    assert end.value.code == 0
    assert set(world.capsys.readouterr().out.split()) == {name for name in COMMANDS if name.startswith("e")}


# Results and exit codes


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[tuple[Path, Outcome]]:
    """A folder in which a distill with chains and a gate has been run, and what it gave."""
    folder = tmp_path_factory.mktemp("finished")
    text = 'method = "kd"\n[task]\nname = "own"\ndata = "rows.csv"\ntext = "text"\n[teacher]\nmodel = "teacher"\n'
    text += '[student]\nform = "depth"\nlayers = 1\n[overparam]\nlength = 1\n[train]\nmax_steps = 2\n'
    (folder / "recipe.toml").write_text(text)
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    shutil.copytree(model_folder("teacher"), folder / "teacher")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setenv("KDCLI_CACHE", str(folder / "cache"))
        code = run(["distill", "recipe.toml", "--json", "--fail-under", "1.5"])
    yield folder, Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def after(finished: tuple[Path, Outcome], world: World) -> World:
    """The finished run's folder as the working folder; look, do not touch."""
    world.folder = finished[0]
    world.monkeypatch.chdir(world.folder)
    return world


def test_distill_gives_one_document_and_talks_on_stderr(finished: tuple[Path, Outcome]):
    folder, outcome = finished
    record = json.loads((folder / "runs" / "recipe" / "run.json").read_text())
    assert {key: outcome.json[key] for key in record} == record
    assert outcome.json["status"] == "done"
    assert outcome.json["student"]["parameters"] == count_parameters(tiny("bert", layers=1))
    assert "step" in outcome.err and "Traceback" not in outcome.err


def test_no_library_draws_a_bar_of_its_own(finished: tuple[Path, Outcome]):
    assert "it/s" not in finished[1].err and "shards" not in finished[1].err and "\r" not in finished[1].err


def test_a_gate_that_is_not_met_is_exit_code_1_with_the_whole_result(finished: tuple[Path, Outcome]):
    assert finished[1].code == 1
    assert finished[1].err.splitlines()[-1].startswith("gate not met: accuracy ")


def test_the_end_of_distill_names_places_gates_and_what_comes_next(finished: tuple[Path, Outcome]):
    folder, outcome = finished
    run = folder / "runs" / "recipe"
    assert outcome.json["schema_version"] == 1
    assert outcome.json["paths"] == {"run": str(run), "student": str(run / "student"), "onnx": None}
    score = outcome.json["student"]["score"]
    assert outcome.json["gates"] == [{"name": "score", "value": score, "limit": 1.5, "passed": False}]
    for line in (
        "student: runs/recipe/student",
        "scores: runs/recipe/run.json",
        "next: kdcli eval runs/recipe",
        "next: kdcli export runs/recipe",
    ):
        assert line in outcome.err.splitlines()


def test_what_comes_next_can_be_run(after: World, finished: tuple[Path, Outcome]):
    commands = [line.removeprefix("next: kdcli ") for line in finished[1].err.splitlines() if "next: " in line]
    assert after.call(*shlex.split(commands[0])).code == 0
    exported = after.call(*shlex.split(commands[1]), "--out", "served", "--no-latency", "--json")
    shutil.rmtree(after.folder / "served")
    assert exported.code == 0, exported.err
    [gate] = exported.json["gates"]
    assert gate["name"] == "parity" and gate["passed"] and 0 <= gate["value"] <= gate["limit"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_result_that_cannot_be_printed_is_where_the_message_says(after: World, finished: tuple[Path, Outcome]):
    with Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        assert run(["distill", "recipe.toml", "--resume", "--json"]) == 3
    err = after.capsys.readouterr().err
    assert "No space left on device" in err and "hint: it is in runs/recipe/run.json" in err
    assert (
        json.loads((after.folder / "runs" / "recipe" / "run.json").read_text())["hashes"] == finished[1].json["hashes"]
    )


def test_retention_is_of_the_runs_own_teacher(after: World, finished: tuple[Path, Outcome]):
    kept = finished[1].json["retention"]
    for limit, code in ((kept - 0.01, 0), (kept + 0.01, 1)):
        scored = after.call("eval", "--fail-under-retention", limit, "--json")
        again = after.call("distill", "recipe.toml", "--resume", "--fail-under-retention", limit, "--json")
        for outcome in (scored, again):
            assert outcome.code == code, outcome.err
            assert outcome.json["gates"] == [
                {"name": "retention", "value": pytest.approx(kept), "limit": limit, "passed": code == 0}
            ]
            assert (f"gate not met: retention {kept:.6g} is under {limit:.6g}" in outcome.err) == (code == 1)


def test_the_latency_gate_of_export(world: World):
    world.model()
    grid = ["--batch-sizes", "1", "--sequence-lengths", "8", "--runs", "1", "--threads", "1"]
    outcome = world.call("export", "teacher", "--out", "served", *grid, "--max-latency-ms", "1e-9")
    assert outcome.code == 1 and (world.folder / "served").is_dir()
    assert "gate not met: p50 in ms " in outcome.err and "is above 1e-09" in outcome.err
    # One run says nothing about how far runs lie apart: neither the gate nor the table takes it for granted.
    words = " ".join(outcome.err.split())
    assert "--max-latency-ms is checked against an unsteady time" in words
    assert "WARNING: 2 of 2 latencies are unsteady" in words and "had 1 run." in words
    assert outcome.out.count("x*") == 2 and "*: unsteady" in outcome.out


def test_gates_of_a_recipe(world: World):
    world.model()
    outcome = world.call("distill", world.recipe(evaluate={"fail_under": 0.0, "fail_under_retention": 9.0}), "--json")
    assert outcome.code == 1
    assert [(gate["name"], gate["passed"]) for gate in outcome.json["gates"]] == [("score", True), ("retention", False)]


def test_eval_scores_the_newest_run_as_distill_did(after: World, finished: tuple[Path, Outcome]):
    outcome = after.call("eval", "--json")
    assert outcome.code == 0
    assert outcome.json["metrics"] == finished[1].json["student"]["metrics"]
    assert outcome.json["score"] == finished[1].json["student"]["score"]
    by_name = after.call("eval", "runs/recipe", "--task", "own", "--json")
    assert by_name.json["metrics"] == outcome.json["metrics"]


def test_eval_shows_each_class_as_the_run_and_its_card_have_it(after: World, finished: tuple[Path, Outcome]):
    beside = after.call("eval", "--teacher", "teacher", "--json").json
    [classes] = beside["by_class"].values()
    assert set(classes) == {"no", "yes"} and sum(one["support"] for one in classes.values()) > 0
    for side, key in (("student", "by_class"), ("teacher", "teacher_by_class")):
        assert beside[key] == finished[1].json[side]["by_class"]
    card = (after.folder / "runs" / "recipe" / "student" / "README.md").read_text(encoding="utf-8")
    table = after.call("eval", "--by-class").out
    for label, one in classes.items():
        [line] = [line for line in table.splitlines() if line.split()[:1] == [label]]
        cells = [f"{100 * one[score]:.2f}" for score in ("precision", "recall", "f1")]
        assert line.split() == [label, str(one["support"]), *cells]
        [row] = [line for line in card.splitlines() if line.startswith(f"| {label} |")]
        assert row.split(" | ")[3::2] == [*cells[:2], f"{cells[2]} |"]
    assert "precision" not in after.call("eval").out


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        (["--fail-under", "0"], 0),
        (["--fail-under", "1.01"], 1),
        (["--teacher", "teacher", "--fail-under-retention", "0"], 0),
        (["--teacher", "teacher", "--fail-under-retention", "99"], 1),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_gates_of_eval(gate: list[str], code: int, as_json: bool, after: World):
    outcome = after.call("eval", *gate, *(["--json"] if as_json else []))
    assert outcome.code == code
    assert ("gate not met" in outcome.err) == (code == 1)
    if as_json:
        assert 0 <= outcome.json["score"] <= 1
    else:
        assert "accuracy" in outcome.out and "gate" not in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "recipe.toml", "--force", "--dry-run", "--json"],
        ["eval", "teacher", "--data", "rows.csv", "--text", "text", "--json"],
        ["methods", "--json"],
        ["methods", "makd", "--json"],
        ["tasks", "--json"],
        ["tasks", "classification", "--json"],
        ["families", "--json"],
        ["recipes", "list", "--json"],
        ["recipes", "show", "quickstart", "--json"],
        ["recipes", "explain", "--json"],
        ["recipes", "explain", "student", "--json"],
        ["recipes", "schema", "--json"],
        ["env", "--json"],
    ],
    ids=" ".join,
)
def test_stdout_is_one_json_document(arguments: list[str], after: World):
    before = after.listing()
    outcome = after.call(*arguments)
    assert outcome.code == 0 and outcome.json["schema_version"] == 1
    assert after.listing() == before


def test_overparam_and_contract_give_one_json_document_each(world: World):
    world.model()
    wide = world.call("overparam", "teacher", "--out", "wide", "--json")
    back = world.call("contract", "wide", "--out", "back", "--json")
    assert (wide.code, back.code) == (0, 0)
    assert wide.json["parameters_before"] == back.json["parameters_after"]
    assert "wide" in wide.err and "back" in back.err


def test_an_uncontracted_model_scores_as_the_plain_one_does(world: World):
    world.model()
    world.model("chains", "chains")
    arguments = ["--data", "rows.csv", "--text", "text", "--json"]
    plain, chains = (world.call("eval", name, *arguments) for name in ("teacher", "chains"))
    assert (plain.code, chains.code) == (0, 0)
    assert plain.json["metrics"] == chains.json["metrics"]


def test_a_run_that_exists_stays_as_it_is(after: World):
    before = after.listing()
    assert after.call("distill", "recipe.toml").code == 2
    assert after.listing() == before


def test_a_finished_run_is_shown_again_by_resume(after: World, finished: tuple[Path, Outcome]):
    before = after.listing()
    outcome = after.call("distill", "recipe.toml", "--resume", "--json")
    assert outcome.code == 0 and {**outcome.json, "gates": finished[1].json["gates"]} == finished[1].json
    gated = after.call("distill", "recipe.toml", "--resume", "--json", "--fail-under", "1.5")
    assert gated.code == 1 and gated.json == finished[1].json and "gate not met: accuracy " in gated.err
    other = after.call("distill", "recipe.toml", "--resume", "--set", "seed=7")
    assert other.code == 2 and "started with another recipe" in other.err
    assert after.listing() == before


def test_what_cannot_be_replaced_stays(after: World):
    before = after.listing()
    for wrong in ("teacher.model=absent", "task.label=absent", "export={onnx=true, sequence_lengths=[1024]}"):
        assert after.call("distill", "recipe.toml", "--force", "--set", wrong).code == 2
        assert after.listing() == before


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_exports_goes_on_with_that(world: World):
    world.model()
    recipe = world.recipe(export={"onnx": True, "batch_sizes": [1], "sequence_lengths": [8], "runs": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Nothing gets the chance to say that the run has failed, as with a kill.
        patch.setattr("kdcli.runs.Run.mark", lambda run, status: None)
        patch.setattr("kdcli.export.export.export_onnx", _interrupt)
        run_distill(load_recipe(Path(recipe)), recipe_path=Path(recipe), console=Console(quiet=True))
    folder = world.folder / "runs" / "recipe"
    assert (folder / "student").is_dir() and not (folder / "onnx").exists()
    outcome = world.call("distill", recipe, "--resume", "--json")
    assert outcome.code == 0 and outcome.json["status"] == "done"
    assert (folder / "onnx" / "model.onnx").is_file() and outcome.json["export"]["parity"]["max_abs_difference"] < 1e-4
    assert outcome.json["paths"]["onnx"] == str(folder / "onnx")
    [gate] = outcome.json["gates"]
    assert gate["name"] == "parity" and gate["passed"]
    lines = outcome.err.splitlines()
    assert "onnx: runs/recipe/onnx" in lines and "next: kdcli eval runs/recipe" in lines
    assert not [line for line in lines if "kdcli export" in line] and "1 run each" in outcome.err


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_run_goes_on_after_its_last_checkpoint_wherever_it_is_now(world: World):
    world.model()
    recipe = world.recipe(train={"max_steps": 4, "eval_every": 2, "keep_checkpoints": True})
    first = world.call("distill", recipe, "--json")
    assert first.code == 0, first.err
    kept = world.folder / "runs" / "recipe"
    for finished_ in [*kept.glob("checkpoints/*/final"), kept / "student"]:
        shutil.rmtree(finished_)
    record = json.loads((kept / "run.json").read_text())
    del record["checksum"]
    (kept / "run.json").write_text(json.dumps({**record, "status": "running"}))
    moved = world.folder / "elsewhere" / "recipe"
    shutil.copytree(kept, moved)
    shutil.rmtree(kept)
    world.monkeypatch.chdir(moved)
    again = world.call("distill", "../../recipe.toml", "--resume", "--output", "..", "--json")
    assert again.code == 0, again.err
    assert again.json["hashes"]["student"] == first.json["hashes"]["student"]


def test_training_that_diverges_is_told_and_leaves_no_student(world: World):
    world.model()
    outcome = world.call("distill", world.recipe(train={"max_steps": 4, "learning_rate": 1e6}))
    assert outcome.code == 3
    assert "training has diverged" in outcome.err and "lower the learning rate" in outcome.err
    run_ = world.folder / "runs" / "recipe"
    assert json.loads((run_ / "run.json").read_text())["status"] == "failed" and not (run_ / "student").exists()


def test_a_run_goes_only_when_the_next_one_has_a_student(world: World):
    world.model()
    recipe = world.recipe()
    first = world.call("distill", recipe, "--json")
    assert first.code == 0, first.err
    runs, waiting = world.folder / "runs", world.folder / "runs" / ".recipe.replaced"
    for _ in range(2):
        crashed = world.call("distill", recipe, "--force", "--set", "train={max_steps=4, learning_rate=1e6}")
        assert crashed.code == 3 and not (runs / "recipe" / "student").exists()
        assert json.loads((waiting / "run.json").read_text())["hashes"] == first.json["hashes"]
    assert world.call("distill", recipe, "--force").code == 0
    assert (runs / "recipe" / "student").is_dir() and not waiting.exists()


def test_a_model_folder_may_hold_a_run_json_of_another_program(world: World):
    (world.model() / "run.json").write_text('{"status": "queued"}')
    assert world.call("eval", "teacher", "--data", "rows.csv", "--text", "text").code == 0


def test_square_brackets_in_names_are_no_markup(world: World):
    world.model()
    outcome = world.call("overparam", "teacher", "--out", "y [bold]5[/x]", "--length", "1")
    assert outcome.code == 0 and "y [bold]5[/x]" in outcome.err


def test_eval_of_data_scores_as_the_run_does(world: World):
    world.csv("numbers.csv", [(text, str(number / 7)) for number, (text, _) in enumerate(ROWS)])
    world.model("regressor")
    task = {"name": "own", "train": "numbers.csv", "validation": "numbers.csv", "text": "text", "max_length": 6}
    world.recipe("task", task={**task, "metrics": ["pearson", "mse"]})
    assert world.call("distill", "recipe.toml").code == 0
    own = world.call("eval", "--json")
    data = world.call("eval", "--data", "numbers.csv", "--text", "text", "--json")
    assert data.json["metrics"]["rows"] == own.json["metrics"]["validation"]
    shown = world.call("eval")
    error = own.json["metrics"]["validation"]["mse"]
    assert f"{error:.3f}" in shown.out and f"{100 * error:.2f}" not in shown.out


def test_texts_are_cut_to_what_a_model_can_read(world: World):
    world.model()
    world.csv("long.csv", [(" ".join(["film"] * 400), label) for _, label in ROWS])
    outcome = world.call("eval", "teacher", "--data", "long.csv", "--text", "text", "--json")
    assert outcome.code == 0, outcome.err


def test_a_part_of_the_test_set_can_be_scored(world: World):
    world.model()
    task = {"name": "own", "train": "rows.csv", "test": "rows.csv", "text": "text"}
    world.recipe("task", task=task)
    assert world.call("distill", "recipe.toml").code == 0
    assert "4 examples" in world.call("eval", "--max-samples", "4").out


def test_no_result_holds_anything_that_json_does_not_have():
    text = to_json_text({"a": [float("nan"), 1.0], "b": {"c": float("inf")}})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"a": [None, 1.0], "b": {"c": None}}


# The plan


def test_dry_run_counts_and_writes_nothing(world: World, own_cache: Path):
    world.model()
    recipe = world.recipe(overparam={"length": 1}, train={"max_steps": 7})
    before = world.listing()
    outcome = world.call("distill", recipe, "--dry-run", "--json")
    teacher, student = (count_parameters(tiny("bert", layers=layers)) for layers in (2, 1))
    assert outcome.code == 0, outcome.err
    assert outcome.json["teacher"]["parameters"] == teacher
    assert outcome.json["student"]["parameters"] == student
    assert outcome.json["overparam"]["matrices"] == outcome.json["overparam"]["matched"] == 6
    assert [stage["steps"] for stage in outcome.json["stages"]] == [7]
    assert outcome.json["task"]["sizes"] == {"train": 36, "selection": 4, "validation": 4}
    table = world.call("distill", recipe, "--dry-run").out
    assert f"{teacher:,} parameters" in table and f"{student:,} parameters" in table
    assert world.listing() == before and list(own_cache.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "told"),
    [("minilm", "the attention of MPNet adds terms of positions"), ("minilmv2", "24 relation heads")],
)
def test_notes_of_the_method_stand_below_it(method: str, told: str, world: World):
    scratch = {"family": "mpnet", "layers": 2, "hidden_size": 24, "heads": 2, "intermediate_size": 32}
    recipe = world.recipe("teacher", method=method, teacher={"scratch": scratch})
    plan = world.call("distill", recipe, "--dry-run", "--json").json
    [note] = plan["method"]["notes"]
    assert told in note and note not in plan["task"]["notes"]
    rows = [line.split("│")[1:3] for line in world.call("distill", recipe, "--dry-run").out.splitlines() if "│" in line]
    place = [name.strip() for name, _ in rows].index("method")
    assert rows[place + 1][0].strip() == "" and f"note: {told}" in rows[place + 1][1]
    assert world.call("distill", recipe).err.count(f"{method}: {note}") == 1


def test_a_budget_whose_largest_rank_has_no_factors_runs_with_chains(world: World):
    # 0.4 of the block weights allow rank 7 on these widths, which no chain can be made of; 6 is 3 x 2.
    world.model()
    recipe = world.recipe("student", method="makd", student={"budget": 0.4, "ranks": "even"}, overparam={"length": 1})
    plan = world.call("distill", recipe, "--dry-run", "--json")
    run = world.call("distill", recipe, "--json")
    assert plan.code == run.code == 0, plan.err + run.err
    assert any("rank 6: " in note for note in plan.json["student"]["notes"])
    assert plan.json["overparam"]["matched"] == plan.json["overparam"]["matrices"] == 24
    assert run.json["overparam"]["skipped"] == []
    assert run.json["student"]["parameters"] == plan.json["student"]["parameters"]


def test_paths_in_a_recipe_start_at_the_recipe(world: World):
    (world.folder / "project").mkdir()
    for name in ("teacher", "pupil"):
        world.model("teacher", f"project/{name}")
    shutil.move(world.folder / "rows.csv", world.folder / "project" / "rows.csv")
    shutil.move(world.recipe("student", student={"form": "checkpoint", "model": "pupil"}), "project/recipe.toml")
    assert sorted(path.name for path in world.folder.iterdir()) == ["project"]
    outcome = world.call("distill", "project/recipe.toml", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    # The output folder, too: here a file is in its place.
    outcome = world.call("distill", "project/recipe.toml", "--set", "output=rows.csv")
    assert outcome.code == 2 and "project/rows.csv" in outcome.err


# The methods


def test_methods_lists_every_method_in_a_line_of_at_most_100_columns(world: World):
    rows = world.call("methods", "--json").json["methods"]
    assert [row["name"] for row in rows] == registry.names()
    assert all(row["paper"] for row in rows)
    lines = [line.rstrip() for line in world.call("methods").out.splitlines()]
    assert max(map(len, lines)) <= 100
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.startswith(row["name"]) and row["title"] in line and re.search(r"[A-Z]\w+ et al\. 20\d\d$", line)


@pytest.mark.parametrize("name", registry.names())
def test_methods_explains_each_with_the_defaults_that_it_has(name: str, world: World):
    outcome = world.call("methods", name, "--json")
    method = registry.get(name)
    assert outcome.code == 0 and outcome.json["options"] == json.loads(method.options().model_dump_json())
    words = world.call("methods", name).out
    if method.text_train:
        assert outcome.json["train_on_text"] == {**method.train, **method.text_train}
        assert " ".join(words.split()).count("where tokens are predicted") >= len(method.text_train)
    for option, field in method.options.model_fields.items():
        assert f"method.{option}" in words and " ".join(field.description.split()[:4]) in words
    assert method.title in " ".join(words.split())


def test_methods_kd_tells_temperature_and_formula(world: World):
    outcome = world.call("methods", "kd")
    assert "method.temperature" in outcome.out and "KL" in outcome.out and "1503.02531" in outcome.out


# The types of tasks and the families


def test_tasks_lists_every_type_and_explains_each_with_its_methods(world: World):
    rows = world.call("tasks", "--json").json["tasks"]
    assert {"classification", "regression", "text"} <= {row["name"] for row in rows}
    lines = [line for line in world.call("tasks").out.splitlines()[1:] if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == [row["name"] for row in rows]
    for row in rows:
        document = world.call("tasks", row["name"], "--json").json
        assert {key: document[key] for key in row} == row
        shown = world.call("methods", "--json").json["methods"]
        assert document["methods"] == [method["name"] for method in shown if row["name"] in method["tasks"]]
        words = " ".join(world.call("tasks", row["name"]).out.split())
        assert document["model"] in words and all(field["description"] in words for field in document["fields"])
    outcome = world.call("tasks", "clasification")
    assert outcome.code == 2 and "classification" in outcome.err


def test_families_lists_every_family(world: World):
    rows = world.call("families", "--json").json["families"]
    assert [row["name"] for row in rows] == sorted(family.name for family in FAMILIES.values())
    lines = [line.rstrip() for line in world.call("families").out.splitlines()]
    assert max(map(len, lines)) <= 100
    for row, line in zip(rows, lines[1:], strict=True):
        assert row["title"] in line and row["reads"] in line and line.endswith("; ".join(row["limits"]))
    told = {row["name"]: row for row in rows}
    assert told["deberta-v2"]["attention"] == "disentangled" and told["albert"]["blocks"] == "shared"
    for name, row in told.items():
        document = world.call("families", name, "--json").json
        assert {key: document[key] for key in row} == row
        assert len(document["limits_in_full"]) == len(row["limits"])
        words = " ".join(world.call("families", name).out.split())
        for said in (*document["limits_in_full"], *row["matrices"], *row["matrices"].values(), row["attention"]):
            assert said in words
        assert ("module in a block" in words) == bool(row["matrices"])
        assert all(re.fullmatch(r"[A-Z].{40,}\.", sentence) for sentence in document["limits_in_full"])
    outcome = world.call("families", "modern-bert")
    assert outcome.code == 2 and "did you mean modernbert?" in outcome.err
    assert told["modernbert"]["feed_forward"] == "gated" and told["bert"]["feed_forward"] == "plain"
    assert told["llama"]["direction"] == "causal" and told["bert"]["direction"] == "both ways"


# How it ends when it is cut short


def test_debug_shows_the_traceback(world: World):
    with pytest.raises(InputError, match="no recipe at nowhere"):
        run(["distill", "nowhere.toml", "--debug"])
    world.monkeypatch.setenv("KDCLI_DEBUG", "1")
    with pytest.raises(InputError, match="no recipe at nowhere"):
        run(["distill", "nowhere.toml"])
    result = python("-m", "kdcli", "distill", "nowhere.toml", env={**os.environ, "KDCLI_DEBUG": "1"})
    assert result.returncode == 1 and "Traceback" in result.stderr and "InputError" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["distill", "--help"], ["--version"]], ids=" ".join)
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "kdcli", *arguments]
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


class _Gone(io.TextIOWrapper):
    """A stdout whose reader has gone."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        super().__init__(os.fdopen(writer, "wb"), encoding="utf-8")


@pytest.mark.parametrize("form", [["--json"], []])
@pytest.mark.parametrize(("limit", "code"), [("0", 0), ("1.01", 1)])
def test_a_gate_counts_even_if_the_result_is_not_read(form: list[str], limit: str, code: int, after: World):
    stdout = _Gone()
    with contextlib.redirect_stdout(stdout):
        assert run(["eval", "--fail-under", limit, *form]) == code
    stdout.close()
    assert "error" not in after.capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals of this kind are of POSIX")
def test_an_interrupt_is_exit_code_130_and_marks_the_run(world: World):
    world.model()
    recipe = world.recipe(train={"max_steps": 3000, "eval_every": 3000})
    record = world.folder / "runs" / "recipe" / "run.json"

    ended = threading.Event()

    def interrupt() -> None:
        pause = 0.02
        while not ended.wait(pause):
            if any((record.parent / "log").glob("*/events*")):
                # Again where the interpreter loses one, as it does inside a finaliser.
                os.kill(os.getpid(), signal.SIGINT)
                pause = 2.0

    thread = threading.Thread(target=interrupt)
    # Whoever runs the tests in the background may have switched interrupts off.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread.start()
    try:
        outcome = world.call("distill", recipe)
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert outcome.code == 130
    assert "error: interrupted" in outcome.err and "--resume" in outcome.err and "Traceback" not in outcome.err
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert world.call("eval").code == 2


def test_the_recipe_that_a_run_keeps_can_be_run_again(after: World, finished: tuple[Path, Outcome], tmp_path: Path):
    kept = tomllib.loads((after.folder / "runs" / "recipe" / "recipe.toml").read_text())
    assert kept["method"] == {"name": RECIPE["method"]} and kept["overparam"]["length"] == 1
    assert set(NAMED["label2id"]) == set(finished[1].json["task"]["labels"])
    again = after.call("distill", "runs/recipe/recipe.toml", "--output", tmp_path, "--json")
    assert again.code == 0, again.err
    assert again.json["name"] == "recipe"
    assert again.json["hashes"]["student"] == finished[1].json["hashes"]["student"]


def test_the_classes_of_a_model_can_be_named(world: World):
    world.model("other-classes")
    arguments = ["eval", "teacher", "--task", "reviews", "--max-samples", "40", "--json"]
    refused = world.call(*arguments)
    assert refused.code == 2 and "--labels: the classes of teacher (ham, spam)" in refused.err
    assert "--labels A,B" in refused.err and "teacher.labels" not in refused.err
    scores = [world.call(*arguments, "--labels", names) for names in ("negative,positive", "positive,negative")]
    assert [outcome.code for outcome in scores] == [0, 0]
    assert scores[0].json["score"] + scores[1].json["score"] == pytest.approx(1.0)
    assert "3 names, but" in world.call(*arguments, "--labels", "a,b,c").err


def test_errors_about_data_name_the_options(world: World):
    world.model()
    assert "--text: " in world.call("eval", "teacher", "--data", "rows.csv", "--text", "words").err
    assert "--label: " in world.call("eval", "teacher", "--data", "rows.csv", "--text", "text", "--label", "x").err
    assert "start at the working folder" in world.call("eval", "teacher", "--data", "no.csv", "--text", "text").err
