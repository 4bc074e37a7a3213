"""Noised copies of sentences, and words near a word."""

import numpy as np
import pytest
import torch
from families import tiny, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.black_box.neighbours import EmbeddingNeighbours
from kdcli.black_box.noise import Noise
from kdcli.models.lowrank import LowRankEmbedding

TEXT = "the film was dull although the second half seemed really quite gripping to me and my brother"
WORDS = TEXT.split()
NEAR = {"dull": ["boring", "bland"], "gripping": ["thrilling"]}


def copies(noise: Noise, text: str = TEXT, count: int = 300) -> list[str]:
    """Copies 1, 2, ...: copy 0 is the text itself."""
    return [noise.copy(text, 7, number) for number in range(1, count + 1)]


def test_a_copy_depends_on_seed_example_number_and_field_alone():
    noise = Noise(seed=3)
    assert copies(noise) == copies(Noise(seed=3))
    assert noise.copy(TEXT, 7, 250) == copies(noise)[249]
    ten = copies(noise)[:10]
    others = [copies(Noise(seed=4))[:10], [noise.copy(TEXT, 8, number) for number in range(1, 11)]]
    others.append([noise.copy(TEXT, 7, number, "text_pair") for number in range(1, 11)])
    assert all(other != ten for other in others) and len(set(ten)) > 7


def test_the_first_copy_is_the_text_itself():
    spaced = " the  film\twas dull "
    assert Noise(ratio=0.5).copy(spaced, 7, 0) == spaced
    assert Noise(ratio=0.5).copy(spaced, 7, 1) != spaced


def test_without_neighbours_no_word_is_new():
    for copy in copies(Noise()):
        assert set(copy.split()) <= set(WORDS)


def test_every_operation_is_done_equally_often_in_an_order_of_its_own():
    text = " ".join(str(i) for i in range(200))

    def operation(copy: str) -> str:
        """Which one made a copy; one that deletes may leave all words."""
        if len(copy) > len(text):
            return "insert"
        return "swap" if copy != text and sorted(copy.split()) == sorted(text.split()) else "delete"

    made = [operation(copy) for copy in copies(Noise(ratio=0.3), text, 900)]
    runs = [tuple(made[start : start + 3]) for start in range(0, 900, 3)]
    assert all(sorted(run) == ["delete", "insert", "swap"] for run in runs)
    assert len(set(runs)) == 6
    assert [operation(Noise(ratio=0.3).copy(text, 7, number, "text_pair")) for number in range(1, 901)] != made


def test_every_copy_draws_its_share_of_words_and_the_ratio_is_their_mean():
    import random

    text = " ".join(str(i) for i in range(1000))
    inserted = [len(copy.split()) - 1000 for copy in copies(Noise(ratio=0.1), text, 1500)]
    shares = np.array([length / 1000 for length in inserted if length > 0])
    assert len(shares) == 500
    # |N(0, s^2)| with mean 0.1: its standard deviation is 0.1 sqrt(pi / 2 - 1).
    assert shares.mean() == pytest.approx(0.1, abs=0.01)
    assert shares.std() == pytest.approx(0.1 * np.sqrt(np.pi / 2 - 1), abs=0.01)
    wide = [Noise(ratio=0.5).share(random.Random(seed)) for seed in range(500)]
    assert max(wide) == 0.5 and min(wide) < 0.05


def test_the_share_is_that_of_words_that_change():
    import random

    words = [str(i) for i in range(200)]
    noise = Noise()
    assert len(noise.insert(words, 0.1, random.Random(0))) == 220
    swapped = noise.swap(words, 0.1, random.Random(0))
    assert sorted(swapped) == sorted(words) and 30 <= sum(a != b for a, b in zip(swapped, words, strict=True)) <= 40
    kept = [len(noise.delete(words, 0.1, random.Random(seed))) for seed in range(50)]
    assert sum(kept) / 50 == pytest.approx(180, abs=3)
    assert all(len(noise.delete(words[:2], 0.99, random.Random(seed))) >= 1 for seed in range(50))


def test_a_source_of_neighbours_adds_replacement_and_feeds_insertion():
    import random

    noise = Noise(ratio=0.2, neighbours=lambda word: NEAR.get(word, []))
    seen = {word for copy in copies(noise, count=400) for word in copy.split()} - set(WORDS)
    assert seen == {"boring", "bland", "thrilling"}
    replaced = noise.replace(WORDS, 0.2, random.Random(0))
    changed = [(a, b) for a, b in zip(WORDS, replaced, strict=True) if a != b]
    assert len(changed) == 2 and all(b in NEAR[a] for a, b in changed)
    assert Noise(ratio=0.2, neighbours=lambda word: []).replace(WORDS, 0.2, random.Random(0)) == WORDS


@given(
    st.text(alphabet="ab \n\t.,é漢", max_size=30),
    st.floats(min_value=0.01, max_value=0.99),
    st.integers(min_value=0, max_value=20),
)
@settings(max_examples=200, deadline=None)
def test_any_text_keeps_some_words_and_gets_no_strange_ones(text: str, ratio: float, number: int):
    copy = Noise(ratio).copy(text, 0, number)
    assert set(copy.split()) <= set(text.split())
    assert bool(copy.split()) == bool(text.split())
    if len(text.split()) < 2:
        assert copy == text


def test_neighbours_are_whole_words_with_the_most_similar_embeddings():
    words, model = tokenizer(), tiny("bert")
    near = EmbeddingNeighbours(model, words, count=3)
    table = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    vocabulary = words.get_vocab()
    whole = [word for word in vocabulary if word.isalpha() and len(word) >= 3]
    assert "film" in whole and set(near.words) == set(whole)
    likeness = {word: (table[vocabulary[word]] @ table[vocabulary["film"]]).item() for word in whole if word != "film"}
    assert near("film") == sorted(likeness, key=likeness.get, reverse=True)[:3]
    assert near("Film") == near("film")
    assert near("xylophone") == [] and near("##s") == [] and near("a") == []


def test_neighbours_can_be_found_in_an_embedding_of_two_factors():
    words, model = tokenizer(), tiny("bert")
    plain = EmbeddingNeighbours(model, words)
    table = model.get_input_embeddings()
    model.set_input_embeddings(LowRankEmbedding.from_embedding(table, 32))
    factored = EmbeddingNeighbours(model, words)
    assert all(set(factored(word)) == set(plain(word)) for word in plain.words[:20])


def test_neighbours_of_another_table_have_another_identity():
    words = tokenizer()
    first, again, other = (EmbeddingNeighbours(tiny("bert", seed=seed), words).identity for seed in (0, 0, 1))
    assert first == again != other
