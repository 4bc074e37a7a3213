"""Wrong texts, pairs, queries and relevances, and what asks more of embeddings than there is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cases
from conftest import World

from kdcli.models.heads import BASE, SENTENCE_EMBEDDING, with_new_head
from kdcli.models.load import load_model, load_tokenizer
from kdcli.models.save import save_model

CASES = Cases()
case = CASES.add

QUERIES = [{"_id": "q1", "text": "a film"}, {"_id": "q2", "text": "a book"}]
CORPUS = [{"_id": "d1", "text": "it is a film"}, {"_id": "d2", "text": "it is a book"}]
RELEVANCES = [{"query-id": "q1", "corpus-id": "d1", "score": 1}]


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_told(name: str, world: World, own_cache: Path):
    CASES.check(name, world, own_cache)


def lines(world: World, name: str, rows: list[dict[str, Any]]) -> str:
    return world.write(name, "".join(json.dumps(row) + "\n" for row in rows))


def distill(world: World, method: str = "embedding", **task: Any) -> list[str]:
    """Return the arguments of a run on texts of its own."""
    if "data" not in task:
        world.write("text.txt", "\n".join(f"This is text number {i}." for i in range(30)))
    own = {"name": "own", "type": "sentence-embedding", "data": "text.txt", **task}
    own = {key: value for key, value in own.items() if value is not None}
    changes: dict[str, Any] = {"task": own, "teacher": {"model": str(world.model())}}
    return ["distill", world.recipe("task", "teacher", "method", method={"name": method}, **changes)]


def pairs(world: World, **changed: Any) -> list[str]:
    """Return the same with a file of pairs, of which the third is changed."""
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 5} for i in range(6)]
    rows[2] |= changed
    return distill(world, pairs=lines(world, "pairs.jsonl", rows))


def retrieval(world: World, **changed: list[dict[str, Any]] | None) -> list[str]:
    """Return the same with queries, documents and relevances; None leaves out a field."""
    given: dict[str, Any] = {"queries": QUERIES, "corpus": CORPUS, "relevances": RELEVANCES, **changed}
    fields = {name: lines(world, f"{name}.jsonl", rows) for name, rows in given.items() if rows is not None}
    return distill(world, **fields)


@case("text.txt has no text", "task")
def nothing_but_marks_to_embed(world: World) -> list[str]:
    return distill(world, data=world.write("text.txt", "* * *\n---\n"))


@case("row 3: the similarity is 'high', not a number", "task.label")
def similarity_in_words(world: World) -> list[str]:
    return pairs(world, score="high")


@case("row 3: the similarity is None, not a number", "task.label")
def pair_without_similarity(world: World) -> list[str]:
    return pairs(world, score=None)


@case("row 3 has no 'sentence2'")
def pair_of_one(world: World) -> list[str]:
    return pairs(world, sentence2=None)


@case("pairs.jsonl has no label column 'score'; it has 'sentence1', 'sentence2'", "task.label")
def pairs_without_a_score(world: World) -> list[str]:
    return distill(world, pairs=lines(world, "pairs.jsonl", [{"sentence1": "a", "sentence2": "b"}]))


@case("pairs.jsonl has no pair column 'sentence1'", "task.pair")
def pairs_with_other_columns(world: World) -> list[str]:
    return distill(world, pairs=lines(world, "pairs.jsonl", [{"first": "a", "second": "b", "score": 1}]))


@case("all similarities are equal", "task.pairs")
def similarities_that_are_all_the_same(world: World) -> list[str]:
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "score": 1} for i in range(4)]
    return distill(world, pairs=lines(world, "pairs.jsonl", rows))


@case("'sst2' is neither a file nor a set of pairs with a similarity; such sets are: stsb", "task.pairs")
def set_without_similarities(world: World) -> list[str]:
    return distill(world, pairs="sst2")


@case("label is of pairs, and there are none", "task.label")
def similarity_column_without_pairs(world: World) -> list[str]:
    return distill(world, label="score")


@case("stsb has columns of its own: label names those of a file", "task.label")
def similarity_column_of_a_named_set(world: World) -> list[str]:
    return distill(world, pairs="stsb", label="score")


@case("stsb has columns of its own: pair names those of a file", "task.pair")
def text_columns_of_a_named_set_of_pairs(world: World) -> list[str]:
    return distill(world, data=None, name="stsb", pair=["a", "b"])


@case("stsb has columns of its own: text names those of a file", "task.text")
def text_column_of_a_named_set(world: World) -> list[str]:
    return distill(world, data=None, name="stsb", text="sentence1")


@case("give pairs, or queries, corpus and relevances: one task has one kind of score")
def pairs_beside_queries(world: World) -> list[str]:
    return distill(world, pairs="stsb", corpus="corpus.jsonl")


@case("pairs (or queries, corpus and relevances) name what models are scored on, not test")
def texts_as_test_rows(world: World) -> list[str]:
    arguments = distill(world)
    path = world.folder / arguments[1]
    path.write_text(path.read_text().replace('data = "text.txt"', 'train = "text.txt"\ntest = "text.txt"'))
    return arguments


@case("retrieval needs queries, corpus and relevances: there is no relevances", "task.relevances")
def queries_without_relevances(world: World) -> list[str]:
    return retrieval(world, relevances=None)


@case("there are no queries", "task.queries")
def corpus_without_queries(world: World) -> list[str]:
    return retrieval(world, queries=None)


@case("relevances.jsonl: row 2 names 'd9', which corpus.jsonl does not have", "task.relevances")
def relevance_of_no_document(world: World) -> list[str]:
    return retrieval(world, relevances=[*RELEVANCES, {"query-id": "q1", "corpus-id": "d9", "score": 1}])


@case("relevances.jsonl: row 1 names 'q9', which queries.jsonl does not have", "task.relevances")
def relevance_for_no_query(world: World) -> list[str]:
    return retrieval(world, relevances=[{"query-id": "q9", "corpus-id": "d1", "score": 1}])


@case("row 1: the relevance -1 is below 0", "task.relevances")
def relevance_below_zero(world: World) -> list[str]:
    return retrieval(world, relevances=[{**RELEVANCES[0], "score": -1}])


@case("row 3 says 0 of 'd1' for 'q1', and a row before it says 1", "task.relevances", "remove one of them")
def document_with_two_grades_for_a_query(world: World) -> list[str]:
    # Only the last row differs: an equal repeat does no harm.
    return retrieval(world, relevances=[*RELEVANCES, *RELEVANCES, {**RELEVANCES[0], "score": 0}])


@case("no query has a relevant document", "task.relevances")
def queries_that_nothing_answers(world: World) -> list[str]:
    return retrieval(world, relevances=[{**RELEVANCES[0], "score": 0}])


@case("corpus.jsonl: row 3 has the id 'd1' a second time", "task.corpus")
def document_with_the_id_of_another(world: World) -> list[str]:
    return retrieval(world, corpus=[*CORPUS, CORPUS[0]])


@case("queries.jsonl: row 2 has no text", "task.queries")
def query_without_a_text(world: World) -> list[str]:
    return retrieval(world, queries=[QUERIES[0], {"_id": "q2", "text": " "}])


@case("'ndcg@10' cannot be the metric of a sentence-embedding task; known are spearman, pearson", "task.metrics")
def metric_of_queries_for_pairs(world: World) -> list[str]:
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "score": i} for i in range(20)]
    return distill(world, pairs=lines(world, "pairs.jsonl", rows), metrics=["ndcg@10"])


@case("own has nothing to score a student with", "evaluate.fail_under", "give task.pairs")
def limit_of_a_score_that_there_is_not(world: World) -> list[str]:
    return [*distill(world), "--set", "evaluate.fail_under=0.5"]


@case("similarities alone train no bridge", "method.bridge")
def bridge_that_nothing_trains(world: World) -> list[str]:
    weights = [f"method.weights.{name}={value}" for name, value in (("cosine", 0), ("similarity", 1))]
    return [*distill(world), *(part for change in weights for part in ("--set", change)), "--set", "method.bridge=keep"]


@case("theseus works on", "sentence-embedding task")
def method_that_needs_labels(world: World) -> list[str]:
    return distill(world, method="theseus")


@case("embedding works on sentence-embedding tasks", "embeddings of texts")
def embeddings_of_a_task_with_labels(world: World) -> list[str]:
    return ["distill", world.recipe("method", method={"name": "embedding"})]


@case("rows.jsonl has no text column 'sentence1'; it has 'a', 'b', 'score'", "--text")
def file_of_pairs_with_other_columns_to_score(world: World) -> list[str]:
    model = embedder(world)
    return ["eval", model, "--data", lines(world, "rows.jsonl", [{"a": "x", "b": "y", "score": 1}])]


@case("pairs have two columns of text", "--text")
def file_of_single_texts_to_score(world: World) -> list[str]:
    model = embedder(world)
    return ["eval", model, "--data", lines(world, "rows.jsonl", [{"a": "x", "score": 1}]), "--text", "a"]


def embedder(world: World) -> str:
    """Put a model of sentence embeddings there, and return its name."""
    folder = world.model()
    model = with_new_head(load_model(folder, BASE), SENTENCE_EMBEDDING)
    words = load_tokenizer(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    save_model(model, folder, words)
    return folder.name
