"""Sentence embeddings as a task: texts, pairs and documents that are read, students that are trained and scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny, tokenizer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import ndcg_score
from tiny_recipes import changed, run_recipe, tiny_recipe, write_recipe

from kdcli.cli.app import run
from kdcli.data.columns import Column
from kdcli.data.reviews import reviews
from kdcli.data.tables import dataset_of
from kdcli.errors import InputError
from kdcli.models.embedding import ASSUMED, dimension_of
from kdcli.models.heads import BASE, SENTENCE_EMBEDDING, with_new_head
from kdcli.models.load import load_model, load_tokenizer
from kdcli.models.save import save_model
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task
from kdcli.tasks.predict import predict
from kdcli.tasks.ranking import ranking_scores
from kdcli.tasks.sentence_embedding import KIND

TEXTS = reviews()["train"]["text"][:40]
PAIRS = [(TEXTS[i], TEXTS[(7 * i + 3) % 40], round(5 * ((i * 13) % 24) / 23, 3)) for i in range(24)]
NORMAL = {"modules": [{"type": "Normalize"}]}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def embedder(**settings: Any) -> Any:
    body = with_new_head(tiny("bert", layers=2), BASE)
    return with_new_head(body, SENTENCE_EMBEDDING, {"sentence_embedding": {**ASSUMED, **NORMAL, **settings}})


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with texts, pairs, queries and documents, and a teacher."""
    (tmp_path / "teacher").mkdir()
    save_model(embedder(), tmp_path / "teacher", tokenizer())
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    jsonl(tmp_path / "pairs.jsonl", [dict(zip(("sentence1", "sentence2", "score"), row, strict=True)) for row in PAIRS])
    jsonl(tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": TEXTS[i]} for i in range(6)])
    documents = [{"_id": i, "title": "On" if i else "", "text": TEXTS[i + 6]} for i in range(30)]
    jsonl(tmp_path / "corpus.jsonl", documents)
    found = [f"q{i}\t{(5 * i + j) % 30}\t{j}" for i in range(5) for j in range(3)]
    (tmp_path / "relevances.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *found]))
    return tmp_path


RETRIEVAL = {"queries": "queries.jsonl", "corpus": "corpus.jsonl", "relevances": "relevances.tsv"}


def load(base: Path, limit: int | None = None, **fields: Any) -> Task:
    section = TaskSection(name="own", type="sentence-embedding", **{"data": "text.txt", **fields})
    return load_task(section, EvaluateSection(), base=base, limit=limit)


def recipe(folder: Path, *, method: Any = "embedding", task: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a recipe of a tiny run in the folder."""
    own = {"name": "own", "type": "sentence-embedding", "data": "text.txt", "pairs": "pairs.jsonl", "max_length": 16}
    document = tiny_recipe(*("task", "teacher", "method"), method=method, task={**own, **(task or {})})
    document = changed(document, teacher={"model": "teacher"}, **changes)
    return write_recipe(folder / "recipe.toml", document)


def embeddings(model: Any, texts: list[str]) -> np.ndarray:
    """Return the embeddings of texts, one at a time."""
    with torch.inference_mode():
        one = [model(**tokenizer()(text, truncation=True, max_length=16, return_tensors="pt")) for text in texts]
    return np.concatenate([output.sentence_embedding.double().numpy() for output in one])


# What is read


def test_plain_text_is_cut_into_sentences_and_what_is_held_out_is_not_trained_on(tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("One is here. Two is there.\nThree. One is here. * * *")
    (tmp_path / "text" / "valid.txt").write_text("Two is there. Four.")
    task = load(tmp_path, data="text")
    assert task.train["text"][:] == ["One is here.", "Three."] and task.selection["text"][:] == [
        "Two is there.",
        "Four.",
    ]
    assert (task.report, task.scored_by_loss, task.description["protocol"]) == ({}, True, "held-out loss")
    lines = load(tmp_path, data="text", unit="paragraphs").train["text"][:]
    assert lines == ["One is here. Two is there.", "Three. One is here. * * *"]


def test_every_cell_of_every_text_column_is_a_text_of_its_own(tmp_path: Path):
    rows = [{"a": f"First {i}. So.", "b": f"second {i}"} for i in range(10)]
    task = load(tmp_path, data=jsonl(tmp_path / "rows.jsonl", rows), text=["a", "b"], validation_fraction=0.2)
    texts = [*task.train["text"][:], *task.selection["text"][:]]
    assert sorted(texts) == sorted(row[key] for row in rows for key in row) and len(task.selection) == 4
    cut = load(tmp_path, data="rows.jsonl", text="a", unit="sentences", validation_fraction=0.5)
    assert "So." in [*cut.train["text"][:], *cut.selection["text"][:]]


def test_columns_of_pairs_have_usual_names_or_those_that_are_given(world: Path):
    task = load(world, pairs="pairs.jsonl")
    assert (task.metrics, task.description["protocol"]) == (("spearman", "pearson"), "dev")
    rows = task.report["test"]
    assert [*zip(rows["text"], rows["text_pair"], rows["label"], strict=True)] == PAIRS
    renamed = [{"x": a, "y": b, "how": str(score)} for a, b, score in PAIRS]
    other = load(world, pairs=jsonl(world / "other.jsonl", renamed), pair=["x", "y"], label="how")
    assert other.report["test"][:] == rows[:]
    assert task.train["text"][:] == other.train["text"][:] == load(world).train["text"][:]


def test_the_sets_of_pairs_that_kdcli_knows_are_scored_on_by_name(data_dir: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    task = load(tmp_path, pairs="stsb")
    assert len(task.report["test"]) == 1500 and all(any(own in text for text in TEXTS) for own in task.train["text"])
    # Its own name gives the sentences of its training pairs.
    own = load_task(TaskSection(name="stsb", type="sentence-embedding"), EvaluateSection(), base=tmp_path)
    assert own.report["test"][:] == task.report["test"][:]
    assert 10_000 < len(own.train) + len(own.selection) < 2 * 5749


def test_retrieval_holds_every_query_with_a_relevant_document_and_the_whole_corpus(world: Path):
    task = load(world, **RETRIEVAL)
    rows = task.report["test"].to_dict()
    # q5 has none at all, and a relevance of 0 is none.
    assert rows["is_query"] == [True] * 5 + [False] * 30 and rows["text"][5:7] == [TEXTS[6], f"On {TEXTS[7]}"]
    assert rows["documents"][:2] == [[1, 2], [6, 7]] and rows["grades"][0] == [1.0, 2.0]
    assert task.metrics == ("ndcg@10", "recall@10", "mrr@10")
    assert "1 query without a relevant document (first: 'q5') are not scored" in task.notes
    drawn = load(world, limit=2, **RETRIEVAL).report["test"].to_dict()
    assert sum(drawn["is_query"]) == 2 and drawn["text"][2:] == rows["text"][5:]


def test_all_files_of_a_retrieval_are_read_in_the_encoding_and_with_the_delimiter_of_the_task(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    tables = {
        "text": ["text", *(f"Satz {i} über Öl." for i in range(20))],
        "queries": ["id|text", "frühling|wo ist Öl, bitte"],
        "corpus": ["id|text", "müll|Öl ist im Müll", "käse|Käse, kein Öl"],
        "relevances": ["query-id|corpus-id", "frühling|käse"],
    }
    for name, lines in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines), encoding="latin-1")
    files = {name: f"{name}.csv" for name in RETRIEVAL}
    rows = load(tmp_path, data="text.csv", encoding="latin-1", delimiter="|", **files).report["test"].to_dict()
    assert rows["text"] == ["wo ist Öl, bitte", "Öl ist im Müll", "Käse, kein Öl"]
    assert rows["documents"] == [[1], None, None]
    monkeypatch.chdir(tmp_path)
    save_model(embedder(), tmp_path, tokenizer())
    changes = [part for name in ("corpus", "relevances") for part in ("--set", f"{name}={files[name]}")]
    form = ["--encoding", "latin-1", "--delimiter", "|"]
    assert run(["eval", ".", "--data", "queries.csv", *form, *changes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"rows": 1}


# How models are scored


def test_pairs_score_as_scipy_correlates_cosines_whatever_the_batches(world: Path):
    task, model = load(world, pairs="pairs.jsonl"), embedder()
    rows = task.report["test"]
    for size in (3, 64):
        answers = task.kind.answers(model, rows, tokenizer(), max_length=16, ask=predict, batch_size=size)
        found = task.kind.score(answers, rows, (), task.metrics)
        first, second = (embeddings(model, rows[name][:]) for name in ("text", "text_pair"))
        cosines = (first * second).sum(1)
        assert found["spearman"] == pytest.approx(spearmanr(cosines, rows["label"][:])[0], abs=1e-9)
        assert found["pearson"] == pytest.approx(pearsonr(cosines, rows["label"][:])[0], abs=1e-6)


@pytest.mark.slow
def test_correlations_are_scipys_on_a_thousand_random_tables_with_ties():
    draw = np.random.default_rng(0)
    for number in range(1000):
        count = int(draw.integers(3, 12))
        answers = draw.normal(size=(count, 2, 3)).round(number % 3).astype(np.float32)
        truth = np.concatenate([draw.integers(0, 4, count - 2), [4, 5]]).astype(float)
        rows = Dataset.from_dict({"text_pair": [""] * count, "label": truth})
        units = answers.astype(float) / np.maximum(np.linalg.norm(answers.astype(float), axis=2, keepdims=True), 1e-12)
        cosines = (units[:, 0] * units[:, 1]).sum(1)
        expected = (
            [float(measure(cosines, truth)[0]) for measure in (spearmanr, pearsonr)] if np.ptp(cosines) else [0, 0]
        )
        found = KIND.score(answers, rows, (), ["spearman", "pearson"])
        assert [*found.values()] == pytest.approx(expected, abs=1e-12), number


def test_queries_and_documents_have_the_prompts_that_the_model_has_for_them(world: Path):
    prompts = {"query": "so: ", "document": "the: ", "usual": "a film: "}
    model = embedder(prompts=prompts, default_prompt_name="usual")
    (world / "prompted").mkdir()
    save_model(model, world / "prompted", tokenizer())
    words = load_tokenizer(world / "prompted")
    rows = load(world, **RETRIEVAL).report["test"]
    read = [words.decode(ids, skip_special_tokens=True) for ids in KIND.encode(rows, words, 16)["input_ids"]]
    assert all(text.startswith("so") for text in read[:5]) and all(text.startswith("the") for text in read[5:])
    features = KIND.encode(load(world, pairs="pairs.jsonl").report["test"], words, 16)
    assert all(words.decode(ids, skip_special_tokens=True).startswith("a film") for ids in features["input_ids"])
    assert features["row"][:] == [i // 2 for i in range(48)] and features["index"][:] == [*range(48)]


def test_replies_are_embeddings_and_stand_beside_others_by_their_cosine():
    rows = dataset_of(KIND.read_inputs({"text": Column.of(TEXTS[:3])}, KIND.fields(), "here", []))
    one, other = (
        KIND.replies(model, rows, tokenizer(), max_length=16, ask=predict)
        for model in (embedder(), embedder(modules=[]))
    )
    np.testing.assert_allclose([reply["embedding"] for reply in one], embeddings(embedder(), TEXTS[:3]), atol=1e-6)
    # Without the normalisation it has another length, and the same direction.
    assert KIND.beside(one[0], other[0])["cosine"] == pytest.approx(1.0) and KIND.show(one[0]).startswith(
        "32 numbers: "
    )
    assert KIND.beside(one[0], {"embedding": np.ones(3)}) == {"cosine": None}


# Students


def test_a_student_is_trained_scored_and_read_by_the_library(world: Path):
    document = run_recipe(recipe(world, train={"max_steps": 3}))
    assert set(document["student"]["metrics"]["test"]) == {"spearman", "pearson"}
    assert document["rows"] == {"test": 24} and document["compression"] > 1 and "loss" not in document
    folder = Path(document["paths"]["student"])
    from sentence_transformers import SentenceTransformer

    ours = load_model(str(folder), SENTENCE_EMBEDDING)
    theirs = SentenceTransformer(str(folder), device="cpu").encode([text[:30] for text in TEXTS])
    np.testing.assert_allclose(embeddings(ours, [text[:30] for text in TEXTS]), theirs, atol=1e-6)
    # The folder scores what the run scored.
    task = load(world, pairs="pairs.jsonl")
    answers = task.kind.answers(ours, task.report["test"], tokenizer(), max_length=16, ask=predict)
    again = task.kind.score(answers, task.report["test"], (), ["spearman"])["spearman"]
    assert again == pytest.approx(document["student"]["metrics"]["test"]["spearman"], abs=1e-9)


def test_outputs_of_the_teacher_that_are_kept_train_the_same_student(world: Path):
    kept = [
        run_recipe(recipe(world), f"teacher.cache={how}", force=True)["hashes"] for how in ("true", "true", "false")
    ]
    assert kept[0] == kept[1] == kept[2]


def test_held_out_rows_are_compared_with_what_the_teacher_gives_for_them(world: Path):
    # A copy of the teacher differs from it by nothing, on held-out rows as well: these have numbers of their own.
    path = recipe(world, student={"layers": 2}, train={"max_steps": 1, "learning_rate": 1e-9})
    for cache in ("true", "false"):
        document = run_recipe(path, f"teacher.cache={cache}", force=True)
        losses = [entry["eval_loss"] for entry in document["training"][0]["history"] if "eval_loss" in entry]
        assert losses == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("name", ["kd", "hs", "minilm", "minilmv2", "makd", "tinybert", "distilbert"])
def test_methods_of_the_inside_work_without_labels(name: str, world: Path):
    document = run_recipe(recipe(world, method={"name": name}, train={"max_steps": 1}))
    terms = {key for stage in document["training"] for entry in stage["history"] for key in entry}
    assert "task" not in terms and ("output" in terms or name == "tinybert")
    assert -1.0 <= document["student"]["score"] <= 1.0


NARROW = {"form": "width", "hidden_size": 16, "heads": 2, "intermediate_size": 32, "layers": None}


@pytest.mark.parametrize(("bridge", "width"), [(None, 16), ("drop", 16), ("keep", 32)])
def test_a_narrower_student_has_its_own_width_or_that_of_the_bridge_it_keeps(
    bridge: str | None, width: int, world: Path
):
    method = {"name": "embedding", **({"bridge": bridge} if bridge else {})}
    path = recipe(world, method=method, student=NARROW)
    document = run_recipe(path)
    student = load_model(document["paths"]["student"], SENTENCE_EMBEDDING)
    assert dimension_of(student) == width
    found = embeddings(student, TEXTS[:4])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    from sentence_transformers import SentenceTransformer

    texts = [text[:30] for text in TEXTS[:4]]
    theirs = SentenceTransformer(document["paths"]["student"], device="cpu").encode(texts)
    np.testing.assert_allclose(embeddings(student, texts), theirs, atol=1e-6)
    if bridge == "keep":
        # The run that goes on from its end hands over the same map.
        assert run_recipe(path, resume=True)["hashes"] == document["hashes"]


def test_embeddings_of_two_widths_are_compared_by_the_method_that_has_a_bridge(world: Path):
    with pytest.raises(InputError, match="between equal widths, not 32 of the teacher and 16 of the student"):
        run_recipe(recipe(world, method={"name": "kd"}, student=NARROW))


def test_a_student_without_a_score_is_told_by_its_loss(world: Path, capsys: Any):
    path = recipe(world, task={"pairs": None})
    path.write_text(path.read_text().replace('pairs = "None"\n', ""))
    document = run_recipe(path)
    assert document["primary"] == "loss" and document["loss"]["after"] < document["loss"]["before"]
    card = (Path(document["paths"]["student"]) / "README.md").read_text()
    assert "held-out loss of the distillation" in card and "to be fine-tuned" not in card
    folder = document["paths"]["run"]
    assert run(["eval", folder]) == 2 and "nothing to score a model with" in capsys.readouterr().err
    pairs = ["--data", str(world / "pairs.jsonl")]
    assert run(["eval", folder, *pairs, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]["rows"]) == {"spearman", "pearson"}


# Any model, any pairs


def test_eval_reads_pairs_or_queries_of_ones_own(world: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(world)
    assert run(["eval", "teacher", "--data", "pairs.jsonl", "--text", "sentence1,sentence2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    task = load(world, pairs="pairs.jsonl")
    first, second = (embeddings(embedder(), task.report["test"][name][:]) for name in ("text", "text_pair"))
    expected = spearmanr((first * second).sum(1), [score for _, _, score in PAIRS])[0]
    # Texts are read to 128 tokens there, and to 16 here.
    assert abs(found["score"] - expected) < 0.5 and found["rows"] == {"rows": 24}
    changes = [part for name in ("corpus", "relevances") for part in ("--set", f"{name}={RETRIEVAL[name]}")]
    assert run(["eval", "teacher", "--data", "queries.jsonl", *changes, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert set(found["metrics"]["rows"]) == {"ndcg@10", "recall@10", "mrr@10"}
    # The score is of queries, however many documents they look through.
    assert found["rows"] == {"rows": 5} and "5 rows only" in captured.err
    assert load(world, **RETRIEVAL).description["sizes"]["report-test"] == 5


@pytest.mark.slow
def test_the_real_encoder_scores_on_stsb_what_the_library_scores(
    encoder: Path, data_dir: Path, capsys: Any, tmp_path: Path
):
    import pyarrow.parquet
    from sentence_transformers import SentenceTransformer

    assert run(["eval", str(encoder), "--task", "stsb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = pyarrow.parquet.read_table(data_dir / "glue" / "stsb" / "validation.parquet").to_pydict()
    model = SentenceTransformer(str(encoder), device="cpu")
    first, second = (model.encode(rows[name]) for name in ("sentence1", "sentence2"))
    assert found["score"] == pytest.approx(spearmanr((first * second).sum(1), rows["label"])[0], abs=1e-4)
    # The second sentence of a pair that means nearly the same is what its first one looks for.
    near = [i for i, label in enumerate(rows["label"]) if label >= 4][:300]
    truth = np.zeros((len(near), len(second)))
    truth[np.arange(len(near)), near] = [rows["label"][i] for i in near]
    relevant = [(np.array([i]), np.array([rows["label"][i]])) for i in near]
    ranks = ranking_scores(first[near], second, relevant)
    assert ranks["ndcg@10"] == pytest.approx(ndcg_score(truth, first[near] @ second.T, k=10), abs=1e-6)
    assert ranks["ndcg@10"] > 0.9
