"""Questions and contexts as windows: where answers stand in them, whatever the tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from families import tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from kdcli.data.rows import stored
from kdcli.data.tables import dataset_of
from kdcli.errors import InputError
from kdcli.models.load import load_tokenizer
from kdcli.tasks.question_answering import KIND, QuestionAnswering, SpanFields
from kdcli.tasks.windows import CANDIDATES, count_unheld, room_of

WORDS = tokenizer()
SENTENCE = "the film was a fine and moving story about {} , but the plot was dull and the music was cold . "


def byte_level(*, double: bool = False, left: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes without token types; as RoBERTa's it may separate a pair by two tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if double:
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        **({"cls_token": "<s>"} if double else {}),
    }
    sides = {"padding_side": "left", "truncation_side": "left"} if left else {}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names, **sides)


TOKENIZERS = {
    "word pieces": tokenizer,
    "two separators": lambda: byte_level(double=True),
    "no special tokens": byte_level,
    "from the left": lambda: byte_level(double=True, left=True),
}


def rows_of(*rows: tuple[str, str, list[str]]) -> Dataset:
    questions, contexts, texts = zip(*rows, strict=True)
    columns: dict[str, Any] = {"question": questions, "context": contexts, "label": texts}
    starts = [context.index(t[0]) if t else -1 for context, t in zip(contexts, texts, strict=True)]
    return dataset_of(Dataset.from_dict({**columns, "start": starts}).with_format("arrow")[:])


def encode(rows: Dataset, words: Any, max_length: int, stride: int | None = None) -> Dataset:
    return QuestionAnswering(SpanFields(stride=stride)).encode(rows, words, max_length)


LONG = " ".join(SENTENCE.format(name) for name in ("ann", "tom", "a dog", "eva", "a cat"))
ROWS = rows_of(
    ("who is it about ?", LONG, ["a dog", "dog"]),
    ("  who was moving ?", SENTENCE.format("Zoë Ünal"), ["Zoë Ünal"]),
    ("which film ?", LONG, []),
    ("what was cold ?", LONG.replace("cat", "crow"), ["the music was cold"]),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stride", [None, 0, 9])
def test_targets_cut_the_answer_out_of_the_context(name: str, stride: int | None):
    words = TOKENIZERS[name]()
    windows = encode(ROWS, words, 80, stride)
    assert len(windows) == QuestionAnswering(SpanFields(stride=stride)).examples(ROWS, words, 80)
    assert windows["index"][:] == list(range(len(windows))) and windows["row"][:] == sorted(windows["row"])
    assert set(windows["row"]) == {0, 1, 2, 3} and max(windows["length"]) <= 80
    seen: set[int] = set()
    for window in windows:
        row, (start, end), first = ROWS[window["row"]], window["labels"], window["first"]
        answer, place = (row["label"] or [None])[0], row["start"]
        if start == window["none"]:
            assert end == start
            assert answer is None or not (window["begins"][0] <= place and place + len(answer) <= window["ends"][-1])
            continue
        seen.add(window["row"])
        found = row["context"][window["begins"][start - first] : window["ends"][end - first]]
        assert found.strip() == answer
    # Where windows share too little, one may hold no answer whole.
    assert seen == {0, 1, 3} or (stride == 0 and name != "word pieces")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_context_is_read_whole_and_once_but_for_what_windows_share(name: str):
    words, stride = TOKENIZERS[name](), 7
    windows = encode(ROWS, words, 80, stride)
    whole = words(ROWS["context"][:], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for row, expected in enumerate(whole):
        parts = [list(zip(w["begins"], w["ends"], strict=True)) for w in windows if w["row"] == row]
        parts = sorted(parts, key=lambda part: part[0])
        joined = list(parts[0])
        for part in parts[1:]:
            assert part[:stride] == joined[-stride:]
            joined += part[stride:]
        assert joined == [tuple(pair) for pair in expected]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answers_begin_and_end_in_the_context_or_at_one_other_position(name: str):
    words = TOKENIZERS[name]()
    windows = encode(ROWS, words, 80)
    batch = KIND.collator(words)([windows[i] for i in range(len(windows))])
    for window, allowed in zip(windows, batch[CANDIDATES].tolist(), strict=True):
        places = set(range(window["first"], window["first"] + len(window["begins"])))
        assert {i for i, may in enumerate(allowed) if may} == places | {window["none"]}
        assert window["none"] not in places and set(window["labels"]) <= places | {window["none"]}
    assert batch["labels"].shape == (len(windows), 2)
    ids = [window["input_ids"][window["none"]] for window in windows]
    assert len(set(ids)) == 1 or words.cls_token_id is None


@pytest.mark.parametrize("max_length", [64, 384])
def test_one_window_is_the_same_with_any_stride(max_length: int):
    rows = rows_of(("who ?", "ann was there .", ["ann"]), ("what ?", "the film was moving", []))
    features = [encode(rows, WORDS, max_length, stride).to_dict() for stride in (None, 0, 5, 20)]
    assert len(features[0]["index"]) == 2 and all(each == features[0] for each in features)


def test_long_questions_are_cut_and_leave_half_of_a_window_to_the_context():
    rows = rows_of(("who " * 200 + "?", LONG, ["a dog"]), ("unbelievably" * 90, LONG, ["a dog"]))
    windows = encode(rows, WORDS, 64, 8)
    assert len(windows) == QuestionAnswering(SpanFields(stride=8)).examples(rows, WORDS, 64)
    room = 64 - WORDS.num_special_tokens_to_add(pair=True)
    assert min(len(begins) for begins in windows["begins"][:-1]) > 8
    for window in windows:
        assert 0 < window["first"] - 2 <= room // 2
    assert {window["row"] for window in windows if window["labels"][0] != window["none"]} == {0, 1}


def test_the_answer_is_found_in_a_context_of_five_thousand_words():
    text = (SENTENCE.format("rain") * 250).replace("cold", "loud", 180).replace("loud", "soft", 170)
    rows = rows_of(("what was it ?", text, ["music was loud"]))
    assert len(text.split()) > 5000
    for stride in (0, 50, 127):
        windows = encode(rows, WORDS, 384, stride)
        held = [window for window in windows if window["labels"][0] != window["none"]]
        assert len(windows) > 15 and 1 <= len(held) <= 3
        for window in held:
            start, end = (place - window["first"] for place in window["labels"])
            assert text[window["begins"][start] : window["ends"][end]] == "music was loud"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("stride", [0, 3, None])
def test_answers_that_no_window_holds_are_counted(name: str, stride: int | None):
    words, text = TOKENIZERS[name](), LONG
    spans = [text[start : start + length] for start in range(0, 60, 7) for length in (2, 15, 30, 60, 90, 200)]
    spans = [span.strip() for span in spans]
    rows = rows_of(("who ?", text, []), *(("who ?", text, [span, "the"]) for span in spans))
    windows = encode(rows, words, 40, stride)
    held = {window["row"] for window in windows if window["labels"][0] != window["none"]}
    assert count_unheld(rows, words, 40, stride) == len(spans) - len(held) > 0
    assert count_unheld(rows, words, 10**6, stride) == 0


def test_white_space_before_a_question_takes_no_room():
    plain, indented = (encode(rows_of((q, LONG, ["a dog"])), WORDS, 64).to_dict() for q in ("who ?", "  \n who ?"))
    assert plain == indented


def test_rows_without_gold_answers_have_no_targets():
    rows = rows_of(("who ?", LONG, ["a dog"])).remove_columns(["label", "start"])
    windows = encode(rows, WORDS, 64)
    batch = KIND.collator(WORDS)([windows[0], windows[1]])
    assert "labels" not in windows.column_names and "labels" not in batch


def test_a_batch_of_rows_goes_on_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch):
    whole = encode(ROWS, WORDS, 64).to_dict()
    monkeypatch.setattr("kdcli.data.rows.BATCH", 1)
    assert encode(ROWS, WORDS, 64).to_dict() == whole


@pytest.mark.parametrize(
    ("max_length", "stride", "where", "words"),
    [
        (64, 31, "task.stride", "use at most 30, or max_length = 66"),
        (64, 200, "task.stride", "cannot share 200"),
        (4, None, "task.max_length", "leaves no room for a question and a context: 3 tokens are special"),
    ],
)
def test_windows_that_would_not_move_are_refused_with_what_fits(
    max_length: int, stride: int | None, where: str, words: str
):
    with pytest.raises(InputError) as caught:
        room_of(WORDS, max_length, stride)
    assert caught.value.where == where and words in str(caught.value)


@pytest.mark.parametrize(("max_length", "stride"), [(64, 30), (66, 31), (5, None), (8, None), (384, None)])
def test_windows_that_move_by_one_token_are_made(max_length: int, stride: int | None):
    windows = encode(ROWS.select([0]), WORDS, max_length, stride)
    ends = [max(ends) for ends in windows["ends"]]
    assert ends == sorted(set(ends)) or max_length == 384


def test_a_tokenizer_without_places_is_refused_with_the_remedy():
    with pytest.raises(InputError, match="CanineTokenizer does not tell where") as caught:
        room_of(CanineTokenizer(), 384, 128)
    assert "fast tokenizer" in (caught.value.hint or "")


@pytest.mark.data
@pytest.mark.parametrize("name", ["squad_small", "squad_v2_small", "xquad_en"])
def test_targets_of_real_rows_cut_out_their_answers(name: str, data_dir: Path, encoder: Path):
    from kdcli.data.files import read_file

    words = load_tokenizer(encoder)
    columns = read_file(data_dir / name / "validation.parquet", "data")
    rows = dataset_of(KIND.read(columns, SpanFields(), name, [])[0])
    windows = encode(rows, words, 128, 48)
    assert len(windows) == QuestionAnswering(SpanFields(stride=48)).examples(rows, words, 128)
    held: set[int] = set()
    for window in windows:
        start, end = (place - window["first"] for place in window["labels"])
        if start >= 0:
            row = rows[window["row"]]
            found = row["context"][window["begins"][start] : window["ends"][end]]
            held.add(window["row"])
            assert found == row["label"][0]
    answered = np.flatnonzero(np.array(rows["start"]) >= 0)
    assert len(windows) > len(rows) and len(held & set(answered.tolist())) >= 0.99 * len(answered)


def test_features_are_kept_as_other_rows_are():
    assert type(encode(ROWS, WORDS, 64)) is type(stored(iter(ROWS.with_format("arrow")[:].to_batches())))
