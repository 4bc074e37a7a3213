"""Tokenizers with fewer pieces: the corpus is cut as before, and so is every text whose pieces all stay."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import tokenizer as word_pieces
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    CamembertTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

from kdcli.data.reviews import reviews
from kdcli.errors import InputError, RunError
from kdcli.models.tokenizer_trim import Corpus, Pieces, changes_of, check_cut, same_parts

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
TEXTS: list[str] = reviews()["train"]["text"]
CORPUS, OTHERS = TEXTS[:12], TEXTS[300:500]


def fast(made: Tokenizer) -> Any:
    """Return a tokenizer as the library loads it, with an added token behind its vocabulary."""
    made.post_processor = processors.RobertaProcessing(("</s>", made.token_to_id("</s>")), ("<s>", 0))
    words = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=77, **SPECIAL)
    words.add_tokens(["<user>"])
    return words


def unigram(**options: Any) -> Any:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=list(SPECIAL.values()), unk_token="<unk>")
    made.train_from_iterator(TEXTS, trainer)
    return fast(made)


def with_bytes() -> Any:
    """Return a Unigram tokenizer that gives bytes for what it has no piece for."""
    pieces = [(name, 0.0) for name in SPECIAL.values()] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    trained = Pieces(unigram()).model["vocab"][len(SPECIAL) :]
    made = Tokenizer(models.Unigram([*pieces, *map(tuple, trained)], 3, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(made)


def byte_level() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXTS, trainer)
    return fast(made)


def characters_first() -> Any:
    """Return a BPE tokenizer of characters that marks continuations, and has an unknown token."""
    made = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL.values()), continuing_subword_prefix="##")
    made.train_from_iterator(TEXTS, trainer)
    return fast(made)


def words_only() -> Any:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXTS, trainers.WordLevelTrainer(vocab_size=500, special_tokens=list(SPECIAL.values())))
    return fast(made)


KINDS: dict[str, Callable[[], Any]] = {
    "WordPiece": word_pieces,
    "Unigram": unigram,
    "Unigram with bytes": with_bytes,
    "byte-level BPE": byte_level,
    "BPE": characters_first,
    "words": words_only,
}


@pytest.fixture(scope="module", params=KINDS)
def full(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def trim(full: Any, corpus: list[str], **options: Any) -> tuple[Any, np.ndarray]:
    pieces = Pieces(full)
    kept = pieces.choose(pieces.counts(pieces.read(corpus)), **options)
    return pieces.cut(kept), kept


def tokens(words: Any, *texts: str) -> list[str]:
    """Return the pieces of a text or a pair, with special tokens, by the library's own call."""
    return words.convert_ids_to_tokens(words(*texts)["input_ids"])


def random_texts(full: Any, kept: np.ndarray, number: int = 400) -> list[str]:
    """Return texts of kept pieces, of words of the corpus, and of its characters, in random order."""
    draw = random.Random(0)
    own = [full.decode([int(one)]).replace("##", "") for one in kept]
    words, letters = sorted({word for text in CORPUS for word in text.split()}), sorted(set("".join(CORPUS)))
    sources = [own, words, letters]
    return [
        draw.choice(["", " "]).join(draw.choices(draw.choice(sources), k=draw.randint(1, 8))) for _ in range(number)
    ]


def test_the_corpus_is_cut_as_before(full: Any):
    made, kept = trim(full, CORPUS)
    assert len(made) == len(kept) < len(full)
    for text, other in itertools.pairwise(CORPUS):
        assert tokens(made, text) == tokens(full, text)
        assert tokens(made, text, other) == tokens(full, text, other)
        assert made.decode(made(text)["input_ids"]) == full.decode(full(text)["input_ids"])
    assert made.model_max_length == full.model_max_length
    assert made.model_input_names == full.model_input_names


def test_ids_keep_their_order_and_what_must_stay_stays(full: Any):
    made, kept = trim(full, CORPUS, needed=[7])
    names = full.convert_ids_to_tokens(kept.tolist())
    assert names == made.convert_ids_to_tokens(list(range(len(made))))
    assert kept.tolist() == sorted(set(kept.tolist())) and 7 in kept
    assert made.special_tokens_map == full.special_tokens_map
    assert set(made.get_added_vocab()) == set(full.get_added_vocab())


def test_every_text_whose_pieces_stay_is_cut_as_before(full: Any):
    made, kept = trim(full, CORPUS)
    inside = outside = 0
    for text in random_texts(full, kept):
        before = full(text, add_special_tokens=False)["input_ids"]
        if full.unk_token_id in before or not set(before) <= set(kept.tolist()):
            outside += 1
            continue
        inside += 1
        assert [int(kept[new]) for new in made(text, add_special_tokens=False)["input_ids"]] == before, text
    assert inside >= 100 and outside >= 1


def test_changes_are_counted_word_by_word(full: Any):
    made, kept = trim(full, CORPUS)
    found = changes_of(OTHERS, Pieces(full), made, kept)
    changed = [text for text in OTHERS if tokens(made, text) != tokens(full, text)]
    assert (found.texts, found.changed_texts) == (len(OTHERS), len(changed)) and len(changed) > 0
    assert len(changed) <= found.changed_words <= found.words
    assert found.unknown_words <= found.changed_words
    assert changes_of(CORPUS, Pieces(full), made, kept).changed_words == 0
    # A word is what the tokenizer never joins: each alone changes as it does in its text.
    alone = [word for text in OTHERS for word, _ in words_of(full, text)]
    assert found.words == len(alone)


def words_of(full: Any, text: str) -> list[tuple[str, Any]]:
    backend = full.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    return backend.pre_tokenizer.pre_tokenize_str(text)


def test_the_most_used_pieces_stay(full: Any):
    pieces = Pieces(full)
    counts = pieces.counts(pieces.read(CORPUS))
    most = len(pieces.choose(counts, characters=False)) - 20
    made, kept = trim(full, CORPUS, keep=most, characters=False)
    assert most - 3 <= len(kept) <= most
    # What is left out is used no more than what stays and could be left out, but for what BPE's pieces are made of.
    free = [one for one in kept.tolist() if one not in pieces.always]
    gone = [one for one in np.flatnonzero(counts).tolist() if one not in kept]
    needed = set().union(*(pieces.with_ancestors(one) - {one} for one in free))
    assert max(counts[gone]) <= min(counts[one] for one in free if one not in needed)
    corpus = pieces.read(CORPUS)
    changed = check_cut(corpus, made, kept, unknown=pieces.unknown)
    assert changed.any()
    assert changed.tolist() == [tokens(made, text) != tokens(full, text) for text in CORPUS]


def test_pieces_of_rare_use_go(full: Any):
    pieces = Pieces(full)
    counts = pieces.counts(pieces.read(CORPUS))
    kept = pieces.choose(counts, min_count=3, characters=False)
    own = set().union(*(pieces.with_ancestors(one) for one in np.flatnonzero(counts >= 3).tolist()), pieces.always)
    assert set(kept.tolist()) == own


@pytest.mark.parametrize("name", ["WordPiece", "Unigram"])
def test_no_word_of_known_characters_becomes_unknown(name: str):
    full = KINDS[name]()
    letters = set("".join(CORPUS))
    texts = [word for text in OTHERS for word in text.split() if set(word) <= letters]
    known = [text for text in texts if full.unk_token_id not in full(text)["input_ids"]]
    found = [changes_of(known, Pieces(full), *trim(full, CORPUS, characters=keeps)) for keeps in (True, False)]
    assert found[0].changed_words > 0 and found[0].unknown_words == 0
    if name == "WordPiece":
        assert found[1].unknown_words > 0


@pytest.mark.parametrize("name", ["byte-level BPE", "Unigram with bytes"])
def test_bytes_write_whatever_there_is(name: str):
    full = KINDS[name]()
    made, _ = trim(full, CORPUS)
    for text in ("Ελληνικά", "日本語", "\U0001f600 naïve", "ｆｕｌｌ"):
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert made.unk_token_id not in ids
        assert made.decode(ids).strip() == text


def test_the_lowest_score_stays_so_that_unknown_costs_as_much_as_before():
    scores = [("<unk>", 0.0), ("ab", -10.0), ("c", -10.0), ("d", -10.0), ("e", -10.0), ("bcde", -1.0), ("zz", -40.0)]
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 0)), unk_token="<unk>")
    corpus = ["abcde", "bcde"]
    assert full.tokenize("abcde") == ["ab", "c", "d", "e"]
    made, kept = trim(full, corpus)
    assert made.tokenize("abcde") == ["ab", "c", "d", "e"]
    assert "zz" in made.get_vocab()
    # Without the piece of the lowest score an unknown a before bcde would cost less than four pieces.
    pieces = Pieces(full)
    cheaper = pieces.cut(kept[:-1])
    assert cheaper.tokenize("abcde") != ["ab", "c", "d", "e"]


def test_words_that_come_one_by_one_are_cut_as_before():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    full = fast(made)
    corpus = ["film that is good", "good"]
    small, _ = trim(full, corpus)
    for words in ([" film", " good"], [" good"], ["good"]):
        one, other = (each(words, is_split_into_words=True)["input_ids"] for each in (full, small))
        assert small.convert_ids_to_tokens(other) == full.convert_ids_to_tokens(one)


def test_a_text_that_is_cut_otherwise_is_an_error():
    full = unigram()
    pieces, (made, kept) = Pieces(full), trim(full, CORPUS)
    corpus = pieces.read(CORPUS)
    wrong = corpus.ids.copy()
    wrong[40] = kept[-2] if wrong[40] != kept[-2] else kept[-3]
    number = int(np.searchsorted(corpus.ends, 40, side="right")) + 1
    with pytest.raises(RunError, match=f"text {number} is cut otherwise by the trimmed tokenizer"):
        check_cut(Corpus(corpus.texts, wrong, corpus.ends), made, kept)


@pytest.mark.parametrize(
    ("kind", "first", "last", "options"),
    [
        (AlbertTokenizer, ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], [], {}),
        (CamembertTokenizer, ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<s>", "</s>"], ["<mask>"], {}),
        (DebertaV2Tokenizer, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], [], {"unk_id": 3}),
        (XLMRobertaTokenizer, ["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"], {}),
    ],
)
def test_classes_that_build_themselves_again_read_what_was_trimmed(
    kind: Any, first: list[str], last: list[str], options: dict[str, Any], tmp_path: Path
):
    pieces = [*map(tuple, Pieces(unigram()).model["vocab"][len(SPECIAL) :])]
    full = kind(vocab=[*((name, 0.0) for name in first), *pieces, *((name, 0.0) for name in last)], **options)
    made, kept = trim(full, CORPUS)
    made.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert len(again) == len(kept) < len(full)
    for text in (*CORPUS, "\U0001f600 film"):
        assert tokens(again, text) == tokens(full, text)


def test_an_unknown_piece_behind_others_moves():
    scores = [("a", -1.0), ("b", -2.0), ("c", -2.0), ("<unk>", 0.0)]
    full = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 3)), unk_token="<unk>")
    made, kept = trim(full, ["abz"])
    assert kept.tolist() == [0, 1, 3] and made("abz")["input_ids"] == [0, 1, 2]


def test_an_unknown_word_stays_unknown():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "a": 2, "##bc": 3, "d": 4, "##e": 5}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    full = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    corpus = ["abc a", "dbc"]
    assert full.tokenize(corpus[0]) == ["[UNK]", "a"]
    small, _ = trim(full, corpus)
    assert small.tokenize(corpus[0]) == ["[UNK]", "a"]
    assert "ab" in small.get_vocab() and "##e" not in small.get_vocab()


@pytest.mark.parametrize("name", ["WordPiece", "Unigram", "BPE", "words"])
def test_what_is_unknown_is_so_where_no_configuration_names_it(name: str):
    full = KINDS[name]()
    found = []
    for token in (full.unk_token, None):
        full.unk_token = token
        pieces = Pieces(full)
        counts = pieces.counts(pieces.read(CORPUS))
        kept = pieces.choose(counts, min_count=20, characters=False)
        made = pieces.cut(kept)
        check_cut(pieces.read(CORPUS), made, kept, unknown=pieces.unknown)
        found.append(changes_of(OTHERS, pieces, made, kept))
    assert found[0] == found[1] and found[0].unknown_words > 0


def test_parts_of_texts_are_cut_as_before(full: Any):
    pieces = Pieces(full)
    counts = pieces.counts(pieces.read(CORPUS))
    kept = pieces.choose(counts, min_count=10, characters=False)
    made, small = pieces.cut(kept), set(kept.tolist())
    parts = same_parts(CORPUS, pieces, made, kept, 5)
    assert len(parts) == 5
    for part in parts:
        assert any(part in text for text in CORPUS)
        assert tokens(made, part) == tokens(full, part)
        assert set(full(part, add_special_tokens=False)["input_ids"]) - {full.unk_token_id} <= small
    # What is unknown before and after says nothing of the pieces that stay.
    unknown = set(full("\U0001f600", add_special_tokens=False)["input_ids"]) == {pieces.unknown}
    assert same_parts(["", *["\U0001f600"] * unknown], pieces, made, kept, 5) == []


def test_other_post_processors_get_new_ids():
    full = unigram()
    ids = {name: full.convert_tokens_to_ids(name) for name in ("<s>", "</s>", "<user>")}
    template = processors.TemplateProcessing(
        single="<s> <user> $A </s>", pair="<s> $A <user> $B:1 </s>:1", special_tokens=list(ids.items())
    )
    full.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    made, kept = trim(full, CORPUS)
    assert len(kept) - 1 == made.convert_tokens_to_ids("<user>") != ids["<user>"]
    assert tokens(made, CORPUS[0], CORPUS[1]) == tokens(full, CORPUS[0], CORPUS[1])
    assert tokens(made, CORPUS[0])[:2] == ["<s>", "<user>"]


def test_a_corpus_that_uses_no_piece_is_refused(full: Any):
    pieces = Pieces(full)
    with pytest.raises(InputError, match="the text uses no piece"):
        pieces.choose(pieces.counts(pieces.read(["", ""])))
    with pytest.raises(InputError, match="fewer than the"):
        pieces.choose(pieces.counts(pieces.read(CORPUS)), keep=3)
