"""Copies of rows in which a masked language model replaced words."""

import functools
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_recipes import FOLDER, tiny_recipe, write_recipe
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from kdcli.augment.copies import words_of
from kdcli.augment.suggest import Suggester
from kdcli.data.reviews import reviews
from kdcli.distill.filler import augment_task, start_filler
from kdcli.distill.plan import make_plan
from kdcli.distill.prepare import prepare
from kdcli.distill.recipe import SCHEMAS, load_recipe
from kdcli.distill.run import run_distill
from kdcli.errors import InputError
from kdcli.files import cache_dir
from kdcli.models.save import save_model
from kdcli.recipe.check import problems_in
from kdcli.recipe.schema import Recipe
from kdcli.tasks import registry
from kdcli.tasks.base import Task

TOP_K = 5


def masked_lm(vocab_size: int, family: str = "bert") -> Any:
    """Return a tiny random masked language model that is sure of itself."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        pad_token_id=0 if family == "bert" else 1,
    )
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def byte_level(texts: list[str]) -> Any:
    """Return a small byte-level BPE tokenizer as RoBERTa has it: a word's token holds the space before it."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, processors

    backend = ByteLevelBPETokenizer(add_prefix_space=False)
    backend.train_from_iterator(texts, 420, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    core = Tokenizer.from_str(backend.to_str())
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT with a masked-LM head; its tokenizer knows no case."""
    path = tmp_path_factory.mktemp("models") / "masked-lm"
    path.mkdir()
    save_model(masked_lm(220), path, tokenizer())
    return path


def make_task(texts: list[str], pairs: list[str] | None = None, labels: list[Any] | None = None) -> Task:
    columns = {"index": list(range(len(texts))), "text": texts}
    if pairs is not None:
        columns["text_pair"] = pairs
    train = Dataset.from_dict({**columns, "label": labels or [i % 2 for i in range(len(texts))]})
    return Task(
        "own",
        registry.get("classification"),
        None,
        ("a", "b"),
        ("accuracy",),
        train,
        train,
        {},
    )


def make_recipe(model: Path | str, **augment: Any) -> Recipe:
    section = {"model": str(model), "copies": 4, "top_k": TOP_K, "stop_words": [], **augment}
    return Recipe.model_validate(tiny_recipe("teacher", task={"augment": section}, teacher=FOLDER))


TASK_OF_ONE_ROW = make_task(["a fine film"])


def augment(task: Task, model: Path | str, *, seed: int = 42, max_length: int = 128, **options: Any) -> Task:
    recipe = make_recipe(model, **options)
    section = recipe.task.model_copy(update={"max_length": max_length})
    recipe = recipe.model_copy(update={"seed": seed, "task": section})
    return augment_task(task, recipe, str(model), console=Console(file=io.StringIO()))


def split(text: str) -> list[str]:
    """Return words and what is between them, in turn; words are made of plain letters here."""
    return re.split(r"([A-Za-z]+)", text)


def copies_of(task: Task, made: Task) -> list[tuple[str, str]]:
    """Return (copy, original) of every added row of one-text tasks, by the label as its key."""
    originals = dict(zip(task.train["label"], task.train["text"], strict=True))
    rows = list(made.train)[len(task.train) :]
    return [(row["text"], originals[row["label"]]) for row in rows]


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)


@functools.cache
def best_words(folder: Path, text: str, number: int) -> list[str]:
    """Return the likeliest words in place of word `number` of `text`, found with plain transformers.

    Whole words are tokens of letters alone; where words begin with a sign for the space before them, after that.
    """
    words, model = loaded(folder)
    parts = split(text)
    original, parts[2 * number + 1] = parts[2 * number + 1], words.mask_token
    encoded = words("".join(parts), return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoded).logits[0, encoded["input_ids"][0].tolist().index(words.mask_token_id)]
    tokens = words.convert_ids_to_tokens(logits[: len(words)].argsort(descending=True).tolist())
    if "Ġa" in tokens:
        tokens = [token[1:] if token[0] == "Ġ" else "-" for token in tokens]
    return [token for token in tokens if token.isalpha() and token.lower() != original.lower()][:TOP_K]


TEXTS = [
    "the plot was dull , and the actors were wooden .",
    "A great film : funny (and very clever) !",
    "I did not like it , 10 out of 10 people left .",
]


def test_what_stands_in_a_copy_is_among_the_models_best_words_at_the_mask(folder: Path):
    task = make_task(TEXTS, labels=[0, 1, 2])
    replaced = 0
    for copy, original in copies_of(task, augment(task, folder, copies=20)):
        new, old = split(copy), split(original)
        assert new[::2] == old[::2]
        for number, (a, b) in enumerate(zip(new[1::2], old[1::2], strict=True)):
            if a != b:
                assert a.lower() in best_words(folder, original, number)
                assert a[0].isupper() == b[0].isupper()
                replaced += 1
    assert replaced > 50


def test_all_whole_words_but_the_word_itself_can_be_candidates(folder: Path):
    words, model = loaded(folder)
    suggester = Suggester(model, words, 300, 8, 128, "fp32", torch.device("cpu"))
    whole = {token for word, token in words.get_vocab().items() if word.isalpha()}
    candidates = suggester.ask(["a Film"])
    for row, word in zip(candidates.tolist(), ("a", "film"), strict=True):
        assert set(row[: len(whole) - 1]) == whole - {words.convert_tokens_to_ids(word)}
        assert set(row[len(whole) - 1 :]) == {-1}


def test_every_one_of_the_best_words_is_taken_at_times(folder: Path):
    task = make_task(["the film was dull"], labels=[0])
    taken = {split(copy)[3] for copy, _ in copies_of(task, augment(task, folder, copies=200))}
    assert taken == {"film", *best_words(folder, "the film was dull", 1)}


def test_words_are_replaced_with_the_probability_that_was_asked_for(folder: Path):
    texts = [text for text in reviews()["train"]["text"] if len(words_of(text)) > 8][:40]
    task = make_task(texts, labels=list(range(40)))
    for probability in (0.15, 0.4):
        pairs = copies_of(task, augment(task, folder, copies=20, probability=probability))
        changes = [a != b for copy, text in pairs for a, b in zip(split(copy)[1::2], split(text)[1::2], strict=True)]
        deviation = (probability * (1 - probability) / len(changes)) ** 0.5
        # Copies without any change are drawn again: a few more changes than a free draw gives.
        again = (1 - probability) ** 9
        assert -4 * deviation < sum(changes) / len(changes) - probability < 4 * deviation + again


def test_labels_pairs_and_indices_of_copies_belong_to_their_rows(folder: Path):
    task = make_task(["a dull film", "a great film"], ["the actors were good", "it was bad"], labels=[1, 0])
    made = augment(task, folder).train
    assert made[:2] == task.train[:2]
    assert made.features == task.train.features
    assert made["index"] == list(range(10))
    assert made["label"][2:] == [1] * 4 + [0] * 4
    for row in list(made)[2:]:
        original = task.train[0 if row["label"] else 1]
        assert len(row["text"].split()) == len(original["text"].split())
        assert len(row["text_pair"].split()) == len(original["text_pair"].split())
        # One of a pair's texts changes, and the other one stays.
        assert (row["text"] == original["text"]) != (row["text_pair"] == original["text_pair"])
    for first in (list(made)[2:6], list(made)[6:]):
        assert len({row["text"] for row in first}) == len({row["text_pair"] for row in first}) == 3


def test_stop_words_stay_whatever_their_case_and_the_model_is_not_asked_about_them(folder: Path):
    text = "The film can't be NOT dull, I don’t like the dog's"
    task = make_task([text], labels=[0])

    def changed(**options: Any) -> set[str]:
        copies = augment(task, folder, copies=100, **options).train["text"][1:]
        words = text.split()
        return {words[i] for copy in copies for i, word in enumerate(copy.split()) if word != words[i]}

    assert changed(stop_words=None) == {"film", "dull,", "like", "dog's"}
    assert changed(stop_words=["FILM", "like"]) == set(text.split()) - {"film", "like"}
    words, model = loaded(folder)
    asked: list[int] = []
    suggester = Suggester(
        model, words, TOP_K, 8, 128, "fp32", torch.device("cpu"), stop_words=frozenset({"the", "was", "not"})
    )
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    try:
        found = suggester.make(["The film was NOT dull"])
    finally:
        hook.remove()
    assert sum(asked) == 2
    assert [bool((row >= 0).all()) for row in found] == [False, True, False, False, True]


def test_rows_of_stop_words_alone_have_no_word_to_replace(folder: Path):
    recipe = make_recipe(folder, stop_words=None)
    with pytest.raises(InputError, match="no training row has a word"):
        start_filler(recipe, make_task(["it is not", "The"]), folder, 1)
    start_filler(recipe, make_task(["it is not dull"]), folder, 1)


def test_a_text_is_filled_by_itself_wherever_it_stands(folder: Path):
    alone = augment(make_task(["the film was dull"], labels=[0]), folder, copies=100).train["text"]
    pair = augment(make_task(["so it was"], ["the film was dull"], labels=[0]), folder, copies=100).train["text_pair"]
    for number in range(4):
        assert {text.split()[number] for text in alone} == {text.split()[number] for text in pair}


def test_regression_labels_stay_numbers(folder: Path):
    task = make_task(["a dull film", "a great film"], labels=[0.25, 4.5])
    assert augment(task, folder, copies=2).train["label"] == [0.25, 4.5, 0.25, 0.25, 4.5, 4.5]


def test_copies_differ_from_their_row_and_from_each_other(folder: Path):
    task = make_task(["dull", "a film", "the plot was dull and the actors were wooden"], labels=[0, 1, 2])
    made = augment(task, folder, copies=30)
    rows = [(row["text"], row["label"]) for row in made.train]
    assert len(set(rows)) == len(rows)
    # One word has only so many candidates.
    assert sum(label == 0 for _, label in rows) == 1 + TOP_K
    report = made.description["augment"]
    assert report["rows"] == 3
    assert report["added"] == len(rows) - 3
    assert report["added"] + report["left_out"] == 90


def test_the_seed_and_the_row_alone_decide(folder: Path):
    task = make_task(TEXTS, labels=[0, 1, 2])
    first, again = augment(task, folder).train, augment(task, folder).train
    assert first[:] == again[:]
    assert first["text"] != augment(task, folder, seed=1).train["text"]
    # A row's copies do not depend on the rows around it; more copies continue fewer.
    last = task.train.select([2])
    lone = augment(make_task(TEXTS).__class__(**{**task.__dict__, "train": last}), folder).train
    assert (
        lone["text"][1:] == [text for text, label in zip(first["text"], first["label"], strict=True) if label == 2][1:]
    )
    more = [row["text"] for row in augment(task, folder, copies=6).train if row["label"] == 0]
    assert more[:5] == [row["text"] for row in first if row["label"] == 0]


def test_batches_of_any_size_give_the_same_copies(folder: Path, monkeypatch: pytest.MonkeyPatch):
    task = make_task(TEXTS, labels=[0, 1, 2])
    first = augment(task, folder, batch_size=64).train
    for number, size in enumerate((1, 7)):
        monkeypatch.setenv("KDCLI_CACHE", f"{cache_dir()}-{number}")
        assert augment(task, folder, batch_size=size).train["text"] == first["text"]


def test_the_model_is_asked_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import BertModel

    task = make_task(TEXTS, labels=[0, 1, 2])
    first = augment(task, folder).train

    def asked(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was asked")

    with monkeypatch.context() as patch:
        patch.setattr(BertModel, "forward", asked)
        assert augment(task, folder).train[:] == first[:]
        # How many copies, how probable and which seed are no questions to the model; other sentences are.
        augment(task, folder, copies=9, probability=0.9, seed=3)
        for other in ({"top_k": TOP_K + 1}, {"max_length": 64}):
            with pytest.raises(AssertionError, match="asked"):
                augment(task, folder, **other)
        with pytest.raises(AssertionError, match="asked"):
            augment(make_task([*TEXTS, "one more"]), folder)
    [file] = (cache_dir() / "augment").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert augment(task, folder).train[:] == first[:]


def test_an_interrupted_work_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import BertModel

    monkeypatch.setattr("kdcli.augment.suggest.CHUNK", 1)
    task, calls, forward = make_task(TEXTS, labels=[0, 1, 2]), [], BertModel.forward

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(BertModel, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        augment(task, folder)
    assert len(list((cache_dir() / "augment").rglob("*.safetensors"))) == 2
    resumed = augment(task, folder).train
    assert len(calls) == 4
    monkeypatch.setenv("KDCLI_CACHE", f"{cache_dir()}-other")
    assert augment(task, folder).train[:] == resumed[:]


def test_a_read_only_cache_ends_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    task = make_task(TEXTS, labels=[0, 1, 2])
    first = augment(task, folder).train
    (cache_dir().parent / "file").write_text("no folder")
    monkeypatch.setenv("KDCLI_CACHE", str(cache_dir().parent / "file"))
    assert augment(task, folder).train[:] == first[:]


def test_a_word_of_several_pieces_gives_way_to_one_mask(folder: Path):
    word = "unbelievably"
    assert len(tokenizer().tokenize(word)) > 1
    text = f"the {word} dull film"
    copies = copies_of(make_task([text], labels=[0]), augment(make_task([text], labels=[0]), folder, copies=60))
    taken = {split(copy)[3] for copy, _ in copies}
    assert taken == {word, *best_words(folder, text, 1)}


def test_words_after_the_maximum_length_stay(folder: Path):
    text = "the film was dull " * 10
    made = augment(make_task([text], labels=[0]), folder, copies=60, max_length=8).train["text"][1:]
    # [CLS], six tokens, [SEP]
    assert all(copy.split()[6:] == text.split()[6:] for copy in made)
    assert all(len({copy.split()[i] for copy in made}) > 1 for i in range(6))


def test_a_text_may_hold_masks_of_its_own(folder: Path):
    text = "[MASK] film ( [MASK] ) was dull"
    made = augment(make_task([text], labels=[0]), folder, copies=20).train["text"]
    parts = AutoTokenizer.from_pretrained(folder)(text.replace("dull", "[MASK]"), return_tensors="pt")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**parts).logits[0, -2]
    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(logits[: len(tokenizer())].argsort().tolist())
    best = [word for word in reversed(words) if word.isalpha() and word != "dull"][:TOP_K]
    assert {copy.split()[-1] for copy in made} <= {"dull", *best}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's a well-made film, isn't it?", ["it's", "a", "well", "made", "film", "isn't", "it"]),
        ("it 's 3d in 1990s , b2b and snake_case 2nd", ["it", "in", "and"]),
        ("rock 'n' roll , the dogs' tails", ["rock", "roll", "the", "dogs", "tails"]),
        ("don't5 café naïve don’t", ["café", "naïve", "don’t"]),
        ("это кино हिन्दी", ["это", "кино", "हिन्दी"]),
        ("映画 は 좋다 ok", ["ok"]),
        ("... 10 !? -- 3.5", []),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_that_nothing_else_holds(text: str, words: list[str]):
    assert [text[start:end] for start, end in words_of(text)] == words


@given(st.text(alphabet="aéZ'’ 1_-.映\u0301\n", max_size=30))
def test_words_are_in_order_and_hold_no_digits_or_white_space(text: str):
    last = -1
    for start, end in words_of(text):
        assert last < start < end
        assert not any(c.isspace() or c.isdigit() for c in text[start:end])
        assert text[start] not in "'’" and text[end - 1] not in "'’"
        last = end


SPACED = "  The film\twas dull,  (really) dull!\n"


def test_spacing_and_punctuation_stay(folder: Path):
    task = make_task([SPACED], labels=[0])
    for copy, _ in copies_of(task, augment(task, folder, copies=20)):
        assert split(copy)[::2] == split(SPACED)[::2]


def test_byte_level_tokenizers_keep_the_spacing_and_take_whole_words(tmp_path: Path):
    texts = reviews()["train"]["text"]
    words = byte_level([*texts, *(text.capitalize() for text in texts), *(f"({word})" for word in texts[0].split())])
    save_model(masked_lm(len(words), "roberta"), tmp_path, words)
    whole = {token[1:] for token in words.get_vocab() if token[0] == "Ġ" and token[1:].isalpha()}
    text = f"  The film was  dull, ({texts[0].split()[0]}) {texts[1]}"
    task = make_task([text], labels=[0])
    pairs = copies_of(task, augment(task, tmp_path, copies=60))
    replaced = 0
    for copy, original in pairs:
        new, old = split(copy), split(original)
        assert new[::2] == old[::2]
        for number, (a, b) in enumerate(zip(new[1::2], old[1::2], strict=True)):
            if a == b:
                continue
            replaced += 1
            # Without a space before it a word is another token, of which only the whole words count.
            assert a in (best_words(tmp_path, original, number) if old[2 * number][-1:].isspace() else whole)
    assert replaced > 100


def test_a_model_without_a_masked_lm_head_is_refused(tmp_path: Path):
    save_model(tiny("bert"), tmp_path, tokenizer())
    with pytest.raises(InputError, match="no masked-LM head") as caught:
        start_filler(make_recipe(tmp_path), TASK_OF_ONE_ROW, Path(), 1)
    assert caught.value.where == "task.augment.model"


def test_text_that_is_not_there_is_told_with_its_field(tmp_path: Path):
    save_model(tiny("bert"), tmp_path, tokenizer())
    with pytest.raises(InputError) as caught:
        start_filler(make_recipe(tmp_path, text="nowhere.txt"), TASK_OF_ONE_ROW, tmp_path, 1)
    assert caught.value.where == "task.augment.text"


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path):
    words = tokenizer()
    words.mask_token = None
    save_model(masked_lm(220), tmp_path, words)
    with pytest.raises(InputError, match="no mask token"):
        start_filler(make_recipe(tmp_path), TASK_OF_ONE_ROW, Path(), 1)


def test_a_model_that_is_not_there_is_told_with_its_field(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        start_filler(make_recipe("./nowhere"), TASK_OF_ONE_ROW, tmp_path, 1)
    assert caught.value.where == "task.augment.model"


def test_rows_without_words_are_no_rows_to_copy(folder: Path):
    with pytest.raises(InputError, match="no training row"):
        augment(make_task(["1 2 3", "..."]), folder)
    made = augment(make_task(["1 2 3", "a film"]), folder)
    assert {row["label"] for row in list(made.train)[2:]} == {1}


@pytest.mark.parametrize("bad", [{"probability": 0.0}, {"copies": 0}, {"top_k": 0}, {"steps": 1}])
def test_impossible_options_are_refused(bad: dict[str, Any]):
    with pytest.raises(ValueError):
        make_recipe("x", **bad)


def test_words_take_the_place_of_words_and_keep_their_tags(folder: Path):
    kind, rows = registry.get("token-classification"), [["A", "fine", "film", "'s", "1", "don't"], ["an old", "film"]]
    train = Dataset.from_dict({"index": [0, 1], "words": rows, "label": [[0, 1, 2, 3, 4, 5], [6, 7]]})
    made = augment(replace(TASK_OF_ONE_ROW, kind=kind, train=train, report={}), folder, probability=1.0).train
    assert made.features == train.features and list(made["words"])[:2] == rows
    copies = list(made.select(range(2, len(made))))
    # Which word of a tag a blank inside a word belongs to nothing says: such a row is trained on as it is.
    assert copies and all(copy["label"] == [0, 1, 2, 3, 4, 5] and copy["words"][3:5] == ["'s", "1"] for copy in copies)
    assert all(len(copy["words"]) == 6 and " " not in "".join(copy["words"]) for copy in copies)
    assert {copy["words"][1] for copy in copies} - {"fine"}


def test_plain_text_and_later_fine_tuning_take_no_copies():
    text = {"name": "own", "type": "text", "data": "x.txt"}
    base = {"method": "minilm", "teacher": {"model": "x"}}
    _, [problem] = problems_in({**base, "task": {**text, "augment": {"model": "x"}}}, SCHEMAS)
    assert problem.name == "task" and problem.message.endswith('words change; type = "text" has none')
    with pytest.raises(ValueError, match="augment"):
        Recipe.model_validate(
            {**base, "task": text, "finetune": [{"task": {"name": "rte", "augment": {"model": "x"}}}]}
        )


RECIPE = tiny_recipe(
    task={"train_samples": 40, "augment": {"model": "masked-lm", "copies": 3}},
    teacher={"finetune": {"epochs": 1.0, "batch_size": 20}},
    train={"max_steps": None, "epochs": 2.0, "batch_size": 20},
)


@pytest.fixture
def recipe_path(tmp_path: Path, folder: Path) -> Path:
    (tmp_path / "masked-lm").symlink_to(folder)
    path = tmp_path / "tiny.toml"
    return write_recipe(path, RECIPE)


def test_the_student_learns_from_copies_and_the_teacher_does_not(recipe_path: Path, own_cache: Path):
    recipe = load_recipe(recipe_path)
    console = Console(file=io.StringIO(), width=200)
    result = run_distill(recipe, recipe_path=recipe_path, output=recipe_path.parent / "runs", console=console)
    report = result.to_json()["task"]["augment"]
    assert report["rows"] == 40
    assert report["added"] + report["left_out"] == 120
    rows = 40 + report["added"]
    assert result.to_json()["training"][0]["steps"] == 2 * -(-rows // 20)
    assert result.to_json()["task"]["sizes"]["train"] == 40
    [kept] = (own_cache / "teachers").glob("*/kdcli.json")
    assert json.loads(kept.read_text())["training"]["steps"] == 2
    assert f"40 rows and {report['added']} copies" in console.file.getvalue()
    card = (recipe_path.parent / "runs" / "latest" / "student" / "README.md").read_text()
    assert f"40 training examples and {report['added']} copies" in card


@pytest.mark.slow
def test_two_processes_train_on_the_same_copies_as_one(recipe_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = []
    for processes in ("1", "2"):
        monkeypatch.setenv("KDCLI_CACHE", str(recipe_path.parent / f"cache-{processes}"))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        result = subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                "kdcli",
                "distill",
                recipe_path.name,
                "--json",
                "--set",
                f"name=run{processes}",
            ],
            cwd=recipe_path.parent,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count(" copies") == 1
        records.append(json.loads(result.stdout))
    one, two = records
    assert one["task"]["augment"] == two["task"]["augment"]
    assert one["training"][0]["steps"] == two["training"][0]["steps"]


def test_the_plan_counts_copies_without_asking_the_model(recipe_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdcli.distill.filler.load_model", None)
    plan = make_plan(prepare(load_recipe(recipe_path), recipe_path)).to_json()
    assert plan["task"]["sizes"]["train with copies"] == 160
    assert plan["stages"][0]["steps"] == 16


def test_a_wrong_model_is_told_before_the_teacher_is_trained(recipe_path: Path, own_cache: Path, tmp_path: Path):
    (tmp_path / "masked-lm").unlink()
    save_model(tiny("bert"), _made(tmp_path / "masked-lm"), tokenizer())
    recipe = load_recipe(recipe_path)
    with pytest.raises(InputError, match="masked-LM head"):
        run_distill(recipe, recipe_path=recipe_path, output=tmp_path / "runs", console=Console(file=io.StringIO()))
    with pytest.raises(InputError, match="masked-LM head"):
        prepare(recipe, recipe_path)
    assert not (own_cache / "teachers").exists()
    assert not (tmp_path / "runs").exists()


def test_a_model_without_a_head_is_given_one_on_plain_text(recipe_path: Path, own_cache: Path, tmp_path: Path):
    (tmp_path / "masked-lm").unlink()
    save_model(tiny("bert"), _made(tmp_path / "masked-lm"), tokenizer())
    (tmp_path / "text.txt").write_text("\n\n".join(reviews(3)["train"]["text"][:60]))
    recipe = load_recipe(recipe_path, ["task.augment.text=text.txt", "task.augment.finetune.max_steps=2"])
    output = io.StringIO()
    console = Console(file=output, width=200)
    record = run_distill(recipe, recipe_path=recipe_path, output=tmp_path / "runs", console=console).to_json()
    assert record["task"]["augment"]["added"] > 0
    kinds = [json.loads(f.read_text())["architectures"][0] for f in (own_cache / "teachers").glob("*/config.json")]
    assert sorted(kinds) == ["BertForMaskedLM", "BertForSequenceClassification"]
    run_distill(recipe, recipe_path=recipe_path, output=tmp_path / "runs", console=console, force=True)
    assert output.getvalue().count("fine-tuning on augment") == 1


def _made(path: Path) -> Path:
    path.mkdir()
    return path
