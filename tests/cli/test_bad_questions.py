"""Wrong input of question answering: exit code 2, one clear message, no traceback, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World

CASES = Cases()
case = CASES.add

TEXT = "Ann met Tom in Rome. Tom lives in Rome with Eva."
ROW = {"question": "who?", "context": TEXT, "answers": {"text": ["Ann"], "answer_start": [0]}}
TASK = {"name": "own", "type": "question-answering", "text": None}


def questions(world: World, *rows: dict[str, Any], name: str = "rows.jsonl") -> str:
    """Write twenty good rows and the given ones behind them."""
    return world.write(name, "".join(json.dumps(row) + "\n" for row in [*[ROW] * 20, *rows]))


def distill(world: World, *rows: dict[str, Any], **task: Any) -> list[str]:
    world.model()
    return ["distill", world.recipe(task={**TASK, "data": questions(world, *rows), **task})]


def answered(text: Any, start: Any = None, **row: Any) -> dict[str, Any]:
    return {**ROW, "answers": {"text": text, "answer_start": start}, **row}


@case("task.answer_start: rows.jsonl: row 21", "'Eva' does not begin at 0: there stands 'Ann'", "it begins at 44")
def an_offset_that_is_wrong(world: World) -> list[str]:
    return distill(world, answered(["Eva"], [0]))


@case("task.answer_start", "'Eva' does not begin at 900: the context has 48 characters")
def an_offset_behind_the_end(world: World) -> list[str]:
    return distill(world, answered(["Eva"], [900]))


@case("task.answer: rows.jsonl: row 22", "'Paris' is not in its context", "letter for letter")
def an_answer_that_is_not_in_the_context(world: World) -> list[str]:
    return distill(world, ROW, answered(["Paris"]))


@case("task.answer: rows.jsonl: row 21", "'Rome' is 2 times in its context, at 15, 34", "a column answer_start")
def an_answer_that_occurs_twice(world: World) -> list[str]:
    return distill(world, answered("Rome"))


@case("'ann' is not in its context", "there it is written 'Ann'")
def an_answer_in_another_case(world: World) -> list[str]:
    return distill(world, answered("ann"))


@case("task.answer_start", "row 21 has -1 for the place where its answer begins", "from 0")
def a_negative_offset(world: World) -> list[str]:
    return distill(world, answered(["Eva"], [-1]))


@case("task.answer_start", "row 21 has 2 answers and 1 place", "one for each, or none")
def fewer_offsets_than_answers(world: World) -> list[str]:
    return distill(world, answered(["Ann", "Eva"], [0]))


@case("task.answer", "row 21 has answers without text; it has 'span'")
def a_table_without_texts(world: World) -> list[str]:
    return distill(world, {**ROW, "answers": {"span": [0, 3]}})


@case("task.answer", "row 1 has the text \"{'text': ['Ann']}\" for its answers", "JSON lines or Parquet")
def a_table_in_a_csv_cell(world: World) -> list[str]:
    world.model()
    world.write("rows.csv", f"question,context,answers\nwho?,{TEXT},\"{{'text': ['Ann']}}\"\n")
    return ["distill", world.recipe(task={**TASK, "data": "rows.csv"})]


@case("task.context: rows.jsonl: 1 row without a context, the first is row 21", "remove them")
def an_empty_context(world: World) -> list[str]:
    return distill(world, {**ROW, "context": " "})


@case("task.question: rows.jsonl: row 21 has no 'question'")
def a_row_without_a_question(world: World) -> list[str]:
    return distill(world, {**ROW, "question": None})


@case("task.context", "'context' of row 21 is an array, not a text")
def a_context_in_pieces(world: World) -> list[str]:
    return distill(world, {**ROW, "context": [TEXT]})


@case("task.question: rows.jsonl has no question column 'questions'", "did you mean 'question'?")
def a_column_of_questions_that_is_not_there(world: World) -> list[str]:
    return distill(world, question="questions")


@case("task.answer: rows.jsonl: no row has an answer")
def nothing_but_unanswerable_questions(world: World) -> list[str]:
    world.model()
    rows = "".join(json.dumps(answered([], [])) + "\n" for _ in range(20))
    return ["distill", world.recipe(task={**TASK, "data": world.write("rows.jsonl", rows)})]


@case("task.stride: windows of 32 tokens cannot share 100", "use at most 14, or max_length = 204")
def windows_that_share_all(world: World) -> list[str]:
    return distill(world, max_length=32, stride=100)


@case("task.max_length: max_length 4 leaves no room for a question and a context", "use at least 5")
def no_room_for_a_context(world: World) -> list[str]:
    return distill(world, max_length=4)


@case("task.stride: must be a whole number from 0", "not -1")
def a_negative_stride(world: World) -> list[str]:
    return distill(world, stride=-1)


@case("answer = ... needs data, train or hub")
def a_column_of_a_named_set(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe("task", task={"name": "squad", "answer": "answers"})]


@case("task squad: train.parquet, validation.parquet not found in", "rajpurkar/squad cannot be reached")
def a_named_set_that_is_nowhere(world: World) -> list[str]:
    world.model()
    world.monkeypatch.setenv("KDCLI_DATA_DIR", "/nowhere")
    return ["distill", world.recipe("task", task={"name": "squad"})]


@case("task.metrics", "'accuracy' cannot be the metric of a question-answering task", "exact_match")
def a_metric_of_others(world: World) -> list[str]:
    return distill(world, metrics=["accuracy"])


@case("augment needs texts that keep their answers where words change", 'type = "question-answering" has none')
def copies_with_other_words(world: World) -> list[str]:
    return distill(world, augment={"model": "x", "copies": 1})


@case("teacher has no trained head for marking answers in a context (it is a classifier of texts)")
def a_teacher_that_is_a_classifier(world: World) -> list[str]:
    world.model()
    return ["distill", world.recipe(task={**TASK, "data": questions(world)}, teacher={"finetune": False})]


@case("--type: teacher is not one for question-answering", "give --type classification")
def a_classifier_that_is_scored(world: World) -> list[str]:
    world.model()
    return ["eval", "teacher", "--data", questions(world), "--type", "question-answering"]


@pytest.mark.parametrize("name", CASES)
def test_wrong_questions_are_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)
