"""Tasks of several sets: how their rows are joined, mixed and scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import concatenate_datasets
from families import tokenizer
from tiny_recipes import run_recipe, tiny_recipe, write_recipe

from kdcli.errors import InputError
from kdcli.evaluation.score import scorer
from kdcli.recipe.schema import EvaluateSection, TaskSection
from kdcli.tasks.base import Task
from kdcli.tasks.load import load_task

WORDS = tokenizer()
NOT_OF_TEXT = ("train_samples", "validation_samples")


def rows(path: Path, labels: list, text: str = "text", label: str = "label") -> str:
    """Write rows as JSON lines, their text made of the file's name, and return the file's name."""
    path.write_text(
        "".join(json.dumps({text: f"{path.stem} {i}", label: value}) + "\n" for i, value in enumerate(labels))
    )
    return path.name


def load(base: Path, *parts: dict[str, Any], protocol: str = "dev", limit: int | None = None, **fields: Any) -> Task:
    document = {"name": "mood", "text": "text", "part": list(parts), **fields}
    evaluate = EvaluateSection(protocol=protocol)  # type: ignore[arg-type]
    return load_task(TaskSection.model_validate(document), evaluate, base=base, limit=limit)


def labels_of(task: Task) -> dict[str, str]:
    return {text: task.label_names[label] for text, label in zip(task.train["text"], task.train["label"], strict=True)}


def sets_of(base: Path, **counts: int) -> list[dict[str, Any]]:
    """Return a part for each name, with so many training rows and half as many validation rows."""
    made = []
    for name, count in counts.items():
        rows(base / f"{name}.jsonl", ["yes", "no"] * (count // 2))
        rows(base / f"{name}-dev.jsonl", ["yes", "no"] * (count // 4))
        made.append({"name": name, "train": f"{name}.jsonl", "validation": f"{name}-dev.jsonl"})
    return made


def test_labels_are_those_of_all_parts_in_one_order(tmp_path: Path):
    rows(tmp_path / "de.jsonl", ["c", "a"] * 10)
    rows(tmp_path / "en.jsonl", ["b", "c"] * 10)
    rows(tmp_path / "fr.jsonl", ["b"] * 20)
    parts = [{"name": name, "data": f"{name}.jsonl"} for name in ("de", "en", "fr")]
    task = load(tmp_path, *parts)
    assert task.label_names == ("a", "b", "c")
    found = labels_of(task)
    assert len(found) == 54
    for text, label in found.items():
        name, number = text.split()
        assert label == {"de": "ca", "en": "bc", "fr": "bb"}[name][int(number) % 2]
    # Numbers are ordered as numbers, over all parts.
    rows(tmp_path / "de.jsonl", [10, 9] * 10)
    rows(tmp_path / "en.jsonl", [100, 9] * 10)
    assert load(tmp_path, *parts[:2]).label_names == ("9", "10", "100")


def test_labels_that_a_part_has_no_training_rows_of_are_told(tmp_path: Path):
    rows(tmp_path / "de.jsonl", ["neg", "pos"] * 10)
    rows(tmp_path / "en.jsonl", ["pos", "good"] * 10)
    parts = [{"name": name, "data": f"{name}.jsonl"} for name in ("de", "en")]
    assert [note for note in load(tmp_path, *parts).notes if "no training rows" in note] == [
        "part de has no training rows of 1 class: good",
        "part en has no training rows of 1 class: neg",
    ]
    task = load(tmp_path, *parts, labels=["neg", "pos", "good", "bad"])
    assert [note for note in task.notes if "no training rows" in note] == [
        "no training rows of 1 class: bad",
        "part de has no training rows of 1 class: good",
        "part en has no training rows of 1 class: neg",
    ]
    rows(tmp_path / "en.jsonl", ["neg", "pos"] * 10)
    assert not any("no training rows" in note for note in load(tmp_path, *parts).notes)


def test_parts_that_share_no_label_need_the_labels_of_the_task(tmp_path: Path):
    rows(tmp_path / "de.jsonl", ["neg", "pos"] * 10)
    rows(tmp_path / "hi.jsonl", ["bad", "good"] * 10)
    rows(tmp_path / "en.jsonl", ["pos", "bad"] * 10)
    parts = [{"name": name, "data": f"{name}.jsonl"} for name in ("de", "hi", "en")]
    with pytest.raises(InputError, match="part hi has the labels bad, good, and part de has neg, pos: they share none"):
        load(tmp_path, *parts[:2])
    every = ("neg", "pos", "bad", "good")
    assert load(tmp_path, *parts[:2], labels=list(every)).label_names == every
    # One of them has labels of both.
    assert load(tmp_path, *parts).label_names == tuple(sorted(every))


def test_each_part_may_have_other_columns(tmp_path: Path):
    rows(tmp_path / "de.jsonl", ["yes", "no"] * 10)
    rows(tmp_path / "en.jsonl", ["no", "yes"] * 10, "tweet", "mood")
    task = load(
        tmp_path,
        {"name": "de", "data": "de.jsonl"},
        {"name": "en", "data": "en.jsonl", "text": "tweet", "label": "mood"},
    )
    assert {text.split()[0] for text in task.train["text"]} == {"de", "en"}
    assert labels_of(task)["en 2"] == "no"


def test_samples_and_held_out_rows_keep_the_shares(tmp_path: Path):
    parts = sets_of(tmp_path, de=40, en=400)
    whole = load(tmp_path, *parts)
    assert np.bincount(whole.train["part"]).tolist() == [40, 400]
    assert {name: len(each) for name, each in whole.report.items()} == {"de": 20, "en": 200}
    assert np.bincount(whole.selection["part"]).tolist() == [20, 200]
    few = load(tmp_path, *parts, train_samples=110, validation_samples=16)
    # Of the training rows so many in all; of the validation rows so many of each set that is scored.
    assert np.bincount(few.train["part"]).tolist() == [10, 100]
    assert {name: len(each) for name, each in few.report.items()} == {"de": 16, "en": 16}
    assert {name: len(each) for name, each in load(tmp_path, *parts, limit=12).report.items()} == {"de": 12, "en": 12}
    held = load(tmp_path, *({"name": p["name"], "data": p["train"]} for p in parts), validation_fraction=0.25)
    assert np.bincount(held.train["part"]).tolist() == [30, 300]
    assert {name: len(each) for name, each in held.report.items()} == {"de": 10, "en": 100}


def test_half_of_each_part_chooses_under_half_dev(tmp_path: Path):
    task = load(tmp_path, *sets_of(tmp_path, de=40, en=80), protocol="half-dev")
    assert np.bincount(task.selection["part"]).tolist() == [10, 20]
    assert {name: list(each["text"]) for name, each in task.report.items()} == {
        "de": [f"de-dev {i}" for i in range(10, 20)],
        "en": [f"en-dev {i}" for i in range(20, 40)],
    }


def test_test_sets_are_reported_with_their_part(tmp_path: Path):
    de, en = sets_of(tmp_path, de=40, en=40)
    rows(tmp_path / "de-test.jsonl", ["yes", "no"] * 15)
    task = load(tmp_path, {**de, "test": "de-test.jsonl"}, en)
    assert {name: len(each) for name, each in task.report.items()} == {"de test": 30, "en": 20}
    assert any(note.startswith("no test set of en:") for note in task.notes)


def test_one_set_cut_in_two_is_that_set(tmp_path: Path):
    """Joined parts without a temperature are trained on as one file with all their rows is."""
    values = ["yes", "no", "no", "yes"] * 12
    lines = [json.dumps({"text": f"text {i}", "label": value}) + "\n" for i, value in enumerate(values)]
    for name, part in {"all": lines, "first": lines[:16], "rest": lines[16:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    own = {"name": "mood", "text": "text", "train_samples": None, "validation_samples": None}
    one = {**own, "train": "all.jsonl", "validation": "all.jsonl"}
    two = {**own, "part": [{"name": n, "train": f"{n}.jsonl", "validation": f"{n}.jsonl"} for n in ("first", "rest")]}
    hashes = []
    for name, task in {"one": one, "two": two, "three": {**two, "mixing_temperature": 3.0}}.items():
        done = run_recipe(write_recipe(tmp_path / f"{name}.toml", tiny_recipe(task={**task})))
        hashes.append((done["hashes"]["teacher"], done["hashes"]["student"]))
    assert hashes[0] == hashes[1]
    # Teacher and student are trained on the mixture.
    assert all(one != other for one, other in zip(hashes[0], hashes[2], strict=True))


def test_the_mean_over_parts_chooses_the_checkpoint(tmp_path: Path):
    task = load(tmp_path, *sets_of(tmp_path, de=16, en=160))
    features = task.kind.prepare(task, WORDS, 16).selection
    truth = np.array(task.selection["label"])
    part = np.array(task.selection["part"])
    # All of the small part is right, nothing of the large one.
    answers = np.where(part == 0, truth, 1 - truth)
    scores = scorer(task, features)({"logits": np.eye(2)[answers]})
    assert scores["accuracy"] == 0.5


def test_plain_text_is_packed_part_by_part(tmp_path: Path):
    for name, words in {"de": "fish fish fish", "en": "night night night"}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join([words] * 30))
    section = TaskSection.model_validate(
        {
            "name": "words",
            "type": "text",
            "part": [{"name": "de", "data": "de.txt"}, {"name": "en", "data": "en.txt"}],
        }
    )
    task = load_task(section, EvaluateSection(), base=tmp_path)
    encoded = task.kind.prepare(task, WORDS, 16)
    for features, rows in ((encoded.train, task.train), (encoded.selection, task.selection)):
        assert len(set(features["index"])) == len(features)
        counts = [
            len(task.kind.encode(rows.filter(lambda row, k=k: row["part"] == k), WORDS, 16))  # type: ignore[misc]
            for k in (0, 1)
        ]
        assert np.bincount(features["part"]).tolist() == counts
    texts = [WORDS.decode(ids) for ids in encoded.train["input_ids"]]
    assert {("fish" in text, "night" in text) for text in texts} == {(True, False), (False, True)}


def test_a_general_student_has_a_loss_for_each_corpus(tmp_path: Path):
    for name, word in {"de": "fish", "en": "night"}.items():
        (tmp_path / f"{name}.txt").write_text("\n\n".join([f"{word} a good {word}"] * 60))
    corpora = [{"name": name, "data": f"{name}.txt"} for name in ("de", "en")]
    mood = {"name": "mood", "text": "text", "part": sets_of(tmp_path, first=40, second=40)}
    recipe = tiny_recipe(
        method={"name": "minilmv2", "relation_heads": 2},
        task={"name": "words", "type": "text", "max_length": 16, "part": corpora, **dict.fromkeys(NOT_OF_TEXT)},
        finetune=[{"task": mood, "max_steps": 1}],
    )
    done = run_recipe(write_recipe(tmp_path / "words.toml", recipe))
    loss = done["loss"]
    for moment, place in (("before", 0), ("after", 1)):
        assert loss[moment] == pytest.approx(np.mean([loss["parts"][name][place] for name in ("de", "en")]))
    card = (Path(done["paths"]["student"]) / "README.md").read_text()
    assert f"the mean of de {loss['parts']['de'][0]:.4f}, {loss['parts']['de'][1]:.4f}; en" in card
    [tuned] = done["finetune"]
    assert set(tuned["metrics"]["student"][0]) == {"first", "second"}
    sets = tuned["metrics"]["student"][0].values()
    assert tuned["scores"]["student"] == pytest.approx([np.mean([each["accuracy"] for each in sets])])


def spans(path: Path, count: int) -> None:
    """Write questions on contexts of several windows, and those of other lengths in each file."""
    lines = []
    for number in range(count):
        context = " ".join(["fish night"] * (4 + number % 7))
        answers = {"text": [context[: 11 * (2 + number % 3) - 1]], "answer_start": [0]}
        lines.append({"question": "who is it?", "context": context, "answers": answers})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def tags(path: Path, count: int) -> None:
    """Write rows of words of several windows, with a tag each."""
    lines = []
    for number in range(count):
        words = [["fish", "night", "a", "good"][(number + place) % 4] for place in range(12 + number % 9)]
        lines.append({"tokens": words, "tags": ["B-X" if word == "fish" else "O" for word in words]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("type_", "write"), [("question-answering", spans), ("token-classification", tags)])
def test_windows_of_parts_are_scored_as_if_each_part_were_alone(type_: str, write: Any, tmp_path: Path):
    for name, count in {"de": 30, "en": 50}.items():
        write(tmp_path / f"{name}.jsonl", count)
    section = TaskSection.model_validate(
        {
            "name": "mine",
            "type": type_,
            "max_length": 16,
            "part": [{"name": name, "data": f"{name}.jsonl"} for name in ("de", "en")],
            "validation_fraction": 0.4,
        }
    )
    task = load_task(section, EvaluateSection(), base=tmp_path)
    features = task.kind.prepare(task, WORDS, 16).selection
    assert len(features) > len(task.selection)
    assert len(set(features["index"])) == len(features)
    # Rows are numbered over all parts.
    parts = np.array(task.selection["part"])
    assert (parts[features["row"]] == features["part"]).all()
    random = np.random.default_rng(0)
    outputs = {
        name: [random.normal(size=shape) for shape in shapes]
        for name, shapes in {
            name: [(length,) if type_ == "question-answering" else (length, 2) for length in features["length"]]
            for name in task.kind.head.outputs
        }.items()
    }
    longest = max(features["length"])
    padded = {
        name: np.stack([np.pad(row, [(0, longest - len(row)), *[(0, 0)] * (row.ndim - 1)]) for row in rows])
        for name, rows in outputs.items()
    }
    expected = []
    for number in (0, 1):
        own = task.selection.select(np.flatnonzero(parts == number))
        places = np.flatnonzero(np.array(features["part"]) == number)
        alone = task.kind.encode(own, WORDS, 16)
        assert len(alone) == len(places)
        answers = task.kind.decode({name: [rows[i] for i in places] for name, rows in outputs.items()}, alone, own)
        expected.append(task.kind.score(answers, own, task.label_names, task.metrics)[task.primary])
    assert scorer(task, features)(padded)[task.primary] == pytest.approx(np.mean(expected))
    assert expected[0] != expected[1]


def test_embeddings_of_each_part_are_scored_on_pairs_of_its_own(tmp_path: Path):
    made = []
    for name, count in {"de": 40, "en": 80}.items():
        rows(tmp_path / f"{name}.jsonl", [0] * count)
        pairs = [{"sentence1": f"a {i}", "sentence2": f"{name} {i}", "score": i} for i in range(count // 2)]
        (tmp_path / f"{name}-pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        made.append({"name": name, "data": f"{name}.jsonl", "pairs": f"{name}-pairs.jsonl"})
    task = load(tmp_path, *made, type="sentence-embedding", mixing_temperature=2.0)
    assert {name: len(each) for name, each in task.report.items()} == {"de test": 20, "en test": 40}
    assert np.bincount(task.train["part"]).tolist() == [36, 72]
    assert set(task.report["en test"]["text_pair"]) == {f"en {i}" for i in range(40)}
    features = task.kind.prepare(task, WORDS, 16).train
    assert np.bincount(features["part"]).tolist() == [36, 72]
    made[1].pop("pairs")
    with pytest.raises(InputError, match="is not scored as the first part is") as error:
        load(tmp_path, *made, type="sentence-embedding")
    assert error.value.where == "task.part[1]"


def test_copies_of_rows_stay_with_their_part(tmp_path: Path):
    task = load(tmp_path, *sets_of(tmp_path, de=8, en=12))
    # As copies come: behind all rows, with further indices.
    copies = task.train.map(lambda row: {"index": row["index"] + 20, "text": f"{row['text']} again"})
    features = task.kind.feed(concatenate_datasets([task.train, copies]), WORDS, 16)
    assert sorted(features["index"]) == list(range(40))
    parts = dict(zip(features["index"], features["part"], strict=True))
    assert parts == {index: int(index % 20 >= 8) for index in range(40)}


def test_a_known_set_may_be_a_part(tmp_path: Path):
    rows(tmp_path / "own.jsonl", ["negative", "positive"] * 10)
    # The columns in [task] are those of rows of one's own.
    task = load(tmp_path, {"name": "own", "data": "own.jsonl"}, {"name": "reviews"}, train_samples=100)
    assert task.label_names == ("negative", "positive")
    assert list(task.report) == ["own", "reviews"]
    assert set(task.train["part"]) == {0, 1}
