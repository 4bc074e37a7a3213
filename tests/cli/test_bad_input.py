"""Wrong input of every kind: exit code 2, one clear message, no traceback, and nothing left behind."""

import json
import struct
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Cases
from conftest import ROWS, World
from families import tiny, tokenizer
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from kdcli.models.save import save_model
from kdcli.runs import open_run

CASES = Cases()
case = CASES.add


def edit_config(folder: Path, *, file: str = "config.json", **changes: object) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))


# The recipe


@case("recipe.toml:2:", "not valid TOML")
def broken_toml(world: World) -> list[str]:
    return ["distill", world.write("recipe.toml", 'task = "sst2"\nmethod = \n')]


@case("--by-class", "regression has no classes")
def classes_of_a_regression(world: World) -> list[str]:
    world.model("regressor")
    data = world.csv("numbers.csv", [(text, str(number / 8)) for number, (text, _) in enumerate(ROWS)])
    return ["eval", "teacher", "--data", data, "--text", "text", "--by-class"]


@case("recipe.toml:18: train.colour", "unknown field", "known here")
def unknown_key(world: World) -> list[str]:
    return ["distill", world.recipe(train={"max_steps": 1, "colour": "red"})]


@case("recipe.toml", "student.bugdet", "did you mean 'budget'?")
def near_miss_of_a_key(world: World) -> list[str]:
    return ["distill", world.recipe(student={"bugdet": 0.5})]


@case("recipe.toml", "evaluate.batch_size", "must be a whole number above 0", '"many"')
def wrong_type(world: World) -> list[str]:
    return ["distill", world.recipe(evaluate={"batch_size": "many"})]


@case("recipe.toml:1", "seed", "a whole number", '"seven"')
def wrong_type_of_seed(world: World) -> list[str]:
    return [
        "distill",
        world.write("recipe.toml", 'seed = "seven"\ntask = "sst2"\nmethod = "kd"\n[teacher]\nmodel = "x"'),
    ]


@case("no recipe at nowhere.toml")
def missing_recipe(world: World) -> list[str]:
    return ["distill", "nowhere.toml"]


@case("no recipe at recpie.toml", "did you mean recipe.toml?")
def near_miss_of_a_recipe(world: World) -> list[str]:
    world.recipe()
    return ["distill", "recpie.toml"]


@case("is a folder, not a recipe")
def recipe_is_a_folder(world: World) -> list[str]:
    return ["distill", str(world.folder)]


@case("recipe.toml: 3 problems", "task: is missing", "method: is missing", "teacher: is missing")
def empty_recipe(world: World) -> list[str]:
    return ["distill", world.write("recipe.toml", "")]


@case("recipe.toml", "not UTF-8")
def recipe_is_not_text(world: World) -> list[str]:
    return ["distill", world.write("recipe.toml", b"\xff\xfe\x00")]


@case("task: is missing", 'add task = "sst2"')
def missing_task(world: World) -> list[str]:
    return ["distill", world.recipe("task")]


@case("method: is missing", 'add method = "makd"')
def missing_method(world: World) -> list[str]:
    return ["distill", world.recipe("method")]


@case("teacher: is missing", "add a [teacher] table")
def missing_teacher(world: World) -> list[str]:
    return ["distill", world.recipe("teacher")]


@case("give teacher.model", "[teacher.scratch]")
def teacher_table_names_no_model(world: World) -> list[str]:
    return ["distill", world.recipe("teacher", teacher={"cache": True})]


@case("recipe.toml:1", "unknown method 'makdd'", "did you mean 'makd'?")
def unknown_method(world: World) -> list[str]:
    return ["distill", world.recipe(method="makdd")]


@case("method.temprature", "did you mean 'temperature'?")
def unknown_option_of_a_method(world: World) -> list[str]:
    return ["distill", world.recipe(method={"name": "kd", "temprature": 2.0})]


@case("method.alpha", "from 0 to 1", "1.5")
def option_of_a_method_out_of_range(world: World) -> list[str]:
    return ["distill", world.recipe(method={"name": "kd", "alpha": 1.5})]


@case("unknown task 'sst'", "did you mean 'sst2'?", "recipe.toml")
def unknown_task(world: World) -> list[str]:
    return ["distill", world.recipe("task", task="sst")]


@case("data", "train", "give one of")
def two_sources_of_data(world: World) -> list[str]:
    return ["distill", world.recipe(task={"train": "rows.csv"})]


@case("--set", "FIELD=VALUE", "not 'student.budget'")
def set_without_a_value(world: World) -> list[str]:
    return ["distill", world.recipe(), "--set", "student.budget"]


@case("--set trian.epochs=2", "did you mean 'train'?")
def set_of_an_unknown_field(world: World) -> list[str]:
    return ["distill", world.recipe(), "--set", "trian.epochs=2"]


@case("--set train.epochs=many", "train.epochs", "must be a number above 0")
def set_of_a_wrong_type(world: World) -> list[str]:
    return ["distill", world.recipe(), "--set", "train.epochs=many"]


@case("--set train.max_steps.first=1", "not a table")
def set_inside_a_number(world: World) -> list[str]:
    return ["distill", world.recipe(), "--set", "train.max_steps.first=1"]


@case("student.params", "'lots' is no parameter count")
def a_count_that_is_none(world: World) -> list[str]:
    return ["distill", world.recipe(student={"form": "low-rank", "params": "lots"}, task="reviews")]


@case("recipe.toml:2: name", "'a/b' cannot be a name: it has a / in it")
def a_name_with_a_slash(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(name="a/b")]


@case("recipe.toml:4: task.name", "'../../home' cannot be a name: it has a / in it")
def a_task_name_that_is_a_path(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(task={"name": "../../home"})]


@case("--set name=", "'...' cannot be a name: it begins with a dot")
def a_name_of_dots(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(), "--set", "name=..."]


@case("--set name=", "cannot be a name: it has the control character U+001B in it")
def a_name_with_an_escape(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(), "--set", "name=\x1b[31mred"]


@case("cannot be a name: it is too long: at most 100 characters")
def a_name_of_101_characters(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(name="x" * 101)]


@case("'-o' cannot be a name: it begins with a dash", "--set name=")
def a_recipe_whose_own_name_is_no_name_for_a_run(world: World) -> list[str]:
    world.model()
    (world.folder / world.recipe()).rename(world.folder / "-o.toml")
    return ["distill", "./-o.toml"]


@case("is too long: at most 100 characters", "--set name=")
def a_comparison_whose_runs_names_are_too_long(world: World) -> list[str]:
    world.model()
    return ["compare", world.recipe(name="x" * 100)]


@case("--task", "'../own' cannot be a name")
def a_task_on_the_command_line_that_is_a_path(world: World) -> list[str]:
    return ["eval", str(world.model()), "--task", "../own"]


# Options


@case("--force and --resume")
def options_that_exclude_each_other(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(), "--force", "--resume"]


@case("--fail-under", "valid number")
def fail_under_is_no_number(world: World) -> list[str]:
    return ["distill", world.recipe(), "--fail-under", "plenty"]


@case("--sett")
def unknown_option(world: World) -> list[str]:
    return ["distill", world.recipe(), "--sett", "seed=1"]


@case("distil", "No such command")
def unknown_command(world: World) -> list[str]:
    return ["distil", world.recipe()]


@case("Missing argument 'recipe'", "kdcli distill --help")
def no_recipe_given(world: World) -> list[str]:
    return ["distill"]


@case("unknown method 'nonesuch'")
def methods_of_an_unknown_name(world: World) -> list[str]:
    return ["methods", "nonesuch"]


# The data


@case("no file at", "absent.csv", "recipe.toml:5: task.data")
def missing_data_file(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": "absent.csv"})]


@case("empty.csv has no rows")
def empty_data(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.write("empty.csv", "")})]


@case("header.csv has no rows")
def data_with_a_header_only(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.csv("header.csv", [])})]


@case("one class only", "'yes'")
def one_class_only(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.csv("one.csv", [("fine", "yes"), ("good", "yes")])})]


@case("no label column 'label'", "did you mean 'labels'?", "'text', 'labels'")
def label_column_missing(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.csv("rows.csv", ROWS, header="text,labels")})]


@case("no text column 'text'", "'message'", "task.text")
def text_column_missing(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.csv("rows.csv", ROWS, header="message,label")})]


@case("null.jsonl", "row 2 has no 'text'")
def null_text(world: World) -> list[str]:
    rows = [{"text": "good", "label": "yes"}, {"text": None, "label": "no"}]
    return ["distill", world.recipe(task={"data": world.write("null.jsonl", "\n".join(map(json.dumps, rows)))})]


@case("1 row without a label", "row 3")
def a_label_missing(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.csv("holes.csv", [*ROWS[:2], ("so so", "")])})]


@case("lines.jsonl:2", "not valid JSON")
def broken_json_line(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.write("lines.jsonl", '{"text": "a", "label": 1}\n{"text"')})]


@case("rows.parquet", "not readable as Parquet")
def broken_parquet(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.write("rows.parquet", "text,label\ngood,1\n")})]


@case("rows.xlsx is none of", ".csv")
def a_format_that_is_not_read(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.write("rows.xlsx", "x")})]


@case("held.csv", "'maybe'", "training data does not have")
def a_class_that_training_lacks(world: World) -> list[str]:
    held = world.csv("held.csv", [*ROWS[:2], ("perhaps", "maybe")])
    return [
        "distill",
        world.recipe("task", task={"name": "own", "train": "rows.csv", "validation": held, "text": "text"}),
    ]


@case("regression is 'yes', not a number")
def words_as_numbers(world: World) -> list[str]:
    return ["distill", world.recipe(task={"type": "regression"})]


@case("'bleu'", "task.metrics", "accuracy")
def unknown_metric(world: World) -> list[str]:
    return ["distill", world.recipe(task={"metrics": ["bleu"]})]


@case("2 rows cannot be split", "validation_fraction")
def too_few_rows_to_split(world: World) -> list[str]:
    return ["distill", world.recipe(task={"data": world.csv("two.csv", ROWS[:2])})]


@case("too small to be halved", "evaluate.protocol")
def half_dev_with_one_row(world: World) -> list[str]:
    held = world.csv("held.csv", ROWS[:1])
    task = {"name": "own", "train": "rows.csv", "validation": held, "text": "text"}
    return ["distill", world.recipe("task", task=task, evaluate={"protocol": "half-dev"})]


@case("task sst2", "train.parquet", "nowhere", "not found")
def data_folder_points_nowhere(world: World) -> list[str]:
    world.monkeypatch.setenv("KDCLI_DATA_DIR", str(world.folder / "nowhere"))
    return ["distill", world.recipe("task", task="sst2")]


# The student


@case("student.budget", "above 0 and at most 1", "not 0")
def budget_of_nothing(world: World) -> list[str]:
    return ["distill", world.recipe("student", student={"budget": 0})]


@case("student.budget", "above 0 and at most 1", "not 1.5")
def budget_of_more_than_everything(world: World) -> list[str]:
    return ["distill", world.recipe("student", student={"budget": 1.5})]


@case("student", "give one of budget, rank", "budget and rank")
def two_sizes(world: World) -> list[str]:
    return ["distill", world.recipe("student", student={"budget": 0.5, "rank": 4})]


@case("student", 'form = "depth" has no budget')
def a_size_of_another_form(world: World) -> list[str]:
    return ["distill", world.recipe(student={"budget": 0.5})]


@case("student.rank", "rank 22", "break-even", "use a rank up to 21")
def rank_above_break_even(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe("student", student={"form": "low-rank", "rank": 22})]


@case("student.params", "not enough")
def fewer_parameters_than_embeddings(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe("student", student={"form": "low-rank", "params": "1k"})]


@case("student.layers", "recipe.toml:13", "2 blocks", "student of 3", "use 1 to 2")
def more_layers_than_the_teacher(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"layers": 3})]


@case("student.layers", "blocks 0 to 1, not 2")
def a_layer_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"layers": [0, 2]})]


@case("student.layers", "rising order")
def layers_out_of_order(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"layers": [1, 0]})]


@case("student.heads", "not divisible by 5 heads", "use 4 heads")
def heads_that_do_not_divide(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe("student", student={"form": "width", "hidden_size": 16, "heads": 5})]


@case("method.name", "equal widths", "32 and 64", "16 and 32")
def makd_with_a_narrow_student(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe("student", method="makd", student={"form": "width", "hidden_size": 16})]


@case("no model folder at", "absent")
def student_checkpoint_missing(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe("student", student={"form": "checkpoint", "model": "./absent"})]


@case("student.model", "100 tokens", "220", "same tokens")
def student_of_another_vocabulary(world: World) -> list[str]:
    world.model()
    world.model("narrow", "narrow")
    return ["distill", world.recipe("student", student={"form": "checkpoint", "model": "narrow"})]


@case("overparam.layers", "blocks 0 to 0, not 1")
def chains_in_a_layer_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(overparam={"layers": [1]})]


@case("overparam.factors.32", "[5, 6]", "30")
def factors_that_do_not_multiply(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(overparam={"factors": {"32": [5, 6]}})]


@case("recipe.toml:15: train", "batch_size 8 cannot be split over 3", "a multiple of 3")
def a_batch_that_cannot_be_split(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(train={"batch_size": 8, "gradient_accumulation": 3})]


# The teacher


@case("no model folder at", "absent")
def teacher_folder_missing(world: World) -> list[str]:
    return ["distill", world.recipe(teacher={"model": "./absent"})]


@case("'owner/nonesuch'", "hub", "HF_HUB_OFFLINE")
def teacher_is_not_on_the_hub(world: World) -> list[str]:
    return ["distill", world.recipe(teacher={"model": "owner/nonesuch"})]


@case("rows.csv is a file", "a model is a folder")
def teacher_is_a_file(world: World) -> list[str]:
    return ["distill", world.recipe(teacher={"model": "rows.csv"})]


@case("teacher has no config.json")
def teacher_folder_empty(world: World) -> list[str]:
    (world.folder / "teacher").mkdir()
    return ["distill", world.recipe()]


@case("config.json is not valid JSON")
def configuration_broken(world: World) -> list[str]:
    (world.model() / "config.json").write_text("{")
    return ["distill", world.recipe()]


@case("config.json names no model_type")
def configuration_without_a_model_type(world: World) -> list[str]:
    (world.model() / "config.json").write_text('{"hidden_size": 32}')
    return ["distill", world.recipe()]


@case("unknown family 'bloom'", "distilbert", "choose a model of one of these families")
def unknown_family(world: World) -> list[str]:
    edit_config(world.model(), model_type="bloom")
    return ["distill", world.recipe()]


@case("teacher has no tokenizer files", "teacher.tokenizer")
def tokenizer_missing(world: World) -> list[str]:
    folder = world.model()
    for file in folder.glob("*token*"):
        file.unlink()
    return ["distill", world.recipe()]


@case("the tokenizer of", "cannot be loaded")
def tokenizer_broken(world: World) -> list[str]:
    (world.model() / "tokenizer.json").write_text("{}")
    return ["distill", world.recipe()]


@case("task.max_length", "max_length 2 leaves no room for text: 2 tokens of a text are special ones", "use at least 3")
def texts_without_room(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(task={"max_length": 2})]


@case("task.max_length", "max_length 2 leaves no room for text", "use at least 3")
def texts_without_room_in_the_model_that_fills_words(world: World) -> list[str]:
    world.model()
    edit_config(world.model("filler", "filler"), file="tokenizer_config.json", model_max_length=2)
    return ["distill", world.recipe(task={"augment": {"model": "./filler"}})]


def write_pairs(world: World) -> None:
    world.csv("pairs.csv", [(text, f"the film is {label}", label) for text, label in ROWS], "a,b,label")


@case("task.max_length", "max_length 4 leaves no room for text: 3 tokens of a pair are special ones", "use at least 5")
def pairs_without_room(world: World) -> list[str]:
    world.model()
    write_pairs(world)
    return ["distill", world.recipe(task={"data": "pairs.csv", "text": ["a", "b"], "max_length": 4})]


@case("task.max_length", "max_length 256", "130 positions", "use at most 128")
def longer_texts_than_the_teacher_reads(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(task={"max_length": 256})]


@case("teacher.tokenizer", "190 tokens", "embeddings for 100")
def tokenizer_of_another_model(world: World) -> list[str]:
    world.model("narrow")
    return ["distill", world.recipe()]


@case("model.safetensors is not a readable safetensors file")
def safetensors_corrupt(world: World) -> list[str]:
    (world.model() / "model.safetensors").write_bytes(b"\xff" * 200)
    return ["distill", world.recipe()]


@case("model.safetensors is not a readable safetensors file")
def safetensors_truncated(world: World) -> list[str]:
    weights = world.model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return ["distill", world.recipe()]


@case("model.safetensors is not a readable safetensors file")
def safetensors_header_only(world: World) -> list[str]:
    weights = world.model() / "model.safetensors"
    (size,) = struct.unpack("<Q", weights.read_bytes()[:8])
    weights.write_bytes(weights.read_bytes()[: 8 + size])
    return ["distill", world.recipe()]


@case("only as a pickle", "pytorch_model.bin", "kdcli convert")
def a_pickle_only(world: World) -> list[str]:
    folder = world.model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return ["distill", world.recipe()]


@case("is a PEFT adapter, not a whole model", "merge_and_unload")
def an_adapter_in_place_of_a_model(world: World) -> list[str]:
    world.write("teacher/adapter_config.json", '{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    world.write("teacher/adapter_model.safetensors", b"")
    return ["distill", world.recipe()]


@case("id2label is an array", '{"0": "first class"')
def names_of_classes_as_an_array(world: World) -> list[str]:
    edit_config(world.model(), id2label=["no", "yes"])
    return ["distill", world.recipe()]


@case("no pad_token_id", "write the tokenizer's into config.json")
def no_padding_anywhere(world: World) -> list[str]:
    folder = world.model()
    edit_config(folder, pad_token_id=None)
    for file in folder.glob("token*"):
        file.unlink()
    return ["eval", str(folder), "--data", "rows.csv", "--text", "text"]


@case("teacher has model.safetensors already", "nothing to convert")
def convert_of_safetensors(world: World) -> list[str]:
    return ["convert", str(world.model()), "--out", "made"]


@case("pytorch_model.bin cannot be read as weights alone", "does not run")
def convert_of_a_pickle_with_code(world: World) -> list[str]:
    folder = world.model()
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        torch.save({"a": ROWS, "b": Path("x")}, file)
    return ["convert", str(folder), "--out", "made"]


@case("pytorch_model.bin holds something else than a table of tensors")
def convert_of_something_else(world: World) -> list[str]:
    folder = world.model()
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    return ["convert", str(folder), "--out", "made"]


@case("lies outside the model's folder")
def convert_of_a_pickle_elsewhere(world: World) -> list[str]:
    folder = world.model()
    torch.save(load_file(folder / "model.safetensors"), world.folder / "outside.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "../outside.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return ["convert", str(folder), "--out", "made"]


@case("is missing 1 weight", "layer.1.attention.self.query.weight")
def a_weight_missing(world: World) -> list[str]:
    folder = world.model()
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ["distill", world.recipe()]


@case("by its config.json")
def weights_of_another_width(world: World) -> list[str]:
    edit_config(world.model(), hidden_size=64)
    return ["distill", world.recipe()]


@case("over-parameterised", "kdcli folders keep their config.json")
def chains_under_a_plain_configuration(world: World) -> list[str]:
    folder = world.model("chains")
    (folder / "config.json").write_bytes((world.model_folder("teacher") / "config.json").read_bytes())
    return ["distill", world.recipe()]


@case("teacher.labels", "ham, spam", "no, yes")
def labels_that_do_not_match(world: World) -> list[str]:
    world.model("other-classes")
    return ["distill", world.recipe()]


@case("teacher.labels", "3 names", "2 classes")
def too_many_label_names(world: World) -> list[str]:
    world.model("other-classes")
    return ["distill", world.recipe(teacher={"labels": ["no", "yes", "maybe"]})]


@case("teacher.model", "is a regression", "a single-label classifier", "[teacher.finetune]")
def regression_teacher_for_classes(world: World) -> list[str]:
    world.model("regressor")
    return ["distill", world.recipe()]


@case("teacher.model", "teacher is a multi-label classifier", "a single-label classifier")
def multi_label_teacher(world: World) -> list[str]:
    world.model("multi-label")
    return ["distill", world.recipe()]


@case("teacher.model", "no trained head for classifying texts (it is a token classifier)", "finetune = false")
def token_classifier_that_must_not_be_trained(world: World) -> list[str]:
    world.model("tagger")
    return ["distill", world.recipe(teacher={"finetune": False})]


@case("teacher", "the weights have 2 outputs (classifier.weight), config.json says 3", "id2label")
def more_names_than_the_teacher_has_outputs(world: World) -> list[str]:
    edit_config(world.model(), id2label={"0": "no", "1": "yes", "2": "maybe"})
    return ["distill", world.recipe()]


@case("teacher has 16 weights", "layer.1", "for which its config.json has no place")
def fewer_blocks_in_the_configuration_than_in_the_weights(world: World) -> list[str]:
    edit_config(world.model(), num_hidden_layers=1)
    return ["distill", world.recipe()]


@case("student.model", "ham, spam", "no, yes")
def student_checkpoint_of_other_classes(world: World) -> list[str]:
    world.model()
    world.model("other-classes", "start")
    return ["distill", world.recipe("student", student={"form": "checkpoint", "model": "start"})]


@case("student.model", "is a regression", "a single-label classifier")
def student_checkpoint_of_a_regression(world: World) -> list[str]:
    world.model()
    world.model("regressor", "start")
    return ["distill", world.recipe("student", student={"form": "checkpoint", "model": "start"})]


@case("student.model", "start is a multi-label classifier")
def student_checkpoint_with_several_labels(world: World) -> list[str]:
    world.model()
    world.model("multi-label", "start")
    return ["distill", world.recipe("student", student={"form": "checkpoint", "model": "start"})]


@case("teacher.model", "regression", "2 outputs")
def classifying_teacher_for_numbers(world: World) -> list[str]:
    world.model()
    rows = world.csv("numbers.csv", [("good", "0.9"), ("bad", "0.1")] * 10)
    return ["distill", world.recipe(task={"data": rows})]


@case("no trained head for classifying texts (it is a base model)", "finetune = false")
def a_base_model_that_must_not_be_trained(world: World) -> list[str]:
    world.model("headless")
    return ["distill", world.recipe(teacher={"finetune": False})]


@case("teacher.scratch.heads", "not divisible by 5")
def heads_of_a_teacher_from_scratch(world: World) -> list[str]:
    scratch = {"layers": 1, "hidden_size": 32, "heads": 5, "intermediate_size": 64}
    return ["distill", world.recipe("teacher", teacher={"scratch": scratch})]


@case("teacher.scratch.family", "'bloom'", "bert")
def family_of_a_teacher_from_scratch(world: World) -> list[str]:
    return ["distill", world.recipe("teacher", teacher={"scratch": {"family": "bloom"}})]


# Runs and folders


@case("no run yet", "kdcli distill RECIPE")
def eval_without_a_run(world: World) -> list[str]:
    return ["eval", "--task", "reviews"]


@case("no run yet", "kdcli distill RECIPE")
def export_without_a_run(world: World) -> list[str]:
    return ["export", "--onnx"]


@case("no run yet")
def latest_points_nowhere(world: World) -> list[str]:
    (world.folder / "runs").mkdir()
    (world.folder / "runs" / "latest").symlink_to("gone")
    return ["eval"]


@case("no run yet")
def latest_is_a_run_without_a_student(world: World) -> list[str]:
    with open_run(world.folder / "runs", "half", force=False, resume=False) as run:
        run.mark_latest()
    return ["eval"]


@case("run.json is not valid JSON")
def the_record_of_a_run_is_broken(world: World) -> list[str]:
    with open_run(world.folder / "runs", "half", force=False, resume=False) as run:
        world.model(name="runs/half/student")
        run.mark_latest()
    world.write("runs/half/run.json", '{"status": ')
    return ["eval"]


@case("runs/recipe exists already", "--force", "--resume", "--set name=OTHER")
def a_run_that_exists(world: World) -> list[str]:
    world.model()
    world.write("runs/recipe/run.json", "{}")
    return ["distill", world.recipe()]


@case("no run at runs/recipe to resume")
def nothing_to_resume(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(), "--resume"]


@case("cannot write to rows.csv")
def a_file_in_place_of_the_output_folder(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(), "--output", "rows.csv"]


@case("cannot write to rows.csv/below")
def an_output_folder_below_a_file(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(), "--output", "rows.csv/below"]


@case("runs/recipe")
def a_file_in_place_of_the_run(world: World) -> list[str]:
    world.model()
    world.write("runs/recipe", "mine")
    return ["distill", world.recipe()]


@case("wide exists already", "--force")
def overparam_onto_an_existing_folder(world: World) -> list[str]:
    world.write("wide/mine.txt", "precious")
    return ["overparam", str(world.model()), "--out", "wide"]


@case("wide was not written by kdcli", "--out")
def overparam_by_force_onto_a_folder_with_other_files(world: World) -> list[str]:
    world.write("wide/mine.txt", "precious")
    return ["overparam", str(world.model()), "--out", "wide", "--force"]


@case("served was not written by kdcli", "--out")
def export_by_force_onto_a_plain_model(world: World) -> list[str]:
    world.model(name="served")
    return ["export", str(world.model()), "--onnx", "--out", "served", "--no-latency", "--force"]


@case("contains the folder that you are in", "--out")
def contract_by_force_onto_what_contains_the_working_folder(world: World) -> list[str]:
    world.write("below/rows.csv", "")
    world.monkeypatch.chdir(world.folder / "below")
    # Even one that kdcli wrote.
    world.write("kdcli.json", '{"kdcli": "1"}')
    return ["contract", "owner/name", "--out", str(world.folder), "--force"]


@case("is your home folder", "--out")
def overparam_by_force_onto_a_home_through_a_link(world: World) -> list[str]:
    world.write("home/kdcli.json", '{"kdcli": "1"}')
    (world.folder / "link").symlink_to("home")
    world.monkeypatch.setenv("HOME", str(world.folder / "home"))
    return ["overparam", str(world.model()), "--out", "link", "--force"]


@case("rows.csv is a file where a folder should be")
def export_by_force_onto_a_file(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx", "--out", "rows.csv", "--no-latency", "--force"]


@case("runs/recipe was not written by kdcli", "--set name=OTHER")
def a_run_by_force_onto_what_is_none(world: World) -> list[str]:
    world.model()
    world.write("runs/recipe/thesis.tex", "precious")
    return ["distill", world.recipe(), "--force"]


@case("recipe-seed42 was not written by kdcli")
def a_comparison_that_begins_again_onto_what_is_no_run(world: World) -> list[str]:
    world.model()
    world.write("comparison/runs/own-recipe-seed42/thesis.tex", "precious")
    return ["compare", world.recipe(), "--seeds", "1", "--refresh"]


@case("cannot write to rows.csv")
def overparam_below_a_file(world: World) -> list[str]:
    return ["overparam", str(world.model()), "--out", "rows.csv/wide"]


@case("116 cannot be split", "[29, 4]")
def overparam_of_a_prime_width(world: World) -> list[str]:
    return ["overparam", str(world.model("prime")), "--out", "wide"]


@case("over-parameterised already", "contract it first")
def overparam_twice(world: World) -> list[str]:
    return ["overparam", str(world.model("chains")), "--out", "wide"]


@case("teacher has no config.json")
def contract_of_an_empty_folder(world: World) -> list[str]:
    (world.folder / "teacher").mkdir()
    return ["contract", "./teacher", "--out", "plain"]


@case("--out", "outside a run")
def export_without_a_folder(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx"]


@case("served exists already", "--force")
def export_onto_an_existing_folder(world: World) -> list[str]:
    world.write("served/mine.txt", "precious")
    return ["export", str(world.model()), "--onnx", "--out", "served"]


@case("--opset", "greater than or equal to 20")
def an_old_opset(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx", "--out", "served", "--opset", "19"]


@case("export.opset", "from 20 to 23", "19")
def an_old_opset_in_a_recipe(world: World) -> list[str]:
    return ["distill", world.recipe(export={"onnx": True, "opset": 19})]


@case("--batch-sizes", "'1,none'")
def batch_sizes_that_are_no_numbers(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx", "--out", "served", "--batch-sizes", "1,none"]


@case("headless has no trained head (it is a base model)")
def export_of_a_base_model(world: World) -> list[str]:
    return ["export", str(world.model("headless", "headless")), "--onnx", "--out", "served", "--no-latency"]


@case("headless has no trained head (it is a base model)")
def eval_of_a_base_model(world: World) -> list[str]:
    return ["eval", str(world.model("headless", "headless")), "--task", "reviews"]


@case("chooser is a multiple-choice model; kdcli knows ", "a classifier of texts")
def export_of_a_multiple_choice_model(world: World) -> list[str]:
    return ["export", str(world.model("chooser", "chooser")), "--onnx", "--out", "served", "--no-latency"]


@case("tagger has no trained head for classifying texts (it is a token classifier)")
def eval_of_a_token_classifier(world: World) -> list[str]:
    return ["eval", str(world.model("tagger", "tagger")), "--task", "reviews"]


@case("MODEL", "fits no type of task", "2 outputs", "problem_type 'regression'")
def eval_of_a_regression_of_two_numbers(world: World) -> list[str]:
    model = world.model(name="many")
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "problem_type": "regression"}))
    return ["eval", str(model), "--data", "rows.csv", "--text", "text"]


@case("MODEL", "190 tokens", "embeddings for 100")
def eval_with_the_tokenizer_of_another_model(world: World) -> list[str]:
    return ["eval", str(world.model("narrow", "narrow")), "--data", "rows.csv", "--text", "text"]


@case("MODEL", "190 tokens", "embeddings for 100")
def export_with_the_tokenizer_of_another_model(world: World) -> list[str]:
    return ["export", str(world.model("narrow", "narrow")), "--onnx", "--out", "served", "--no-latency"]


@case("MODEL", "no padding token", "tokenizer_config.json")
def eval_without_a_padding_token(world: World) -> list[str]:
    path = world.model("teacher", "mute") / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "pad_token"}))
    return ["eval", "./mute", "--data", "rows.csv", "--text", "text"]


@case("--max-length", "max_length 1 leaves no room for text: 2 tokens of a text are special ones", "use at least 3")
def eval_without_room_for_text(world: World) -> list[str]:
    return ["eval", str(world.model()), "--data", "rows.csv", "--text", "text", "--max-length", "1"]


@case("--max-length", "max_length 4 leaves no room for text: 3 tokens of a pair are special ones", "use at least 5")
def eval_without_room_for_both_texts_of_a_pair(world: World) -> list[str]:
    write_pairs(world)
    return ["eval", str(world.model()), "--data", "pairs.csv", "--text", "a,b", "--max-length", "4"]


@case("task.max_length", "max_length 0 leaves no room for text")
def export_of_a_model_without_room_for_text(world: World) -> list[str]:
    """Put a model there that has positions for fewer tokens than batches are padded to."""
    (world.folder / "short").mkdir()
    save_model(tiny("bert", labels=2, max_position_embeddings=5), world.folder / "short", tokenizer())
    return ["export", "./short", "--onnx", "--out", "served", "--no-latency", "--task", "reviews"]


@case("--task", "which task", "give --task NAME")
def eval_without_a_task(world: World) -> list[str]:
    return ["eval", str(world.model())]


@case("unknown task 'review'", "did you mean 'reviews'?")
def eval_on_an_unknown_task(world: World) -> list[str]:
    return ["eval", str(world.model()), "--task", "review"]


@case("--data: own data needs text", "--text COLUMN")
def eval_of_data_without_a_column(world: World) -> list[str]:
    return ["eval", str(world.model()), "--data", "rows.csv"]


@case("--task", "--data")
def eval_on_a_task_and_on_data(world: World) -> list[str]:
    return ["eval", str(world.model()), "--data", "rows.csv", "--text", "text", "--task", "reviews"]


@case("no file at absent.csv", "--data")
def eval_of_missing_data(world: World) -> list[str]:
    return ["eval", str(world.model()), "--data", "absent.csv", "--text", "text"]


@case("rows.csv", "ham, spam", "'no'")
def eval_of_data_with_other_labels(world: World) -> list[str]:
    return ["eval", str(world.model("other-classes")), "--data", "rows.csv", "--text", "text"]


@case("--fail-under-retention", "belongs to no run", "--teacher MODEL")
def retention_without_a_teacher(world: World) -> list[str]:
    arguments = ["--data", "rows.csv", "--text", "text", "--fail-under-retention", "0.9"]
    return ["eval", str(world.model()), *arguments]


@case("model.onnx cannot be run")
def a_broken_graph(world: World) -> list[str]:
    world.write("served/model.onnx", "nothing")
    return ["eval", "./served", "--task", "reviews"]


@case("served/config.json", "missing or broken", "export the model again")
def a_graph_without_its_configuration(world: World) -> list[str]:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence"])
    graph = helper.make_graph([helper.make_node("Cast", ["input_ids"], ["logits"], to=1)], "g", [ids], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    for file in world.model(name="served").glob("[cm]o*"):
        file.unlink()
    world.write("served/model.onnx", model.SerializeToString())
    return ["eval", "./served", "--task", "reviews"]


@case("--max-latency-ms", "--no-latency measures none")
def a_gate_on_a_latency_that_is_not_measured(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx", "--out", "served", "--no-latency", "--max-latency-ms", "1"]


@case("--sequence-lengths: 1024 tokens are more than the 130", "use at most 130")
def a_latency_of_texts_that_are_too_long(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx", "--out", "served", "--sequence-lengths", "1024"]


@case("is the folder that you are in", "--out")
def export_onto_the_working_folder(world: World) -> list[str]:
    return ["export", str(world.model()), "--onnx", "--out", ".", "--no-latency"]


@case("--out", "outside a run", "dense")
def export_of_a_model_beside_a_runs_student(world: World) -> list[str]:
    world.model(name="runs/mine/dense")
    world.model(name="runs/mine/student")
    world.write("runs/mine/run.json", '{"recipe": {}}')
    world.write("runs/mine/onnx/model.onnx", "precious")
    return ["export", "runs/mine/dense", "--onnx"]


@case("run.json does not hold the recipe of a run", "--task")
def eval_in_a_folder_with_a_run_json_of_another_program(world: World) -> list[str]:
    world.model(name="mine/student")
    world.write("mine/run.json", '{"recipe": {"colour": "red"}}')
    return ["eval", "mine/student", "--task", "own"]


@case("has no student yet (status: failed)", "--resume")
def eval_of_a_run_that_is_not_finished(world: World) -> list[str]:
    world.write("runs/mine/run.json", '{"status": "failed"}')
    return ["eval", "runs/mine"]


@case("--text", "one column, or two with a comma", "'a,b,c'")
def eval_of_three_columns(world: World) -> list[str]:
    return ["eval", str(world.model()), "--data", "rows.csv", "--text", "a,b,c"]


@case("run.json is no record of a run", "--force")
def resume_of_what_is_no_run(world: World) -> list[str]:
    world.write("runs/recipe/run.json", "[]")
    return ["distill", world.recipe(), "--resume"]


# Plain text


def text_recipe(world: World, **changes: Any) -> str:
    """Write a recipe for plain text, and the text."""
    world.write("my.txt", "\n\n".join(f"{text}, number {number}" for number, (text, _) in enumerate(ROWS)))
    world.model("headless")
    task = {"name": "mine", "type": "text", "data": "my.txt", "max_length": 32}
    return world.recipe("task", "method", task=task, method="minilmv2", **changes)


@case("recipe.toml", "finetune[0].task.name: unknown task 'sst'", "did you mean 'sst2'?")
def a_task_to_fine_tune_on_that_is_not_known(world: World) -> list[str]:
    return ["distill", text_recipe(world, finetune=[{"task": "sst"}])]


@case("--set finetune", "finetune[1].task.data: no file at ", "absent.csv")
def a_task_to_fine_tune_on_without_its_data(world: World) -> list[str]:
    absent = "{task={name='a', data='absent.csv', text='text'}}"
    own = "{task={name='b', data='rows.csv', text='text'}}"
    return ["distill", text_recipe(world), "--set", f"finetune=[{own}, {absent}]"]


@case("recipe.toml", "finetune[0].task.name", "cannot be a name: it has a / in it")
def a_task_to_fine_tune_on_whose_name_is_a_folder(world: World) -> list[str]:
    world.write("documents/thesis.tex", "precious")
    name = str(world.folder / "documents")
    return ["distill", text_recipe(world, finetune=[{"task": {"name": name, "data": "rows.csv", "text": "text"}}])]


@case("recipe.toml", "finetune[0] and finetune[1] are both called")
def two_tasks_to_fine_tune_on_of_one_name(world: World) -> list[str]:
    tables = [{"task": {"name": name, "data": "rows.csv", "text": "text"}} for name in ("own", "Own")]
    return ["distill", text_recipe(world, finetune=tables)]


@case("--fail-under", 'type = "text" has none', "kdcli eval")
def a_gate_for_plain_text(world: World) -> list[str]:
    return ["distill", text_recipe(world), "--fail-under", "0.9"]


@case("--fail-under-retention", 'type = "text" has none', "kdcli eval")
def a_retention_gate_for_plain_text(world: World) -> list[str]:
    return ["distill", text_recipe(world), "--fail-under-retention", "0.9", "--dry-run"]


@case("evaluate.fail_under_retention: needs a task with a score")
def a_retention_gate_in_a_recipe_for_plain_text(world: World) -> list[str]:
    return ["distill", text_recipe(world, evaluate={"fail_under_retention": 0.9})]


@case("evaluate.fail_under_retention", "a black box has none")
def a_retention_gate_in_a_recipe_for_a_black_box(world: World) -> list[str]:
    return ["distill", world.recipe("teacher", teacher={"black_box": True}, evaluate={"fail_under_retention": 0.9})]


@case("--fail-under-retention", "a black box has no score")
def a_retention_gate_for_a_black_box(world: World) -> list[str]:
    return ["distill", world.recipe("teacher", teacher={"black_box": True}), "--fail-under-retention", "0.9"]


@case("export.onnx: a general student", "kdcli export")
def an_export_after_plain_text(world: World) -> list[str]:
    return ["distill", text_recipe(world, export={"onnx": True})]


@case("method.name: theseus works on causal-lm, classification, ", "mine is a text task", "use kd, makd, od")
def a_method_that_needs_labels_on_plain_text(world: World) -> list[str]:
    return ["distill", text_recipe(world), "--set", "method=theseus"]


@case("my.doc is none of ", ".txt")
def plain_text_in_a_file_of_another_kind(world: World) -> list[str]:
    world.write("my.doc", "a text")
    return ["distill", text_recipe(world), "--set", "task.data=my.doc"]


@case("finetune[0].task.max_length", "max_length 256 is more than the 130 positions")
def a_task_to_fine_tune_on_with_longer_texts_than_the_model_reads(world: World) -> list[str]:
    own = {"name": "own", "data": "rows.csv", "text": "text", "max_length": 256}
    return ["distill", text_recipe(world, finetune=[{"task": own}])]


@case("finetune[0].task.max_length", "max_length 2 leaves no room for text", "use at least 3")
def a_task_to_fine_tune_on_without_room_for_text(world: World) -> list[str]:
    own = {"name": "own", "data": "rows.csv", "text": "text", "max_length": 2}
    return ["distill", text_recipe(world, finetune=[{"task": own}])]


@case("task.max_length", "max_length 3 leaves no room for text")
def plain_text_in_blocks_without_room(world: World) -> list[str]:
    return ["distill", text_recipe(world), "--set", "task.max_length=3"]


@case("teacher.tokenizer", "no mask token")
def plain_text_for_a_tokenizer_without_a_mask(world: World) -> list[str]:
    recipe = text_recipe(world)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = world.folder / "teacher" / name
        if file.exists():
            document = json.loads(file.read_text())
            file.write_text(json.dumps({key: value for key, value in document.items() if key != "mask_token"}))
    return ["distill", recipe]


# The loop


@case("train.device", "sees no GPU", 'device = "auto"')
def a_gpu_that_is_not_there(world: World) -> list[str]:
    world.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world.model()
    return ["distill", world.recipe(train={"device": "cuda"})]


@case("task.train_samples", "of 1 training row none can be held out")
def a_teacher_that_learns_from_held_out_rows_of_one(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(method="lgtm", task={"train_samples": 1})]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told_in_one_message_and_leaves_nothing_behind(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)


def test_there_are_enough_cases():
    files = [import_module(file.stem) for file in Path(__file__).parent.glob("test_bad_*.py")]
    names = [name for file in files for name in file.CASES]
    assert len(names) >= 100
    assert len(set(names)) == len(names)
