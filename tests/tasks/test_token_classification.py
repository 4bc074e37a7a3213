"""A tag a word: how rows are read, which pieces are predicted, what is learnt and answered, and every family."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from families import NAMES, tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import accuracy_score, f1_score
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training.stages import Killed, kill_after
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import TokenClassifierOutput

from kdcli.cli.app import run
from kdcli.data.columns import Column
from kdcli.data.tables import dataset_of
from kdcli.errors import InputError
from kdcli.evaluation.score import evaluate_model
from kdcli.export.export import export_model
from kdcli.export.session import OnnxModel
from kdcli.models.classes import class_names_of
from kdcli.models.heads import with_new_head
from kdcli.models.load import load_tokenizer
from kdcli.models.save import save_model, save_processor
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Owner, Task
from kdcli.tasks.heads import kind_of_model, load_model
from kdcli.tasks.load import load_rows, load_task
from kdcli.tasks.pieces import UNLABELLED, cut, encode_words
from kdcli.tasks.predict import predict
from kdcli.tasks.token_classification import KIND, TagFields

WORDS = tokenizer()
TEXTS = [["the", "film", "was", "good"], ["plot"], ["a", "dull", "film", ",", "again"]] * 4
TAGS = [["O", "B-thing", "I-thing", "B-view"], ["B-thing"], ["O", "B-view", "B-thing", "O", "O"]] * 4
NAMES_OF_TAGS = ["O", "B-thing", "I-thing", "B-view", "I-view"]


def lines(path: Path, words: list, tags: list, names: tuple[str, str] = ("tokens", "tags")) -> str:
    """Write rows as JSON lines, and return the file's name."""
    rows = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in zip(words, tags, strict=True)]
    path.write_text("".join(rows))
    return path.name


def load(base: Path, file: str, **fields: Any) -> Task:
    section = TaskSection(name="own", train=file, validation=file, **{"type": KIND.name, **fields})
    return load_task(section, EvaluateSection(), base=base)


def numbers(tags: list[list[str]], names: list[str] | tuple[str, ...] = NAMES_OF_TAGS) -> list[list[int]]:
    return [[names.index(tag) for tag in row] for row in tags]


def random_rows(count: int, words: int, *, seed: int = 0) -> Dataset:
    """Return rows of words of one or more pieces, each with a random one of 3 tags."""
    draw = random.Random(seed)
    texts = [
        ["".join(draw.choice("abcdefilmnot") for _ in range(draw.randint(1, 9))) for _ in range(draw.randint(1, words))]
        for _ in range(count)
    ]
    labels = [[draw.randrange(3) for _ in text] for text in texts]
    return Dataset.from_dict({"index": range(count), "words": texts, "label": labels})


# Rows


def test_every_way_to_write_tags_says_the_same(tmp_path: Path):
    column_file = "\n".join(
        "".join(f"{word} _ {tag}\n" for word, tag in zip(*row, strict=True)) for row in zip(TEXTS, TAGS, strict=True)
    )
    (tmp_path / "own.conll").write_text(column_file)
    ways: list[tuple[str, dict[str, Any]]] = [
        (lines(tmp_path / "a.jsonl", TEXTS, TAGS), {"labels": NAMES_OF_TAGS}),
        (lines(tmp_path / "b.jsonl", TEXTS, numbers(TAGS), ("words", "ner_tags")), {"labels": NAMES_OF_TAGS}),
        (
            lines(tmp_path / "c.jsonl", TEXTS, TAGS, ("w", "t")),
            {"text": "w", "label": "t", "labels": NAMES_OF_TAGS, "type": None},
        ),
        ("own.conll", {"labels": NAMES_OF_TAGS}),
        ("a.jsonl", {"labels": NAMES_OF_TAGS, "type": None}),
        ("own.conll", {"labels": NAMES_OF_TAGS, "type": None}),
        ("own.conll", {"labels": NAMES_OF_TAGS, "text": 1, "label": -1}),
        ("own.conll", {"labels": NAMES_OF_TAGS, "label": "3"}),
    ]
    tasks = [load(tmp_path, file, **fields) for file, fields in ways]
    for task in tasks:
        assert task.kind.name == KIND.name and task.label_names == tuple(NAMES_OF_TAGS)
        assert task.selection["words"][:] == TEXTS and task.selection["label"][:] == numbers(TAGS)
        assert task.metrics == ("f1", "accuracy")
        assert any("tags are IOB2 (2 types)" in note for note in task.notes)
    assert len({task.description["fingerprint"] for task in tasks}) == 1


def test_another_stride_is_another_teacher():
    assert KIND.drawn(TagFields(stride=4)) != KIND.drawn(TagFields(stride=8))
    assert KIND.drawn(TagFields(text="a")) == KIND.drawn(TagFields(text="b"))


def test_lists_of_words_alone_are_no_tags(tmp_path: Path):
    (tmp_path / "own.conll").write_text("a\nb\n\nc\n")
    with pytest.raises(InputError, match="no label column"):
        load(tmp_path, "own.conll", type=None)


def test_tags_of_a_type_are_complete(tmp_path: Path):
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, TAGS))
    # No view has two words here: elsewhere one may.
    assert task.label_names == ("B-thing", "B-view", "I-thing", "I-view", "O")
    assert any("no training rows of 1 class: I-view" in note for note in task.notes)


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        ({"B-thing": "I-thing", "B-view": "I-view"}, "IOB1"),
        ({"B-view": "S-view", "I-thing": "E-thing"}, None),
        ({"B-view": "U-view", "I-thing": "L-thing"}, None),
    ],
)
def test_the_scheme_of_tags_is_told(change: dict[str, str], scheme: str | None, tmp_path: Path):
    tags = [[change.get(tag, tag) for tag in row] for row in TAGS]
    if scheme is None:
        scheme = "IOBES" if "S-view" in change.values() else "BILOU"
        alone = {"B-thing": change["B-view"][0] + "-thing"}
        # The things of one word.
        tags = [tags[0], *([alone.get(tag, tag) for tag in row] for row in tags[1:3])] * 4
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, tags))
    assert any(f"tags are {scheme} (2 types); spans are scored" in note for note in task.notes)


def test_tags_without_spans_are_scored_by_accuracy(tmp_path: Path):
    names = {"O": "x", "B-thing": "NOUN", "I-thing": "VERB", "B-view": "ADJ"}
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, [[names[tag] for tag in row] for row in TAGS]))
    assert task.metrics == ("accuracy",) and any("write no spans" in note for note in task.notes)
    task = load(tmp_path, lines(tmp_path / "b.jsonl", TEXTS, numbers(TAGS)))
    assert task.metrics == ("accuracy",) and any("numbers without names" in note for note in task.notes)
    with pytest.raises(InputError, match="'f1' cannot be the metric of a token-classification task; known are accurac"):
        load(tmp_path, "b.jsonl", metrics=["f1"])


def test_a_few_beginnings_against_the_scheme_are_told(tmp_path: Path):
    tags = [*TAGS * 10, ["O", "O", "O", "I-view"]]
    file = lines(tmp_path / "a.jsonl", [*TEXTS * 10, TEXTS[0]], tags)
    [note] = [note for note in load(tmp_path, file).notes if "against" in note]
    assert "1 of 201 spans begin against IOB2 (first: row 121, word 4, 'good', has 'I-view')" in note


def test_names_of_a_set_of_the_hub_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES_OF_TAGS))})
    for split, labels in (("train", numbers(TAGS)), ("validation", numbers(TAGS)), ("test", [[-1] * 4] * 12)):
        words = TEXTS if split != "test" else [TEXTS[0]] * 12
        rows = Dataset.from_dict({"tokens": words, "ner_tags": labels}, features)
        rows.to_parquet(tmp_path / "set" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    task = load_task(TaskSection(name="own", hub="set", type=KIND.name), EvaluateSection(), base=tmp_path)
    # The test split is one without answers.
    assert list(task.report) == ["validation"]
    assert task.selection["label"][:] == numbers(TAGS, task.label_names)


def test_rows_to_score_have_the_models_tags(tmp_path: Path):
    file = lines(tmp_path / "a.jsonl", TEXTS, TAGS)
    section = TaskSection(name="data", data=str(tmp_path / file))
    config = tagger("bert", labels=list(reversed(NAMES_OF_TAGS))).config
    task = load_rows(section, KIND, config)
    assert task.label_names == tuple(reversed(NAMES_OF_TAGS))
    assert task.selection["label"][:] == numbers(TAGS, task.label_names)


# Pieces


def tagger(family: str, *, labels: list[str] = NAMES_OF_TAGS, seed: int = 0, **extra: Any) -> Any:
    """Return a random token classifier, in eval mode."""
    config = tiny(family, labels=len(labels), seed=seed, **extra).config
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}
    torch.manual_seed(seed)
    model = AutoModelForTokenClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(7, 20), st.integers(0, 30))
def test_windows_hold_every_word_and_predict_each_once(pieces: list[int], room: int, stride: int):
    windows = cut(pieces, room, stride)
    assert [word for _, _, first, behind in windows for word in range(first, behind)] == list(range(len(pieces)))
    for start, end, first, behind in windows:
        assert start <= first < behind <= end and sum(pieces[start:end]) <= room
    for (start, end, _, _), (then, behind, _, _) in pairwise(windows):
        assert start < then <= end < behind and sum(pieces[then:end]) <= stride
        # As much is shared as may be.
        assert then == start + 1 or sum(pieces[then - 1 : end]) > stride or sum(pieces[then - 1 : end + 1]) > room


@pytest.mark.parametrize("length", [8, 16, 512])
def test_each_word_is_predicted_at_its_first_piece(length: int):
    rows = random_rows(40, 30)
    features = encode_words(rows, WORDS, length)
    assert features["index"][:] == list(range(len(features))) and max(features["length"]) <= length
    assert (len(features) == len(rows)) is (length == 512)
    seen: list[dict[int, int]] = [{} for _ in range(len(rows))]
    for feature in features:
        assert len(feature["words"]) == len(feature["labels"]) == len(feature["input_ids"]) == feature["length"]
        text = rows[feature["row"]]["words"]
        for place, (word, label) in enumerate(zip(feature["words"], feature["labels"], strict=True)):
            assert (label == UNLABELLED) is (word < 0)
            if word >= 0:
                assert word not in seen[feature["row"]]
                seen[feature["row"]][word] = label
                first = WORDS.convert_ids_to_tokens(feature["input_ids"][place])
                assert text[word].startswith(first) and not first.startswith("##")
    assert [[found[word] for word in sorted(found)] for found in seen] == rows["label"][:]
    assert features["row"][:] == sorted(features["row"])


def test_a_word_of_which_nothing_is_left_has_no_prediction_and_is_scored_as_o():
    words = [["\u200b", "film", "", "good", "\x00"], ["\x00", ""]]
    rows = Dataset.from_dict(
        {"index": [0, 1], "words": words, "label": numbers([["O", "B-thing", "O", "O", "O"], ["O"] * 2])}
    )
    features = KIND.encode(rows, WORDS, 16)
    assert [[word for word in row if word >= 0] for row in features["words"]] == [[1, 3], []]
    logits = [np.eye(5)[[NAMES_OF_TAGS.index("B-view")] * length] for length in features["length"]]
    answers = KIND.decode({"logits": logits}, features, rows)
    assert [row.tolist() for row in answers] == [[-1, 3, -1, 3, -1], [-1, -1]]
    assert KIND.score(answers, rows, NAMES_OF_TAGS, ["accuracy"]) == {"accuracy": 5 / 7}
    assert KIND.score(answers, rows, ["x", "y", "z", "v", "w"], ["accuracy"]) == {"accuracy": 0.0}


def byte_level(*, prefix: bool) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", "<pad>", *letters, "\u0120f", "il", "ilm"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("\u0120", "f"), ("i", "l"), ("il", "m")]
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    words.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=prefix)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("prefix", [True, False])
def test_byte_level_pieces_of_words_are_those_of_the_text(prefix: bool):
    words = byte_level(prefix=prefix)
    rows = Dataset.from_dict({"index": [0], "words": [["film", "don't", "film", ""]]})
    [feature] = encode_words(rows, words, 64)
    assert feature["input_ids"] == words(" film don't film" if not prefix else "film don't film")["input_ids"]
    assert [word for word in feature["words"] if word >= 0] == [0, 1, 2]
    assert "labels" not in feature


@pytest.mark.parametrize("name", ["TokenizersBackend", "RobertaTokenizer"])
def test_a_saved_tokenizer_cuts_words_as_they_were_learnt(name: str, tmp_path: Path):
    byte_level(prefix=False).save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "tokenizer_config.json").read_text())
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))
    old = load_tokenizer(tmp_path / "old")
    rows = Dataset.from_dict({"index": [0], "words": [["film", "don't", "film"]]})
    [learnt] = encode_words(rows, old, 64)
    new = KIND.processor(old)
    save_processor(new, tmp_path, tiny("bert").config)
    for one in (new, load_tokenizer(tmp_path)):
        assert one(rows[0]["words"], is_split_into_words=True)["input_ids"] == learnt["input_ids"]
        assert encode_words(rows, one, 64)["input_ids"][0] == learnt["input_ids"]
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(rows[0]["words"], is_pretokenized=True)
    assert found.ids == learnt["input_ids"]
    assert KIND.processor(WORDS) is WORDS


def test_a_slow_tokenizer_is_refused(tmp_path: Path):
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, TAGS))

    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="Slow does not tell which pieces are of which word"):
        KIND.check(task, Slow(), 32)


# What is learnt


def test_the_table_has_a_row_a_word_that_weighs_as_its_window_says():
    rows = random_rows(5, 12)
    features = KIND.encode(rows, WORDS, 12)
    batch = KIND.collator(WORDS)([features[i] for i in range(len(features))])
    logits = torch.randn(*batch["input_ids"].shape, 3)
    [table] = KIND.predictions(TokenClassifierOutput(logits=logits), batch)
    assert len(table.logits) == sum(map(len, rows["words"])) and float(table.weights.sum()) == pytest.approx(1.0)
    loss = KIND.distribution.nll(table.logits, table.target, table.weights)
    each = [
        torch.nn.functional.cross_entropy(logits[i], batch["labels"][i], ignore_index=UNLABELLED)
        for i in range(len(features))
    ]
    assert torch.allclose(loss, torch.stack(each).mean(), atol=1e-6)


def test_a_trained_taggers_order_becomes_the_tasks(tmp_path: Path):
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, TAGS))
    model = tagger("bert", labels=["I-View", "O", "b-thing", "B_VIEW", "i thing"])
    before = evaluate_model(model, WORDS, task, max_length=32)
    order = [class_names_of(model.config)[i] for i in range(5)]
    inputs = {name: torch.tensor([values]) for name, values in WORDS("the film").items()}
    with torch.no_grad():
        own = model(**inputs).logits
        KIND.align(model, task.label_names, Owner())
        moved = model(**inputs).logits
    assert class_names_of(model.config) == list(task.label_names) == ["B-thing", "B-view", "I-thing", "I-view", "O"]
    places = [order.index(name) for name in ("b-thing", "B_VIEW", "i thing", "I-View", "O")]
    assert torch.allclose(moved, own[..., places], atol=1e-6)
    assert evaluate_model(model, WORDS, task, max_length=32) != before
    with pytest.raises(InputError, match="are not the task's labels"):
        KIND.align(tagger("bert", labels=["a", "b", "c", "d", "e"]), task.label_names, Owner())


@pytest.mark.parametrize("family", NAMES)
def test_every_family_is_scored_alike_whatever_the_batch(family: str, tmp_path: Path):
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, TAGS), labels=NAMES_OF_TAGS)
    model = tagger(family)
    save_model(model, tmp_path / "model", WORDS)
    loaded = load_model(tmp_path / "model")
    assert kind_of_model(loaded, "model", "MODEL") is KIND
    rows = task.report["validation"]
    alone = KIND.answers(loaded, rows, WORDS, max_length=32, ask=predict, batch_size=1)
    many = KIND.answers(model, rows, WORDS, max_length=32, ask=predict, batch_size=12)
    assert [row.tolist() for row in alone] == [row.tolist() for row in many]
    assert len({tag for row in alone for tag in row.tolist()}) > 1


def test_answers_in_windows_keep_their_words(tmp_path: Path):
    rows = random_rows(6, 40)
    model = tagger("bert", labels=["x", "y", "z"])
    answers = KIND.answers(model, rows, WORDS, max_length=16, ask=predict)
    features = KIND.encode(rows, WORDS, 16)
    assert len(features) > len(rows) and [len(row) for row in answers] == list(map(len, rows["words"]))
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            best = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].argmax(-1)
        for place, word in enumerate(feature["words"]):
            assert word < 0 or answers[feature["row"]][word] == best[place]


# What is answered


def test_replies_have_the_words_tags_and_spans_with_their_places():
    text = "A film, don't  watch it."
    rows = KIND.read_inputs({"words": Column([[text, ["New York", "x"]]])}, TagFields(), "here", [])
    assert rows["words"].to_pylist()[0] == ["A", "film", ",", "don", "'", "t", "watch", "it", "."]
    model = tagger("bert")
    first, second = KIND.replies(model, dataset_of(rows), WORDS, max_length=32, ask=predict)
    assert [len(reply["tags"]) for reply in (first, second)] == [9, 2]
    spans = [span for reply in (first, second) for span in reply["spans"]]
    assert spans
    for reply, whole in ((first, text), (second, "New York x")):
        for span in reply["spans"]:
            assert whole[span["start"] : span["end"]] == span["text"]
            assert span["text"].split()[0] in reply["words"][span["words"][0]]
            assert {tag[2:] for tag in reply["tags"][slice(*span["words"])]} == {span["type"]}
        assert "[" in KIND.show(reply) or KIND.show(reply) == "no spans"
    options: dict[str, Any] = {"max_length": 32, "ask": predict}
    [plain] = KIND.replies(tagger("bert", labels=["NOUN", "VERB"]), dataset_of(rows).select([1]), WORDS, **options)
    assert set(plain) == {"words", "tags"} and KIND.show(plain) == f"New York/{plain['tags'][0]} x/{plain['tags'][1]}"


# Runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, some of them longer than a window, and a tagger that has learnt nothing."""
    folder = tmp_path_factory.mktemp("tags")
    draw = random.Random(0)
    known = {"film": "B-thing", "plot": "B-thing", "good": "B-view", "very": "B-view", "was": "O", "the": "O", "a": "O"}
    texts = [[draw.choice(list(known)) for _ in range(draw.randint(1, 24))] for _ in range(60)]
    lines(folder / "rows.jsonl", texts, [[known[word] for word in row] for row in texts])
    return folder


def recipe(world: Path, name: str, **changes: Any) -> Path:
    task = {"name": "own", "type": KIND.name, "data": "rows.jsonl", "max_length": 16, "validation_fraction": 0.3}
    return write_recipe(world / f"{name}.toml", tiny_recipe("task", name=name, task=task, **changes))


WAYS: dict[str, dict[str, Any]] = {
    "kd": {},
    "makd": {"method": "makd"},
    "hs": {"method": "hs"},
    "minilmv2": {"method": "minilmv2"},
    "tinybert": {"method": "tinybert"},
    "opdf": {"overparam": {"length": 2}},
    "low-rank": {"student": {"form": "low-rank", "layers": None, "budget": 0.5}},
}
SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way not in ("kd", "makd")]


@pytest.mark.parametrize("way", ["kd", "makd", *SLOW])
def test_a_run_is_the_same_whatever_is_cached_of_the_teacher(way: str, world: Path):
    """Rows are cut into windows, so there are more features than rows."""
    results = []
    for cache in (True, False, "all"):
        changes = {**WAYS[way], "teacher": {"cache": cache}}
        result = run_recipe(recipe(world, f"{way}-{cache}".lower(), **changes), force=True)
        results.append(result["student"]["metrics"]["validation"])
        assert result["task"]["kind"] == KIND.name and result["student_head"] == "token-classification"
    assert results[1] == results[0] and results[2] == results[0]
    assert set(results[0]) == {"f1", "accuracy", "f1/thing", "f1/view"}


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(world: Path, monkeypatch: pytest.MonkeyPatch):
    loop = {"max_steps": 6, "eval_every": 2}
    whole = run_recipe(recipe(world, "whole", train=loop), force=True)
    path = recipe(world, "halved", train=loop)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        run_recipe(path)
    assert run_recipe(path, resume=True)["student"]["metrics"] == whole["student"]["metrics"]


@pytest.mark.slow
def test_a_run_is_exported_evaluated_and_asked(world: Path, capsys: pytest.CaptureFixture[str]):
    run_recipe(
        recipe(world, "served", export={"onnx": True, "runs": 1, "batch_sizes": [1], "sequence_lengths": [8]}),
        force=True,
    )
    place = str(world / "runs" / "served")

    def call(*arguments: str) -> Any:
        code = run([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()] if arguments[0] == "predict" else json.loads(out)

    scores = call("eval", place)
    graph = call("eval", f"{place}/onnx", "--data", str(world / "rows.jsonl"))
    plain = call("eval", f"{place}/student", "--data", str(world / "rows.jsonl"), "--text", "tokens")
    assert graph["metrics"] == plain["metrics"] and scores["primary"] == "f1"
    [reply] = call("predict", f"{place}/onnx", "the film was good.")
    assert reply == call("predict", place, "the film was good.")[0]
    assert reply["words"] == ["the", "film", "was", "good", "."] and len(reply["tags"]) == 5


@pytest.mark.slow
def test_a_general_student_is_fine_tuned_on_tags(world: Path):
    (world / "text.txt").write_text("\n\n".join(["the film was good", "a very good plot", "the plot was a film"] * 20))
    path = write_recipe(
        world / "general.toml",
        tiny_recipe(
            "task",
            method="minilmv2",
            task={"name": "text", "type": "text", "data": "text.txt", "max_length": 16},
            finetune=[
                {
                    "task": {"name": "own", "type": KIND.name, "data": "rows.jsonl", "max_length": 16},
                    "max_steps": 150,
                    "learning_rate": 3e-3,
                    "against": ["scratch"],
                }
            ],
        ),
    )
    result = run_recipe(path, force=True)
    [scores] = result["finetune"]
    # Each word has one tag.
    assert scores["metric"] == "f1" and scores["mean"]["student"] > 0.9
    assert set(scores["metrics"]["student"][0]["validation"]) == {"f1", "accuracy", "f1/thing", "f1/view"}


def test_a_students_score_is_what_transformers_and_seqeval_make_of_its_folder(world: Path):
    """The teacher is a tagger of another program: its tags have another order, and other signs in their names."""
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    (world / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    teacher = tagger("bert", labels=["B_view", "o", "B_thing"], seed=3)
    save_model(teacher, world / "foreign", WORDS)
    task = {"name": "own", "type": KIND.name, "train": "rows.jsonl", "validation": "held.jsonl", "max_length": 64}
    changes: dict[str, Any] = {"teacher": {"model": "foreign", "finetune": False}, "train": {"max_steps": 20}}
    path = write_recipe(world / "folder.toml", tiny_recipe("task", "teacher", name="folder", task=task, **changes))
    result = run_recipe(path, force=True)
    folder = world / "runs" / "folder" / "student"
    for model, side in (
        (AutoModelForTokenClassification.from_pretrained(folder).eval(), "student"),
        (teacher.eval(), "teacher"),
    ):
        answers = []
        for row in rows[:20]:
            words = AutoTokenizer.from_pretrained(folder)(row["tokens"], is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                best = model(**words).logits[0].argmax(-1).tolist()
            places = words.word_ids()
            firsts = [place for place, word in enumerate(places) if word is not None and word != places[place - 1]]
            answers.append([model.config.id2label[best[place]] for place in firsts])
        spelled = [["O" if tag == "o" else tag.replace("_", "-") for tag in row] for row in answers]
        truth = [row["tags"] for row in rows[:20]]
        found = result[side]["metrics"]["validation"]
        assert found["f1"] == pytest.approx(f1_score(truth, spelled), abs=1e-12) and found["f1"] > 0
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, spelled), abs=1e-12)


def test_parts_may_have_other_types_of_spans(world: Path):
    files = {}
    for name, kind in (("one", "thing"), ("two", "place")):
        tags = [[tag.replace("thing", kind) for tag in row] for row in TAGS]
        files[name] = lines(world / f"{name}.jsonl", TEXTS, tags)
    parts = [{"name": name, "train": file, "validation": file} for name, file in files.items()]
    task = {"name": "own", "type": KIND.name, "max_length": 16, "part": parts}
    names = ["B-place", "B-thing", "B-view", "I-place", "I-thing", "I-view", "O"]
    path = write_recipe(world / "parts.toml", tiny_recipe("task", name="parts", task={**task, "labels": names}))
    student = run_recipe(path, force=True)["student"]
    assert set(student["metrics"]["one"]) == {"f1", "accuracy", "f1/thing", "f1/view"}
    assert set(student["metrics"]["two"]) == {"f1", "accuracy", "f1/place", "f1/view"}
    assert set(student["mean"]) == {"f1", "accuracy", "f1/view"}


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_every_family_is_exported_with_the_logits_of_each_token(family: str, tmp_path: Path):
    task = load(tmp_path, lines(tmp_path / "a.jsonl", TEXTS, TAGS), labels=NAMES_OF_TAGS)
    model = tagger(family)
    result = export_model(model, WORDS, tmp_path / "onnx", task=task, max_length=32, latency=False)
    assert result.difference < 1e-4 and result.inputs == "12 examples of own"
    graph = OnnxModel(tmp_path / "onnx")
    assert evaluate_model(graph, WORDS, task, max_length=32) == evaluate_model(model, WORDS, task, max_length=32)
    # With a head of its own, of other tags.
    fresh = with_new_head(model, KIND.head, KIND.configure(["x", "y", "z"]))
    ids = torch.arange(5, 17)[None]
    assert fresh(ids).logits.shape == (1, 12, 3) and kind_of_model(fresh, "fresh", "MODEL") is KIND
