"""From text to batches: cutting, padding, types, and rows that keep their number."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny, tokenizer

from kdcli.data.reviews import reviews
from kdcli.data.rows import array_of
from kdcli.tasks.encode import Collator, encode

LONG = "the film was not at all dull . the menu felt superb . it rained all day"
SHORT = "the plot was grim"


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer()


def rows_of(texts: list[str], labels: list, pairs: list[str] | None = None, index: list[int] | None = None) -> Dataset:
    columns: dict[str, list] = {"index": index or list(range(len(texts))), "text": texts, "label": labels}
    return Dataset.from_dict({**columns, **({"text_pair": pairs} if pairs is not None else {})})


def pieces(words: Any, text: str) -> list[int]:
    return words(text, add_special_tokens=False)["input_ids"]


def test_a_text_has_its_pieces_between_the_special_tokens(words: Any):
    row = encode(rows_of([SHORT], [1]), words, 128)[0]
    ids = pieces(words, SHORT)
    assert row["input_ids"] == [words.cls_token_id, *ids, words.sep_token_id]
    assert row["attention_mask"] == [1] * (len(ids) + 2) and row["length"] == len(ids) + 2


def test_a_long_text_keeps_its_beginning_and_the_special_tokens(words: Any):
    row = encode(rows_of([LONG], [1]), words, 8)[0]
    assert row["input_ids"] == [words.cls_token_id, *pieces(words, LONG)[:6], words.sep_token_id]
    assert row["length"] == 8


def test_a_pair_is_cut_from_its_longer_side(words: Any):
    short, long = pieces(words, SHORT), pieces(words, LONG)
    row = encode(rows_of([SHORT], [1], [LONG]), words, len(short) + 3 + 5)[0]
    ends = [i for i, token in enumerate(row["input_ids"]) if token == words.sep_token_id]
    assert row["input_ids"][1 : ends[0]] == short
    assert row["input_ids"][ends[0] + 1 : ends[1]] == long[:5]
    assert row["token_type_ids"] == [0] * (len(short) + 2) + [1] * 6


def test_a_pair_whose_first_side_is_longer_is_cut_there(words: Any):
    short, long = pieces(words, SHORT), pieces(words, LONG)
    row = encode(rows_of([LONG], [1], [SHORT]), words, len(short) + 3 + 5)[0]
    assert row["input_ids"] == [
        words.cls_token_id,
        *long[:5],
        words.sep_token_id,
        *short,
        words.sep_token_id,
    ]


def test_two_long_sides_are_cut_to_equal_lengths(words: Any):
    row = encode(rows_of([LONG], [1], [LONG]), words, 15)[0]
    assert row["length"] == 15
    assert sum(row["token_type_ids"]) == 6 + 1  # the second side and its separator


@pytest.mark.parametrize("limit", [4, 9, 16, 128])
def test_no_row_is_longer_than_asked_for(words: Any, limit: int):
    texts = reviews()["train"]["text"][:50]
    for pairs in (None, texts[::-1]):
        encoded = encode(rows_of(texts, [0] * 50, pairs), words, limit)
        assert max(encoded["length"]) <= limit
        assert encoded["length"][:] == [len(ids) for ids in encoded["input_ids"]]


def test_the_tokenizers_own_limit_counts_when_it_is_lower():
    limited = tokenizer()
    limited.model_max_length = 10
    assert encode(rows_of([LONG], [0]), limited, 128)["length"][:] == [10]


def test_rows_keep_their_number_and_their_label(words: Any):
    encoded = encode(rows_of([LONG, SHORT, "so"], [1, 0, 1], index=[7, 3, 11]), words, 32)
    assert encoded["index"][:] == [7, 3, 11] and encoded["labels"][:] == [1, 0, 1]
    batch = Collator(words)([encoded[2], encoded[0]])
    assert batch["index"].tolist() == [11, 7] and batch["labels"].tolist() == [1, 1]
    assert batch["index"].dtype == torch.long


def test_an_empty_text_is_the_special_tokens_alone(words: Any):
    assert encode(rows_of(["", SHORT], [0, 1]), words, 32)[0]["input_ids"] == [words.cls_token_id, words.sep_token_id]


@pytest.mark.parametrize(("labels", "dtype"), [([1, 0], torch.long), ([1.0, 0.0], torch.float32)])
def test_labels_are_whole_numbers_for_classes_and_floats_for_a_regression(words: Any, labels: list, dtype: torch.dtype):
    encoded = encode(rows_of([SHORT, LONG], labels), words, 32)
    batch = Collator(words)([encoded[0], encoded[1]])
    assert batch["labels"].dtype == dtype and batch["labels"].tolist() == labels


@pytest.mark.parametrize(("length", "multiple", "width"), [(7, 8, 8), (8, 8, 8), (9, 8, 16), (9, 1, 9), (9, 4, 12)])
def test_the_width_is_the_next_multiple(words: Any, length: int, multiple: int, width: int):
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": 0, "index": n} for n in (length, 3)]
    batch = Collator(words, multiple=multiple)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["attention_mask"].sum(1).tolist() == [length, 3]
    assert "token_type_ids" not in batch


def test_padding_stands_at_the_end_and_is_masked(words: Any):
    encoded = encode(rows_of([SHORT, LONG], [0, 1], [LONG, SHORT]), words, 64)
    batch = Collator(words)([encoded[0], encoded[1]])
    for i in range(2):
        n = encoded[i]["length"]
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[name][i, :n].tolist() == encoded[i][name]
            assert batch[name].dtype == torch.long
        assert set(batch["input_ids"][i, n:].tolist()) <= {words.pad_token_id}
        assert not batch["attention_mask"][i, n:].any()


def test_padding_uses_the_tokenizers_own_token():
    other = tokenizer()
    other.pad_token = "[MASK]"
    rows = [{"input_ids": [5] * 3, "attention_mask": [1] * 3, "labels": 0, "index": 0}]
    assert Collator(other)(rows)["input_ids"][0, 3:].tolist() == [other.mask_token_id] * 5


def test_padding_never_exceeds_the_models_positions():
    limited = tokenizer()
    limited.model_max_length = 12
    encoded = encode(rows_of([LONG, SHORT], [0, 1]), limited, 128)
    batch = Collator(limited)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape == (2, 12)
    model = tiny("bert", max_position_embeddings=12)
    assert model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.shape == (2, 2)


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2"])
def test_logits_do_not_depend_on_who_else_is_in_the_batch(words: Any, family: str):
    model = tiny(family)
    encoded = encode(rows_of([SHORT, LONG], [0, 1]), words, 64)
    collate = Collator(words)
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        together = collate([encoded[0], encoded[1]])
        alone = collate([encoded[0]])
        a = model(**{name: together[name] for name in names}).logits[0]
        b = model(**{name: alone[name] for name in names}).logits[0]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_real_encoder_cuts_pairs_as_its_tokenizer_does(encoder: Any):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(encoder)
    row = encode(rows_of([SHORT], [0], [LONG]), real, 12)[0]
    assert row["length"] == 12
    assert real.decode(row["input_ids"]) == "[CLS] the plot was grim [SEP] the film was not at [SEP]"


@pytest.mark.parametrize(
    ("labels", "shape", "kind"),
    [
        ([1, 0], (2,), torch.long),
        ([0.5, 1.0], (2,), torch.float32),
        ([[1.0, 0.0, 1.0], [0.0] * 3], (2, 3), torch.float32),
    ],
)
def test_labels_of_a_batch_have_the_shape_and_type_of_the_rows(labels: list, shape: tuple, kind: torch.dtype):
    rows = Dataset.from_dict({"index": [0, 1], "text": ["a film", "the film was good"], "label": labels})
    encoded = encode(rows, tokenizer(), 16)
    batch = Collator(tokenizer())([encoded[i] for i in range(2)])
    assert batch["labels"].shape == shape and batch["labels"].dtype == kind
    assert batch["labels"].tolist() == labels and array_of(encoded, "labels").tolist() == labels
