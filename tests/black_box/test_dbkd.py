"""DBKD: asking black boxes, remembering what they said, and learning from it alone."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from families import tiny, tokenizer
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipes import run_recipe, tiny_recipe, write_recipe
from torch.nn import functional

from kdcli.black_box.answers import Memory, ask, recorded
from kdcli.black_box.ask import Command, LocalModel, PythonCallable
from kdcli.black_box.estimate import logits_from_decisions
from kdcli.black_box.noise import Noise
from kdcli.cli.methods import tasks_of
from kdcli.distill.student import make_distiller
from kdcli.errors import InputError
from kdcli.methods import registry
from kdcli.methods.base import Context
from kdcli.methods.dbkd import METHOD, DBKDOptions
from kdcli.models.save import save_model
from kdcli.models.shape import shape_of
from kdcli.tasks import registry as kinds
from kdcli.tasks.base import Task
from kdcli.tasks.encode import Collator, encode
from kdcli.tasks.labels import class_of
from kdcli.tasks.predict import predict
from kdcli.training.schemes.base import Setting
from kdcli.training.settings import LoopSettings
from kdcli.training.trainer import fit

WORDS = tokenizer()
NAMES = ("negative", "positive", "neither")
TEXTS = [
    "the film was dull and the plot seemed weak",
    "a witty script , although it rained all day",
    "my brother came along",
    "superb",
    "the tickets were at the door and the poster is blue",
]
PAIRS = ["it was a bore", "the script is clever", "he came with me", "great stuff", "it is blue"]
CLASSES = {"negative": 0, "positive": 1, "neither": 2}

SCRIPT = '''
def by_length(texts):
    """A sentence's number of letters decides."""
    return [len(text) % 3 for text in texts]
'''


KIND = kinds.get("classification")


def task_of(*, pair: bool = False, names: tuple[str, ...] = NAMES, texts: list[str] = TEXTS) -> Task:
    columns: dict[str, Any] = {"index": list(range(len(texts))), "text": list(texts)}
    if pair:
        columns["text_pair"] = PAIRS
    columns["label"] = [i % len(names) for i in range(len(texts))]
    rows = Dataset.from_dict(columns)
    return Task("opinions", kinds.get("classification"), None, names, ("accuracy",), rows, rows, {"dev": rows})


def loop(**changes: Any) -> LoopSettings:
    settings = LoopSettings(
        epochs=1.0,
        max_steps=6,
        batch_size=4,
        gradient_accumulation=1,
        learning_rate=1e-3,
        scheduler="linear",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        precision="fp32",
        device="cpu",
        group_by_length=True,
        eval_every=None,
        patience=None,
        select="last",
        log_every=1,
        workers=0,
        seed=0,
        metric="accuracy",
    )
    return dataclasses.replace(settings, **changes)


def setting_of(task: Task, base: Path, *, teacher: Any = None, cache: bool = True) -> Setting:
    student = tiny("bert", layers=1, labels=len(task.label_names), seed=1)
    rows = encode(task.train, WORDS, 64)
    return Setting(student, teacher, WORDS, task, rows, Collator(WORDS), loop(), base, cache, Console(quiet=True))


def context(labels: int = 3) -> Context:
    shape = shape_of(tiny("bert").config)
    return Context(shape, dataclasses.replace(shape, layers=1), "depth", kinds.get("classification"), [(1, 1)])


def questions(texts: list[str], pairs: list[str] | None = None) -> dict[str, list[str]]:
    return {"text": texts, **({"text_pair": pairs} if pairs is not None else {})}


class Oracle:
    """Decides by the number of letters and remembers what it was asked; gives up when its patience ends."""

    def __init__(self, name: str = "oracle", patience: int = 10**9) -> None:
        self.identity = {"oracle": name}
        self.asked: list[str] = []
        self.patience = patience

    def decide(self, texts: Mapping[str, list[str]]) -> list[int]:
        texts, pairs = texts["text"], texts.get("text_pair")
        if len(self.asked) + len(texts) > self.patience:
            raise KeyboardInterrupt
        self.asked += texts if pairs is None else [f"{a}|{b}" for a, b in zip(texts, pairs, strict=True)]
        return [len(text) % 3 for text in texts]


def counts_of(box: Any, task: Task, **extra: Any) -> np.ndarray:
    return ask(
        box,
        task.train,
        extra.pop("noise", Noise()),
        columns=task.kind.columns_of_text(task.train),
        copies=extra.pop("copies", 4),
        names=task.label_names,
        **extra,
    )


# --- what an answer means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "names", "expected"),
    [
        ("positive", NAMES, 1),
        ("POSITIVE ", NAMES, 1),
        (2, NAMES, 2),
        ("2", NAMES, 2),
        (np.int64(1), NAMES, 1),
        (torch.tensor(1), NAMES, 1),
        (1.0, NAMES, 1),
        (3, NAMES, None),
        (-1, NAMES, None),
        (0.5, NAMES, None),
        ("good", NAMES, None),
        ("", NAMES, None),
        (None, NAMES, None),
        (5, ("1", "3", "5"), 2),
        (1, ("1", "3", "5"), 0),
        (0, ("1", "3", "5"), 0),
        (-1, ("-1", "1"), 0),
        (-1, ("0", "1"), None),
        ("-", ("+", "-"), 1),
        ("Not_Entailment", ("entailment", "not_entailment"), 1),
        (True, ("False", "True"), 1),
    ],
)
def test_an_answer_is_a_name_or_else_a_number(answer: Any, names: tuple[str, ...], expected: int | None):
    assert class_of(answer, names) == expected


# --- asking and remembering -----------------------------------------------------------------------------------------


def test_every_example_is_asked_once_a_copy_and_counted():
    task, oracle, noise = task_of(), Oracle(), Noise(seed=5)
    counts = counts_of(oracle, task, noise=noise, copies=7)
    expected = np.zeros((5, 3))
    for i, text in enumerate(TEXTS):
        for number in range(7):
            expected[i, len(noise.copy(text, i, number)) % 3] += 1
    assert counts.tolist() == expected.tolist()
    assert len(oracle.asked) == 35
    assert [oracle.asked[7 * i] for i in range(5)] == TEXTS


def test_both_sentences_of_a_pair_are_noised_each_by_itself():
    oracle, noise = Oracle(), Noise(seed=1)
    counts_of(oracle, task_of(pair=True), noise=noise, copies=3)
    first, second = oracle.asked[4].split("|")
    assert (first, second) == (noise.copy(TEXTS[1], 1, 1), noise.copy(PAIRS[1], 1, 1, "text_pair"))
    assert oracle.asked[::3] == [f"{text}|{pair}" for text, pair in zip(TEXTS, PAIRS, strict=True)]


def test_rows_whose_index_has_gaps_keep_their_places():
    rows = task_of().train.select([0, 3]).map(lambda row: {"index": row["index"] * 2 + 1})
    counts = ask(Oracle(), rows, Noise(), columns=["text"], copies=4, names=NAMES)
    assert counts.shape == (8, 3)
    assert counts.sum(1).tolist() == [0, 4, 0, 0, 0, 0, 0, 4]


def test_what_is_known_is_not_asked_again(own_cache: Path):
    task = task_of()
    first = counts_of(Oracle(), task)
    again = Oracle()
    assert counts_of(again, task).tolist() == first.tolist()
    assert again.asked == []
    assert len(list((own_cache / "decisions").iterdir())) == 1
    free = Oracle()
    assert counts_of(free, task, use_cache=False).tolist() == first.tolist()
    assert len(free.asked) == 20


def test_more_copies_ask_only_for_the_additional_ones_and_fewer_for_none():
    task, more, fewer = task_of(), Oracle(), Oracle()
    counts_of(Oracle(), task, copies=4)
    counts = counts_of(more, task, copies=6)
    assert len(more.asked) == 10
    assert counts.tolist() == counts_of(Oracle(), task, copies=6, use_cache=False).tolist()
    assert counts_of(fewer, task, copies=2).tolist() == counts_of(Oracle(), task, copies=2, use_cache=False).tolist()
    assert fewer.asked == []


@pytest.mark.parametrize("change", ["box", "data", "seed", "ratio", "labels", "neighbours"])
def test_another_box_data_or_noise_is_another_memory(change: str):
    counts_of(Oracle(), task_of())
    box = Oracle("another" if change == "box" else "oracle")
    task = task_of(
        texts=[*TEXTS[:4], "a new sentence"] if change == "data" else TEXTS,
        names=("a", "b", "c") if change == "labels" else NAMES,
    )
    noise = Noise(0.2 if change == "ratio" else 0.1, 1 if change == "seed" else 0)
    counts_of(box, task, noise=noise, noise_identity="words" if change == "neighbours" else None)
    assert len(box.asked) == 20


@pytest.mark.parametrize("size", [1, 4, 8, 12, 1000])
def test_an_interrupted_questioning_goes_on_where_it_stopped(size: int):
    task = task_of()
    with pytest.raises(KeyboardInterrupt):
        counts_of(Oracle(patience=13), task, queries_per_call=size)
    rest = Oracle()
    counts = counts_of(rest, task, queries_per_call=size)
    # Whole portions are kept: of one example at least.
    kept = 0 if size > 13 else 13 // max(4, size - size % 4) * max(4, size - size % 4)
    assert len(rest.asked) == 20 - kept
    assert counts.tolist() == counts_of(Oracle(), task, use_cache=False).tolist()


@pytest.mark.parametrize(
    "torn", ['{"index": 3, "first": 0, "deci', "garbage", '{"index": 3}', '{"index": 4, "first": 9, "decisions": [1]}']
)
def test_a_torn_or_strange_line_of_the_memory_is_not_there(torn: str, own_cache: Path):
    task = task_of()
    expected = counts_of(Oracle(), task)
    [path] = (own_cache / "decisions").iterdir()
    lines = [line for line in path.read_text().splitlines() if line and '"index": 3' not in line]
    path.write_text("\n".join([*lines, torn]))
    rest = Oracle()
    assert counts_of(rest, task).tolist() == expected.tolist()
    assert len(rest.asked) == 4
    last = Oracle()
    assert counts_of(last, task).tolist() == expected.tolist()
    assert last.asked == []


def test_two_runs_that_remember_the_same_thing_do_no_harm(tmp_path: Path):
    one, two = Memory(tmp_path / "m.jsonl"), Memory(tmp_path / "m.jsonl")
    one.add({0: [1, 2]})
    two.add({0: [1, 2]})
    one.add({0: [0]})
    assert Memory(tmp_path / "m.jsonl").known == {0: [1, 2, 0]}


def test_a_cache_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "file"))
    assert counts_of(Oracle(), task_of()).sum() == 20


# --- the black boxes ------------------------------------------------------------------------------------------------


def test_a_local_model_gives_the_class_of_its_largest_logit():
    model = tiny("bert", labels=3, seed=4)
    box = LocalModel(KIND, model, WORDS, max_length=64, batch_size=2, device="cpu")
    for pair in (False, True):
        task = task_of(pair=pair)
        logits = predict(model, encode(task.train, WORDS, 64), Collator(WORDS))["logits"]
        assert box.decide(questions(TEXTS, PAIRS if pair else None)) == logits.argmax(-1).tolist()
    assert box.identity != LocalModel(KIND, tiny("bert", labels=3, seed=5), WORDS, max_length=64).identity
    assert box.identity != LocalModel(KIND, model, WORDS, max_length=16).identity


def module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


def test_a_callable_beside_the_recipe_is_asked_with_texts_or_pairs(tmp_path: Path):
    name = module(
        tmp_path,
        "asked_with",
        'def one(texts):\n    return ["positive" if "witty" in t else "negative" for t in texts]\n'
        "class Box:\n    @staticmethod\n    def two(pairs):\n        return [len(a) > len(b) for a, b in pairs]\n",
    )
    before = list(sys.path)
    assert PythonCallable(f"{name}:one", NAMES, tmp_path).decide(questions(TEXTS)) == [0, 1, 0, 0, 0]
    assert PythonCallable(f"{name}:Box.two", ("False", "True"), tmp_path).decide(questions(TEXTS, PAIRS)) == [
        1,
        1,
        1,
        0,
        1,
    ]
    assert sys.path == before


def test_a_callable_whose_file_changes_is_another_black_box(tmp_path: Path):
    name = module(tmp_path, "changes", SCRIPT)
    box = PythonCallable(f"{name}:by_length", NAMES, tmp_path)
    first = box.identity
    (tmp_path / "changes.py").write_text(SCRIPT + "\n")
    assert box.identity != first


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_colon", "names no function"),
        (":f", "names no function"),
        ("nowhere_at_all:f", "cannot import 'nowhere_at_all': there is no such module"),
        ("answers.more:f", "cannot import 'answers.more': there is no such module"),
        ("answers:two words", "names no function"),
        ("wrong_syntax:f", "cannot import 'wrong_syntax' (SyntaxError"),
        ("answers:missing", "has no missing"),
        ("answers:number", "is no function"),
        ("answers:fails", "failed with ZeroDivisionError"),
        ("answers:short", "gave 1 answer to 5 questions"),
        ("answers:text", "answered with str, not with a list"),
        ("answers:nothing", "answered with NoneType"),
        ("answers:strange", "answered 'maybe', which is no label of the task (negative, positive, neither)"),
    ],
)
def test_a_callable_that_does_not_work_is_told_as_such(tmp_path: Path, name: str, words: str):
    module(tmp_path, "wrong_syntax", "def f(:")
    module(
        tmp_path,
        "answers",
        "number = 3\n"
        "def fails(texts): return 1 / 0\n"
        "def short(texts): return [0]\n"
        "def text(texts): return 'negative'\n"
        "def nothing(texts): pass\n"
        "def strange(texts): return ['maybe' for _ in texts]\n",
    )
    with pytest.raises(InputError) as caught:
        PythonCallable(name, NAMES, tmp_path).decide(questions(TEXTS))
    assert words in str(caught.value)
    assert caught.value.where == "method.black_box.callable"


def program(folder: Path, body: str) -> list[str]:
    (folder / "ask.py").write_text(f"import json, sys, time\nrows = [json.loads(line) for line in sys.stdin]\n{body}\n")
    return [sys.executable, "ask.py"]


def test_a_command_reads_json_lines_and_writes_labels(tmp_path: Path):
    words = program(tmp_path, 'for r in rows:\n    print("Positive" if "é\\u2028" in r["text"] else r["text_pair"])')
    texts, pairs = ["an é\u2028 opinion", 'quote " and\nline'], ["neither", "negative"]
    assert Command(words, NAMES, tmp_path).decide(questions(texts, pairs)) == [1, 0]
    alone = program(tmp_path, 'print(*["text_pair" in r and 2 or 1 for r in rows], sep="\\r\\n")')
    assert Command(alone, NAMES, tmp_path).decide(questions(texts)) == [1, 1]


def test_a_command_whose_program_changes_is_another_black_box(tmp_path: Path):
    first = Command(program(tmp_path, "pass"), NAMES, tmp_path).identity
    assert Command(program(tmp_path, "pass"), NAMES, tmp_path).identity == first
    assert Command(program(tmp_path, "pass # new"), NAMES, tmp_path).identity != first


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('print("no luck", file=sys.stderr); sys.exit(3)', "ended with exit code 3; it said:\n  no luck"),
        ('print("one short", file=sys.stderr)\nprint(0)', "gave 1 answer to 2 questions; it said:\n  one short"),
        ("pass", "gave 0 answers to 2 questions"),
        ('print("0\\nperhaps")', "answered 'perhaps', which is no label"),
        ("time.sleep(60)", "did not answer 2 questions within 0.7 seconds"),
        ('print(*range(9), sep="\\n", file=sys.stderr); sys.exit(1)', "it said:\n  4\n  5\n  6\n  7\n  8"),
    ],
)
def test_a_command_that_does_not_work_is_told_with_its_last_words(tmp_path: Path, body: str, words: str):
    timeout = 0.7 if "sleep" in body else 60.0
    with pytest.raises(InputError) as caught:
        Command(program(tmp_path, body), NAMES, tmp_path, timeout).decide(questions(["a", "b"]))
    assert words in str(caught.value)
    assert caught.value.where == "method.black_box.command"


def test_a_command_that_is_not_there_is_told_as_such(tmp_path: Path):
    with pytest.raises(InputError, match="cannot run 'no-such-program': there is no such program"):
        Command(["no-such-program"], NAMES, tmp_path).decide(questions(["a"]))


# --- recorded decisions ---------------------------------------------------------------------------------------------

TABLE = [[3, 1, 0], [0, 4, 0], [2, 1, 1], [0, 0, 4], [4, 0, 0]]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def singles() -> list[dict[str, Any]]:
    """One row a decision, in an order of its own."""
    rows = [{"index": i, "label": NAMES[c]} for i, row in enumerate(TABLE) for c, n in enumerate(row) for _ in range(n)]
    return rows[::-1]


def test_recorded_decisions_are_read_in_every_form(tmp_path: Path):
    files = [
        jsonl(tmp_path / "lists.jsonl", [{"index": i, "counts": row} for i, row in enumerate(TABLE)]),
        jsonl(
            tmp_path / "tables.jsonl",
            [{"index": i, "counts": {NAMES[c]: n for c, n in enumerate(row) if n}} for i, row in enumerate(TABLE)],
        ),
        jsonl(tmp_path / "singles.jsonl", singles()),
        jsonl(tmp_path / "texts.jsonl", [{"text": TEXTS[i], "counts": row} for i, row in enumerate(TABLE)]),
    ]
    (tmp_path / "columns.csv").write_text(
        "positive,index,neither,Negative\n" + "".join(f"{p},{i},{n},{m}\n" for i, (m, p, n) in enumerate(TABLE))
    )
    (tmp_path / "cells.csv").write_text("index,counts\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(TABLE)))
    (tmp_path / "singles.csv").write_text(
        "index,label\n" + "".join(f"{row['index']},{CLASSES[row['label']]}\n" for row in singles())
    )
    tables = [{NAMES[c]: n for c, n in enumerate(row) if n} for row in TABLE]
    for name, counts in (("lists", TABLE), ("structs", tables)):
        table = pa.table({"index": list(range(5)), "counts": counts})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    files += [
        tmp_path / name for name in ("columns.csv", "cells.csv", "singles.csv", "lists.parquet", "structs.parquet")
    ]
    for path in files:
        assert recorded(path, task_of(), "here").tolist() == TABLE, path.name


def test_recorded_decisions_on_pairs_are_found_by_both_sentences(tmp_path: Path):
    rows = [{"text": TEXTS[i], "text_pair": PAIRS[i], "counts": row} for i, row in enumerate(TABLE)]
    assert recorded(jsonl(tmp_path / "p.jsonl", rows), task_of(pair=True), "here").tolist() == TABLE


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"index": 0, "label": "good"}], "row 1 has the label 'good', which is no label of the task"),
        ([{"index": 0, "label": 1}], "no decision on 4 of 5 training examples; the first is 1"),
        ([{"index": i, "counts": [0, 0, 0]} for i in range(5)], "no decision on 5 of 5"),
        ([{"index": 0, "counts": [1, 2]}], "must count the decisions for 3 labels"),
        ([{"index": 0, "counts": 3}], "must count the decisions for 3 labels"),
        ([{"index": 0, "counts": [1, -2, 0]}], "counts -2, which is no number of decisions"),
        ([{"index": 0, "counts": [1, "many", 0]}], "counts 'many'"),
        ([{"index": 0, "counts": [1, 1e308, 0]}], "counts 1e+308, which is no number of decisions"),
        ([{"index": 0, "counts": [1, 10**400, 0]}], "which is no number of decisions"),
        ([{"index": 0, "counts": [1, float("nan"), 0]}], "counts nan, which is no number of decisions"),
        ([{"index": 10**400, "label": 1}], "index must hold whole numbers"),
        ([{"index": 0, "counts": {"good": 1}}], "row 1 has the label 'good'"),
        ([{"index": 0.5, "label": 1}], "index must hold whole numbers"),
        ([{"index": "first", "label": 1}], "index must hold whole numbers"),
        ([{"index": None, "label": 1}], "index must hold whole numbers"),
        ([{"label": 1}], "does not say which example a row is about"),
        ([{"index": 0, "answer": 1}], "holds no decisions; it has the columns index, answer"),
        ([], "has no rows"),
    ],
)
def test_recorded_decisions_that_do_not_fit_are_told_as_such(tmp_path: Path, rows: list[dict[str, Any]], words: str):
    with pytest.raises(InputError) as caught:
        recorded(jsonl(tmp_path / "r.jsonl", rows), task_of(), "method.black_box.decisions")
    assert words in str(caught.value)
    assert caught.value.where == "method.black_box.decisions"


# --- the scheme and the method --------------------------------------------------------------------------------------


def stage(**options: Any) -> Any:
    return METHOD.build(DBKDOptions.model_validate(options), context())[0]


def test_the_table_holds_the_centred_scaled_logits_behind_the_decisions(tmp_path: Path):
    jsonl(tmp_path / "r.jsonl", [{"index": i, "counts": row} for i, row in enumerate(TABLE)])
    setting = setting_of(task_of(), tmp_path)
    found = {}
    for sigma, noise_std in ((1.0, 1.0), (4.0, 1.0), (1.0, 0.5)):
        scheme = stage(black_box={"decisions": "r.jsonl"}, sigma=sigma, noise_std=noise_std).scheme
        scheme.begin(setting)
        found[sigma, noise_std] = scheme.teacher_outputs().tables["logits"]
        expected = sigma * logits_from_decisions(np.array(TABLE), sigma=noise_std)
        torch.testing.assert_close(found[sigma, noise_std], torch.from_numpy(expected).float())
    assert found[1.0, 1.0].mean(1).abs().max() < 1e-6
    torch.testing.assert_close(found[4.0, 1.0], 4 * found[1.0, 1.0])
    assert found[1.0, 1.0].argmax(1).tolist() == [0, 1, 0, 2, 0]


def test_the_loss_is_the_published_sum(tmp_path: Path):
    jsonl(tmp_path / "r.jsonl", [{"index": i, "counts": row} for i, row in enumerate(TABLE)])
    setting = setting_of(task_of(), tmp_path)
    part = stage(black_box={"decisions": "r.jsonl"}, alpha=0.5, temperature=2.0, sigma=4.0)
    rows = part.scheme.begin(setting)
    step = make_distiller(setting.student, part.terms, part.scheme, rows).eval()
    step.training = True
    order = [4, 0, 2]
    batch = setting.collator([rows[i] for i in order])
    z_s = setting.student(**{k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}).logits.detach()
    z_t = torch.from_numpy(4.0 * logits_from_decisions(np.array(TABLE))[order]).float()
    p = torch.softmax(z_t / 2, -1)
    kl = (p * (p.log() - torch.log_softmax(z_s / 2, -1))).sum(-1).mean()
    expected = functional.cross_entropy(z_s, batch["labels"]) + 0.5 * 4 * kl
    torch.testing.assert_close(step(batch)["loss"], expected, rtol=1e-5, atol=1e-6)


def test_after_the_questions_the_teacher_is_gone(tmp_path: Path):
    task, teacher = task_of(), tiny("bert", labels=3, seed=2)
    setting = setting_of(task, tmp_path, teacher=teacher)
    part = stage(copies=3)
    rows = part.scheme.begin(setting)

    def speechless(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was asked for its logits")

    teacher.forward = speechless
    teacher.base_model.forward = speechless
    assert part.scheme.teacher() is None
    step = make_distiller(setting.student, part.terms, part.scheme, rows)
    assert step.teacher_capture is None
    before = {name: p.clone() for name, p in setting.student.named_parameters()}
    record = fit(
        step,
        train=rows,
        selection=None,
        collator=setting.collator,
        metrics=lambda outputs: {},
        settings=setting.loop,
        folder=tmp_path / "work",
        log_dir=None,
        title="distil",
        console=setting.console,
        scheme=part.scheme,
    )
    part.scheme.end()
    assert record["steps"] == 6
    assert any(not torch.equal(before[name], p) for name, p in setting.student.named_parameters())


def test_a_local_teacher_is_counted_through_its_decisions_alone(tmp_path: Path):
    teacher = tiny("bert", labels=3, seed=2)
    tables = []
    for factor in (1.0, 50.0):
        # Larger logits are the same decisions.
        with torch.no_grad():
            teacher.classifier.weight.mul_(factor)
            teacher.classifier.bias.mul_(factor)
        scheme = stage(copies=5).scheme
        scheme.begin(setting_of(task_of(), tmp_path, teacher=teacher))
        tables.append(scheme.teacher_outputs().tables["logits"])
    assert torch.equal(*tables)
    assert not teacher.training


def test_without_a_teacher_model_a_black_box_must_be_named(tmp_path: Path):
    with pytest.raises(InputError, match="no teacher model to ask"):
        stage().scheme.begin(setting_of(task_of(), tmp_path))
    module(tmp_path, "beside_no_teacher", SCRIPT)
    scheme = stage(black_box={"callable": "beside_no_teacher:by_length"}, copies=3).scheme
    scheme.begin(setting_of(task_of(), tmp_path))
    assert scheme.teacher_outputs().tables["logits"].shape == (5, 3)


def test_what_is_asked_follows_from_the_noises_own_options(tmp_path: Path):
    asked = {}
    for number, options in enumerate(({}, {"noise_seed": 1}, {"ratio": 0.4}, {"noise_seed": 0})):
        name = f"notes_down_{number}"
        module(
            tmp_path, name, "asked = []\ndef decide(texts):\n    asked.extend(texts)\n    return [0 for _ in texts]\n"
        )
        stage(black_box={"callable": f"{name}:decide"}, **options).scheme.begin(setting_of(task_of(), tmp_path))
        asked[number] = sorted(sys.modules[name].asked)
    assert asked[0] == asked[3] and asked[0] != asked[1] and asked[0] != asked[2]


@pytest.mark.parametrize("synonyms", [False, True])
def test_synonyms_bring_in_words_that_no_example_has(tmp_path: Path, synonyms: bool):
    name = f"hears_{'synonyms' if synonyms else 'nothing'}"
    module(tmp_path, name, "asked = []\ndef decide(texts):\n    asked.extend(texts)\n    return [0 for _ in texts]\n")
    stage(black_box={"callable": f"{name}:decide"}, synonyms=synonyms).scheme.begin(setting_of(task_of(), tmp_path))
    asked = {word for text in sys.modules[name].asked for word in text.split()}
    known = {word for text in TEXTS for word in text.split()}
    assert bool(asked - known) == synonyms


@pytest.mark.parametrize(
    "wrong",
    [
        {"copies": 0},
        {"ratio": 0.0},
        {"ratio": 0.6},
        {"alpha": 0.0},
        {"noise_std": 0.0},
        {"black_box": {}},
        {"black_box": {"command": []}},
        {"black_box": {"callable": "a:b", "decisions": "c"}},
        {"black_box": {"callable": "a:b", "timeout": 0.0}},
        {"black_box": {"url": "x"}},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        DBKDOptions.model_validate(wrong)


def test_it_is_known_by_name_and_classifies_only():
    assert registry.get("dbkd") is METHOD
    assert tasks_of(METHOD) == ["classification", "image-classification"]


def test_many_classes_are_solved_by_the_pattern_of_their_counts():
    counts = np.zeros((2, 40))
    counts[0, [7, 3]] = (6, 4)
    counts[1, [20, 0]] = (6, 4)
    logits = logits_from_decisions(counts)
    assert np.array_equal(np.sort(logits[0]), np.sort(logits[1]))
    assert logits[0].argmax() == 7 and logits[1].argmax() == 20
    assert len(np.unique(logits[0])) == 3


def recipe_of(folder: Path, **black_box: Any) -> Path:
    # Recorded decisions are as many as they are.
    copies = {} if "decisions" in black_box else {"copies": 3}
    method = {"name": "dbkd", **copies, **({"black_box": black_box} if black_box else {})}
    return write_recipe(folder / "tiny.toml", tiny_recipe(method=method, train={"max_steps": 4, "log_every": 2}))


@pytest.mark.parametrize(
    "who", ["teacher", "command", *(pytest.param(who, marks=pytest.mark.slow) for who in ("callable", "decisions"))]
)
def test_a_recipe_runs_to_its_end(tmp_path: Path, own_cache: Path, who: str):
    black_box: dict[str, Any] = {
        "callable": {"callable": "knows_reviews:decide"},
        "command": {"command": [sys.executable, "ask.py"]},
        "decisions": {"decisions": "asked.jsonl"},
    }.get(who, {})
    module(
        tmp_path,
        "knows_reviews",
        "def decide(texts):\n    return ['negative' if 'dull' in t else 'positive' for t in texts]\n",
    )
    program(tmp_path, 'for row in rows:\n    print(int("dull" not in row["text"]))')
    jsonl(tmp_path / "asked.jsonl", [{"index": i, "counts": [i % 4, 3 - i % 4]} for i in range(48)])
    path = recipe_of(tmp_path, **black_box)
    result = run_recipe(path)
    assert result["status"] == "done"
    history = [entry for entry in result["training"][0]["history"] if "output" in entry]
    assert history and all(entry["output"] > 0 for entry in history)
    assert len(list(own_cache.glob("decisions/*"))) == (0 if who == "decisions" else 1)
    # The teacher is scored, and what it said for that is kept; what it would say of training rows is not even asked.
    tables = [load_file(path)["logits"] for path in own_cache.glob("logits/*")]
    assert [len(table) for table in tables] == [24]


@pytest.mark.parametrize("method", ["kd", "dbkd"])
def test_only_decisions_reach_the_student_which_starts_as_the_teacher_did_before_its_fine_tuning(
    tmp_path: Path, method: str
):
    base = tiny("bert", layers=2, id2label={0: "negative", 1: "positive"})
    (tmp_path / "base").mkdir()
    save_model(base, tmp_path / "base", WORDS)
    path = write_recipe(
        tmp_path / "tiny.toml",
        tiny_recipe(
            "teacher",
            method={"name": method, **({"copies": 2} if method == "dbkd" else {})},
            # A teacher far from its start, and a student that stays where it starts.
            teacher={"model": "base", "finetune": {"max_steps": 2, "learning_rate": 0.1, "warmup": 0.0}},
            student={"select": "first"},
            train={"max_steps": 1, "learning_rate": 1e-9},
        ),
    )
    result = run_recipe(path)
    student = load_file(Path(result["paths"]["student"]) / "model.safetensors")
    starts = {"base": base.state_dict(), "teacher": load_file(Path(result["teacher_path"]) / "model.safetensors")}
    far = {
        name: max(float((weight - start[key]).abs().max()) for key, weight in student.items())
        for name, start in starts.items()
    }
    near, other = ("base", "teacher") if method == "dbkd" else ("teacher", "base")
    assert far[near] < 1e-6 < 1e-2 < far[other]


def test_regression_is_refused(tmp_path: Path):
    task = {"name": "mine", "data": "d.csv", "text": "t", "label": "y"}
    path = write_recipe(tmp_path / "tiny.toml", tiny_recipe("task", method="dbkd", task=task))
    (tmp_path / "d.csv").write_text("t,y\n" + "".join(f"word {i},{i / 7}\n" for i in range(100)))
    with pytest.raises(InputError, match="dbkd works on classification and image-classification tasks"):
        run_recipe(path)
