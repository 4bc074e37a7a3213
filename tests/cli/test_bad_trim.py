"""Wrong input of `kdcli trim` and `[student.vocabulary]`."""

import json
from pathlib import Path

import pytest
from bad_input import Cases
from conftest import World

CASES = Cases()
case = CASES.add


@case("--text: no file at", "nothing.txt", "the working folder")
def a_text_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", "nothing.txt", "--out", "made"]


@case("--text: empty.txt holds no text")
def a_text_without_text(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", world.write("empty.txt", " \n\n"), "--out", "made"]


@case("--text: the text uses no piece of the tokenizer", "that the model is to read")
def a_text_in_another_script(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", world.write("greek.txt", "Ελληνικά κείμενα\n"), "--out", "made"]


@case("--text: the text uses no piece of the tokenizer 1,000 times or more", "smaller --min-count")
def a_count_that_no_piece_reaches(world: World) -> list[str]:
    world.model()
    text = world.write("text.txt", "a fine film\n")
    return ["trim", "./teacher", "--text", text, "--min-count", "1000", "--out", "made"]


@case("--keep: 5 pieces are fewer than the", "use at least")
def fewer_pieces_than_special_tokens(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", "rows.csv", "--keep", "5", "--out", "made"]


@case("--text: rows.csv has no column 'message'", "'text', 'label'", "--column NAME")
def a_column_of_text_to_trim_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", "rows.csv", "--column", "message", "--out", "made"]


@case("--column: names columns of tables, and none is given", "leave it out")
def a_column_of_lines(world: World) -> list[str]:
    world.model()
    sources = ["--text", world.write("text.txt", "a fine film\n"), "--held-out", "lines"]
    world.write("lines/more.txt", "a bad film\n")
    return ["trim", "./teacher", *sources, "--column", "text", "--out", "made"]


@case("--text: texts holds none of .txt, .csv")
def a_folder_without_text(world: World) -> list[str]:
    world.model()
    world.write("texts/notes.md", "# no text\n")
    return ["trim", "./teacher", "--text", "texts", "--out", "made"]


@case("--held-out: no file at", "nothing.csv")
def held_out_text_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", "rows.csv", "--held-out", "nothing.csv", "--out", "made"]


@case("MODEL: the tokenizer has", "embeddings for 100", "the model was trained with")
def a_tokenizer_of_another_model(world: World) -> list[str]:
    world.model("narrow")
    return ["trim", "./teacher", "--text", "rows.csv", "--out", "made"]


@case("ByT5Tokenizer is a tokenizer of Python code alone", "fast tokenizer")
def a_slow_tokenizer(world: World) -> list[str]:
    folder = world.model("roomy")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("a\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return ["trim", "./teacher", "--text", "rows.csv", "--out", "made"]


@case("teacher has no tokenizer files")
def no_tokenizer(world: World) -> list[str]:
    folder = world.model()
    (folder / "tokenizer.json").unlink()
    return ["trim", "./teacher", "--text", "rows.csv", "--out", "made"]


@case("--force does not replace it", "give another --out")
def the_model_in_place_of_itself(world: World) -> list[str]:
    world.model()
    return ["trim", "./teacher", "--text", "rows.csv", "--out", "teacher", "--force"]


# In a recipe


@case("student.vocabulary.text: no file at", "nothing.txt", "the recipe's folder")
def text_of_a_recipe_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"vocabulary": {"text": ["nothing.txt"]}})]


@case("student.vocabulary.text: ", "rows.csv has no column 'message'", "name them in columns")
def a_column_of_a_recipe_that_is_not_there(world: World) -> list[str]:
    world.model()
    vocabulary = {"text": ["rows.csv"], "columns": ["message"]}
    return ["distill", world.recipe(student={"vocabulary": vocabulary})]


@case("student.vocabulary: columns are of the tables that text names", "give text, too")
def columns_in_a_recipe_without_text(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"vocabulary": {"columns": ["text"]}})]


@case("student.vocabulary.columns: names columns of tables, and none is given")
def columns_of_lines_in_a_recipe(world: World) -> list[str]:
    world.model()
    vocabulary = {"text": [world.write("text.txt", "a fine film\n")], "columns": ["text"]}
    return ["distill", world.recipe(student={"vocabulary": vocabulary})]


@case("student.vocabulary.keep: 5 pieces are fewer than the")
def fewer_pieces_in_a_recipe_than_special_tokens(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"vocabulary": {"keep": 5}})]


@case("student.vocabulary.text: the text uses no piece of the tokenizer 1,000", "smaller student.vocabulary.min_count")
def a_count_in_a_recipe_that_no_piece_reaches(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"vocabulary": {"min_count": 1000}})]


@case("student.vocabulary.text: must be an array of strings, not []")
def no_text_at_all(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(student={"vocabulary": {"text": []}})]


@case("assistant.vocabulary", "set student.vocabulary")
def a_vocabulary_of_an_assistant(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(assistant={"form": "depth", "layers": 1, "vocabulary": {}})]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_of_trimming_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
