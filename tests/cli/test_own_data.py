"""Own data through the commands: what labels mean, how files are read, what a user is told."""

import json
from pathlib import Path

import pytest
from conftest import ROWS, World

SCORE = ["--data", "held.csv", "--text", "text", "--json"]
NUMBERS = {"no": "0", "yes": "1"}


@pytest.fixture
def held(world: World) -> World:
    """A model that answers no or yes, and rows to score it on with integers as labels."""
    world.model()
    world.csv("held.csv", [(text, NUMBERS[label]) for text, label in ROWS[:11]])
    world.csv("named.csv", ROWS[:11])
    return world


def test_eval_and_distill_refuse_integers_for_named_classes_alike(held: World):
    scored = held.call("eval", "teacher", *SCORE)
    assert scored.code == 2 and "integer labels (0, 1)" in scored.err and "--labels no,yes" in scored.err
    for arguments in (["--dry-run"], []):
        trained = held.call("distill", held.recipe(task={"data": "held.csv"}), *arguments)
        assert trained.code == 2 and "task.labels = [...]" in trained.err


def test_names_for_integers_give_the_score_of_the_names(held: World):
    named = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--json")
    assert named.code == 0, named.err
    for labels in ("no,yes", "no, yes", ' "no" ,yes '):
        counted = held.call("eval", "teacher", *SCORE, "--labels", labels)
        assert counted.code == 0, counted.err
        assert counted.json["metrics"] == named.json["metrics"]
    assert named.json["rows"] == {"rows": 11}
    assert held.call("eval", "teacher", *SCORE, "--labels", "no,,yes").code == 2


def test_the_models_own_names_say_what_the_integers_of_a_file_mean(held: World):
    by_name = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--json")
    held.csv("turned.csv", [(text, {"yes": "0", "no": "1"}[label]) for text, label in ROWS[:11]])
    turned = ["eval", "teacher", "--data", "turned.csv", "--text", "text", "--json"]
    # What the hint says, with the names in the order of these integers.
    assert "the order of the file's integers, from 0 on: --labels no,yes if 0 is 'no'" in held.call(*turned).err
    for labels in ("yes,no", "Yes,NO"):
        scored = held.call(*turned, "--labels", labels)
        assert scored.code == 0, scored.err
        assert scored.json["metrics"] == by_name.json["metrics"]
    wrong = held.call(*turned, "--labels", "no,yes").json["score"]
    assert wrong == pytest.approx(1 - by_name.json["score"])


def test_the_models_own_names_in_another_order_do_not_rename_its_outputs(held: World):
    for arguments in (["--data", "named.csv", "--text", "text"], ["--task", "reviews", "--max-samples", "40"]):
        refused = held.call("eval", "teacher", *arguments, "--labels", "yes,no")
        assert refused.code == 2 and "--labels: the model names its classes already: no, yes" in refused.err
    same = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--labels", "no,yes")
    assert same.code == 0, same.err
    for arguments in (["--dry-run"], []):
        named = held.call("distill", held.recipe(teacher={"labels": ["Yes", "no"]}), *arguments)
        assert named.code == 2 and "teacher.labels: the model names its classes already: no, yes" in named.err


def test_other_names_are_those_of_the_models_outputs_in_its_order(held: World):
    by_name = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--json")
    held.csv("words.csv", [(text, {"yes": "good", "no": "bad"}[label]) for text, label in ROWS[:11]])
    for name in ("words.csv", "held.csv"):
        renamed = held.call("eval", "teacher", "--data", name, "--text", "text", "--json", "--labels", "bad,good")
        assert renamed.code == 0, renamed.err
        assert renamed.json["metrics"] == by_name.json["metrics"]
    refused = held.call("eval", "teacher", "--data", "words.csv", "--text", "text", "--labels", "bad,bad")
    assert refused.code == 2 and "classes 0 and 1 are both named 'bad'" in refused.err


NOTE = "does not name its classes: taken in the order no, yes; "


def test_it_is_told_that_a_trained_head_without_names_takes_those_of_the_data(held: World):
    held.model("unnamed", "un")
    note = f"un {NOTE}teacher.labels says otherwise"
    recipe = held.recipe(teacher={"model": "un"})
    assert note in held.call("distill", recipe, "--dry-run", "--json").json["task"]["notes"]
    run = held.call("distill", recipe)
    assert run.code == 0 and f"note: {note}" in run.err, run.err
    labelled = held.recipe(teacher={"model": "un", "labels": ["yes", "no"]}, name="labelled")
    assert not held.call("distill", labelled, "--dry-run", "--json").json["task"]["notes"][1:]
    student = held.recipe("student", student={"form": "checkpoint", "model": "un"}, name="other")
    note = f"un {NOTE}id2label in its config.json says otherwise"
    assert held.call("distill", student, "--dry-run", "--json").json["student"]["notes"][1].endswith(note)
    assert note in held.call("distill", student).err


def test_a_model_without_names_is_scored_on_what_distill_takes_it_for(held: World):
    held.model("unnamed", "un")
    arguments = ["eval", "un", "--data", "named.csv", "--text", "text", "--json"]
    scored = held.call(*arguments)
    assert scored.code == 0 and f"note: un {NOTE}--labels says otherwise" in scored.err, scored.err
    named = held.call(*arguments, "--labels", "no,yes")
    assert named.json["metrics"] == scored.json["metrics"] and "note:" not in named.err
    assert "note:" not in held.call("eval", "un", *SCORE).err
    assert f"note: un {NOTE}id2label" in held.call("eval", "teacher", *arguments[2:], "--teacher", "un").err
    held.csv("three.csv", [*ROWS[:11], ("so so", "maybe")])
    three = ["eval", "un", "--data", "three.csv", "--text", "text"]
    refused = held.call(*three)
    assert refused.code == 2 and "3 classes (maybe, no, yes)" in refused.err and "--labels NAME,NAME" in refused.err


def test_classes_that_look_alike_are_named_where_a_trained_teacher_has_others(held: World):
    held.csv("rows.csv", [*ROWS, *[("so so", "Yes")] * 3])
    refused = held.call("distill", held.recipe(), "--dry-run")
    assert refused.code == 2 and "'Yes' and 'yes' differ in case or spacing only" in refused.err


def test_a_label_spelt_otherwise_in_another_file_is_asked_about(held: World):
    held.csv("held.csv", [("so so", "Yes"), ("well", "no")])
    task = {"name": "own", "train": "rows.csv", "validation": "held.csv", "text": "text"}
    refused = held.call("distill", held.recipe("task", task=task), "--dry-run")
    assert refused.code == 2 and "'Yes', which the training data does not have" in refused.err
    assert "did you mean 'yes'?" in refused.err


def test_two_classes_of_one_name_are_told(held: World):
    change(held.folder / "teacher", id2label={"0": "no", "1": "no"}, label2id={"no": 1})
    for arguments in (["distill", held.recipe(), "--dry-run"], ["eval", "teacher", "--task", "reviews"]):
        refused = held.call(*arguments)
        assert refused.code == 2 and "classes 0 and 1 are both named 'no'" in refused.err
    scored = held.call("eval", "teacher", "--data", "named.csv", "--text", "text")
    assert scored.code == 2 and "classes 0 and 1 are both named 'no'" in scored.err


def test_names_of_classes_may_be_in_label2id_alone(held: World):
    by_name = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--json")
    change(held.folder / "teacher", id2label=None, label2id={"yes": 1, "no": 0})
    scored = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--json")
    assert scored.code == 0, scored.err
    assert scored.json["metrics"] == by_name.json["metrics"]
    assert "note:" not in scored.err and "have names (no, yes)" in held.call("eval", "teacher", *SCORE).err


def change(folder: Path, **values: object) -> None:
    """Change fields of a model's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_the_plan_names_classes_without_training_rows(world: World):
    task = {"data": "rows.csv", "labels": ["no", "maybe", "yes"]}
    recipe = world.recipe("teacher", task=task, teacher={"scratch": {"layers": 2, "hidden_size": 16, "heads": 2}})
    notes = world.call("distill", recipe, "--dry-run", "--json").json["task"]["notes"]
    assert "no training rows of 1 class: maybe" in notes


def test_a_run_on_named_integers_scores_integers_as_it_was_trained(held: World):
    rows = held.csv("rows.csv", [(text, NUMBERS[label]) for text, label in ROWS])
    recipe = held.recipe(task={"data": rows, "labels": ["no", "yes"]})
    run = held.call("distill", recipe, "--json")
    assert run.code == 0, run.err
    assert run.json["task"]["labels"] == ["no", "yes"]
    by_number, by_name = (held.call("eval", "--data", name, "--json") for name in ("held.csv", "named.csv"))
    assert by_number.code == by_name.code == 0, by_number.err
    assert by_number.json["metrics"] == by_name.json["metrics"]


def test_data_is_scored_with_the_settings_of_its_run(world: World):
    world.model()
    rows = "".join(f"{text}, übel~{label}\n" for text, label in ROWS)
    world.write("rows.csv", ("message~team\n" + rows).encode("latin-1"))
    task = {"data": "rows.csv", "text": "message", "label": "team", "delimiter": "~", "encoding": "latin-1"}
    run = world.call("distill", world.recipe(task=task))
    assert run.code == 0, run.err
    scored = world.call("eval", "--data", "rows.csv", "--json")
    assert scored.code == 0 and scored.json["rows"] == {"rows": 40}, scored.err
    # A model outside a run knows nothing of it.
    plain = ["eval", "teacher", "--data", "rows.csv", "--text", "message", "--label", "team"]
    assert "rows.csv:2 is not readable as CSV" in (told := world.call(*plain).err) and "--encoding latin-1" in told
    assert world.call(*plain, "--encoding", "latin-1").code == 2
    assert world.call(*plain, "--encoding", "latin-1", "--delimiter", "~").code == 0
    assert world.call("eval", "teacher", "--task", "reviews", "--delimiter", "~").code == 2
    for option, value in (("--delimiter", "ab"), ("--encoding", "klingon")):
        refused = world.call(*plain, option, value)
        assert refused.code == 2 and f"error: {option}: " in refused.err


def test_a_part_of_own_data_and_of_its_texts_can_be_scored(held: World):
    held.csv("held.csv", [("word " * 100 + text, label) for text, label in ROWS])
    arguments = ["eval", "teacher", *SCORE]
    assert held.call(*arguments, "--max-samples", "12").json["rows"] == {"rows": 12}
    assert held.call(*arguments, "--max-length", "16").code == 0
    refused = held.call(*arguments, "--max-length", "4096")
    assert refused.code == 2 and "--max-length: 4096 tokens" in refused.err and "use at most 128" in refused.err


def test_truth_values_of_two_kinds_of_files_are_the_same_classes(world: World):
    world.model("unnamed")
    rows = [json.dumps({"text": text, "label": label == "yes"}) for text, label in ROWS]
    world.write("train.jsonl", "\n".join(rows))
    world.csv("held.csv", [(text, str(label == "yes")) for text, label in ROWS[:11]])
    task = {"name": "own", "train": "train.jsonl", "validation": "held.csv", "text": "text"}
    run = world.call("distill", world.recipe("task", task=task), "--json")
    assert run.code == 0, run.err
    assert run.json["task"]["labels"] == ["false", "true"]
    assert world.call("eval", "--data", "held.csv").code == 0


def test_the_plan_shows_rare_classes_and_what_is_odd_and_so_does_the_run(world: World):
    rows = [*ROWS, *((text, f" {label}") for text, label in ROWS[:3]), ("so so", "Yes")]
    world.csv("rows.csv", rows)
    recipe = world.recipe("teacher", teacher={"scratch": {"layers": 2, "hidden_size": 16, "heads": 2}})
    plan = world.call("distill", recipe, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    task = plan.json["task"]
    assert task["classes"]["number"] == 3 and next(iter(task["classes"]["rarest"])) == "Yes"
    assert sum(task["classes"]["rarest"].values()) == task["sizes"]["train"]
    for told in (*task["notes"], "classes", "fewest training rows"):
        assert told.split()[0] in world.call("distill", recipe, "--dry-run").out
    assert any("3 labels have white space" in note for note in task["notes"])
    assert any("'Yes' and 'yes'" in note and "are they one?" in note for note in task["notes"])
    assert any("4 rows only" in note for note in task["notes"])


def test_a_score_says_how_many_rows_it_stands_on(world: World):
    world.model()
    held, test = world.csv("held.csv", ROWS[:12]), world.csv("test.csv", ROWS[:31])
    task = {"name": "own", "train": "rows.csv", "validation": held, "test": test, "text": "text"}
    run = world.call("distill", world.recipe("task", task={**task, "validation_samples": 10}), "--json")
    assert run.code == 0, run.err
    assert run.json["rows"] == {"test": 31} and run.json["task"]["sizes"]["selection"] == 10
    card = (Path(world.folder) / "runs" / "recipe" / "student" / "README.md").read_text()
    assert "accuracy (test, 31 examples)" in card
    assert "accuracy (test, 31 examples)" in world.call("distill", "recipe.toml", "--resume").out
    assert "accuracy (test, 31 examples)" in world.call("eval").out
    assert world.call("eval", "--max-samples", "9", "--json").json["rows"] == {"test": 9}


def test_several_test_sets_are_scored_by_their_names_wherever_the_run_goes(world: World):
    sets = {"near": world.csv("near.csv", ROWS[:12]), "far": world.csv("far.csv", ROWS[:31])}
    task = {"name": "own", "train": "rows.csv", "validation": world.csv("held.csv", ROWS), "test": sets, "text": "text"}
    world.model()
    run = world.call("distill", world.recipe("task", task=task), "--json")
    assert run.code == 0, run.err
    assert run.json["rows"] == {"near": 12, "far": 31} and run.json["task"]["sizes"]["selection"] == 40
    metrics = run.json["student"]["metrics"]
    assert run.json["student"]["score"] == sum(metrics[name]["accuracy"] for name in sets) / 2
    card = (Path(run.json["paths"]["student"]) / "README.md").read_text("utf-8")
    assert "accuracy (near, 12 examples)" in card and "accuracy (mean of 2 sets)" in card
    world.monkeypatch.chdir(world.folder.parent)
    assert world.call("eval", run.json["paths"]["run"], "--json").json["metrics"] == metrics
    again = world.call("distill", Path(run.json["paths"]["run"]) / "recipe.toml", "--dry-run", "--json")
    assert again.json["task"]["sizes"] == {"train": 40, "selection": 40, "near": 12, "far": 31}


def test_the_plan_of_plain_text_tells_what_is_odd_about_the_tasks_that_follow(world: World):
    world.model("headless")
    world.write("my.txt", "\n\n".join(f"{text}, number {number}" for number, (text, _) in enumerate(ROWS)))
    text = {"name": "mine", "type": "text", "data": "my.txt", "max_length": 32}
    tuned = {"task": {"name": "after", "data": "rows.csv", "text": "text"}}
    recipe = world.recipe("task", "method", task=text, method="minilmv2")
    plan = world.call("distill", recipe, "--dry-run", "--json", "--set", f"finetune=[{json_to_toml(tuned)}]")
    assert plan.code == 0, plan.err
    assert plan.json["task"]["notes"] == ["after: the validation set has 4 rows only: a score on it says little"]


def json_to_toml(value: object) -> str:
    """Return nested dictionaries of text as one inline table."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {json_to_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def test_fields_of_the_models_type_of_task_are_set_by_name(held: World):
    short = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--json")
    by_name = held.call(
        "eval", "teacher", "--data", "named.csv", "--set", "text=text", "--set", "label=label", "--json"
    )
    assert by_name.json["metrics"] == short.json["metrics"]
    for change, words in {
        "lable=label": "--set lable: unknown field",
        "labels=3": "--set labels: ",
        "data=x": "data is no field of a type of task",
        "text": "takes FIELD=VALUE",
    }.items():
        refused = held.call("eval", "teacher", "--data", "named.csv", "--text", "text", "--set", change)
        assert refused.code == 2 and words in refused.err, refused.err
    assert "needs --data FILE" in held.call("eval", "teacher", "--task", "sst2", "--set", "label=x").err
