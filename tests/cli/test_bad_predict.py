"""Wrong input of `kdcli predict`."""

import io
import json
import sys
from pathlib import Path

import pytest
from bad_input import Cases
from conftest import ROWS, World
from families import tiny, tokenizer

from kdcli.models.heads import with_new_head
from kdcli.models.save import save_model
from kdcli.tasks import registry

CASES = Cases()
case = CASES.add


def type_in(world: World, text: bytes) -> None:
    world.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


@case("TEXT: nothing to answer", "a text of one word needs MODEL before it")
def no_text(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher"]


@case("no run yet", "kdcli distill RECIPE")
def no_model_and_no_run(world: World) -> list[str]:
    return ["predict", "a fine film"]


@case("model 'film' not found")
def one_word_that_is_no_model(world: World) -> list[str]:
    return ["predict", "film", "a fine one"]


@case("--input", "without texts among the arguments")
def texts_and_a_file(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--input", world.write("texts.txt", "a film\n")]


@case("--input", "without texts among the arguments")
def standard_input_and_a_file(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "-", "--input", world.write("texts.txt", "a film\n")]


@case("no file at missing.csv")
def no_such_file(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--input", "missing.csv"]


@case("rows.doc is none of", ".parquet", ".txt")
def a_file_of_another_form(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--input", world.write("rows.doc", "x")]


@case("--text", "rows.csv has no text column 'message'", "'text', 'label'")
def no_such_column(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--input", world.csv("rows.csv", ROWS), "--text", "message"]


@case("--text: rows.jsonl: row 2 has no 'text'")
def a_row_without_its_text(world: World) -> list[str]:
    world.model()
    rows = [{"text": "a film"}, {"message": "a film"}]
    world.write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return ["predict", "teacher", "--input", "rows.jsonl"]


@case("TEXT: text 2 is empty", "in quotes")
def an_empty_text(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", " "]


@case("texts.txt:2 is empty", "each line is an example")
def an_empty_line(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--input", world.write("texts.txt", "a film\n \na film\n")]


@case("texts.txt has no lines")
def an_empty_file(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--input", world.write("texts.txt", "")]


@case("texts.txt:2 is not readable as text", "--encoding latin-1")
def a_file_that_is_no_utf8(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--input", world.write("texts.txt", b"a film\ncaf\xe9\n")]


@case("-: standard input: bytes behind line 0 are not UTF-8", "--encoding latin-1")
def standard_input_that_is_no_utf8(world: World) -> list[str]:
    world.model()
    type_in(world, b"caf\xe9\n")
    return ["predict", "teacher", "-"]


@case("--json-input: standard input:1 is not valid JSON")
def lines_that_are_no_json(world: World) -> list[str]:
    world.model()
    type_in(world, b"a film\n")
    return ["predict", "teacher", "-", "--json-input"]


@case("standard input:1 is no JSON object")
def texts_where_pairs_are_asked_for(world: World) -> list[str]:
    world.model()
    type_in(world, b'"a film"\n')
    return ["predict", "teacher", "-", "--json-input", "--pair"]


@case("--json-input: needs standard input")
def json_of_a_file(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--json-input", "--input", world.write("texts.txt", "a film\n")]


@case("TEXT: 3 texts, and an example takes 2: text and text_pair")
def half_a_pair(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--pair", "a film", "a film", "a film"]


@case("TEXT: 1 text, and an example takes 2: question and context", "--with NAME=TEXT")
def a_question_without_a_context(world: World) -> list[str]:
    (world.folder / "spans").mkdir()
    head = registry.get("question-answering").head
    save_model(with_new_head(tiny("bert", layers=1), head), world.folder / "spans", tokenizer())
    return ["predict", "spans", "Who?"]


@case("--input: a line is one text, and an example takes 2: text and text_pair", "--with NAME=TEXT")
def lines_for_pairs(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "--pair", "--input", world.write("texts.txt", "a film\n")]


@case("--with: an example here has no 'context': it is made of text")
def an_input_that_examples_do_not_have(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--with", "context=a film"]


@case("--with context=@story.txt: story.txt cannot be read: No such file")
def an_input_of_a_file_that_is_not_there(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--with", "context=@story.txt"]


@case("headless has no trained head (it is a base model)")
def a_model_without_a_head(world: World) -> list[str]:
    world.model("headless", "headless")
    return ["predict", "headless", "a film"]


@case("no [MASK] within", "'a film'", "write [MASK] where")
def a_text_without_a_mask(world: World) -> list[str]:
    world.model("filler", "filler")
    return ["predict", "filler", "a [MASK]", "a film"]


@case("vectors.npy takes vectors, and a classification model gives none")
def vectors_of_a_classifier(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--output", "vectors.npy"]


@case("the cells of a .csv file take no lists, and labels is one", "write a .jsonl file")
def lists_in_cells(world: World) -> list[str]:
    world.model("multi-label")
    return ["predict", "teacher", "a film", "--output", "labels.csv"]


@case("replies.txt is none of .jsonl, .csv, .npy")
def another_form_of_output(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--output", "replies.txt"]


@case("--output: rows.csv is what is read")
def the_input_as_output(world: World) -> list[str]:
    world.model()
    world.csv("rows.csv", ROWS)
    return ["predict", "teacher", "--input", "rows.csv", "--output", "rows.csv", "--force"]


@case("--beside: teacher belongs to no run, so its teacher is not known", "--beside MODEL")
def the_teacher_of_a_model_outside_a_run(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--beside", "teacher"]


@case("--beside", "ham, spam")
def a_second_model_with_other_classes(world: World) -> list[str]:
    world.model()
    world.model("other-classes", "other")
    return ["predict", "teacher", "a film", "--beside", "other"]


@case("--max-length: 5000 tokens are more than teacher has positions for", "use at most 128")
def more_tokens_than_positions(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--max-length", "5000"]


@case("--max-length: max_length 2 leaves no room for text", "use at least 3")
def no_room_for_a_text(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--max-length", "2"]


@case("TEXT: text 1 is empty")
def an_empty_text_behind_a_run(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", ""]


@case("--set foo", "foo")
def a_field_that_the_task_does_not_have(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--set", "foo=1"]


@case("--set labels: labels has no effect")
def other_labels_than_the_models_own(world: World) -> list[str]:
    world.model()
    return ["predict", "teacher", "a film", "--set", 'labels=["a", "b"]']


@case("--top: regression models give one answer")
def the_best_of_one_number(world: World) -> list[str]:
    return _of_head(world, "regression", labels=1)


@case("--top: token-classification models give one answer")
def the_best_of_tags(world: World) -> list[str]:
    return _of_head(world, "token-classification", labels=3)


@case("--top: sentence-embedding models give one answer")
def the_best_of_embeddings(world: World) -> list[str]:
    return _of_head(world, "sentence-embedding")


def _of_head(world: World, name: str, **options: int) -> list[str]:
    (world.folder / "other").mkdir()
    kind, model = registry.get(name), tiny("bert", layers=1, **options)
    if name != "regression":
        model = with_new_head(model, kind.head, kind.configure(["O", "B-a", "I-a"]))
    save_model(model, world.folder / "other", tokenizer())
    return ["predict", "other", "a film", "--top", "2"]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)


def test_an_interrupted_command_promises_to_go_on_only_where_it_can(world: World):
    class Interrupted:
        def __iter__(self) -> None:
            raise KeyboardInterrupt

    world.model()
    world.monkeypatch.setattr(sys, "stdin", Interrupted())
    outcome = world.call("predict", "teacher", "-")
    assert outcome.code == 130 and outcome.err.strip() == "error: interrupted"
