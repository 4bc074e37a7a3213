"""Layer maps: the whole table for common depths, what holds for all depths, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.errors import InputError
from kdcli.methods.layer_maps import MAPS, layer_map

# (teacher, student): teacher blocks of student blocks 1, 2, ...
UNIFORM = {
    (12, 6): [2, 4, 6, 8, 10, 12],
    (12, 4): [3, 6, 9, 12],
    (12, 3): [4, 8, 12],
    (24, 6): [4, 8, 12, 16, 20, 24],
    (24, 12): [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24],
    (6, 6): [1, 2, 3, 4, 5, 6],
    (5, 2): [3, 5],
    (7, 3): [2, 5, 7],
}
LAST_K = {
    (12, 6): [7, 8, 9, 10, 11, 12],
    (12, 4): [9, 10, 11, 12],
    (12, 3): [10, 11, 12],
    (24, 6): [19, 20, 21, 22, 23, 24],
    (24, 12): [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24],
    (6, 6): [1, 2, 3, 4, 5, 6],
    (5, 2): [4, 5],
    (7, 3): [5, 6, 7],
}
CONSECUTIVE = {
    (12, 6): [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [8, 9, 10], [10, 11, 12]],
    (12, 4): [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 11, 12]],
    (12, 3): [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]],
    (24, 6): [list(range(4 * i, 4 * i + 5)) for i in range(6)],
    (24, 12): [[2 * i, 2 * i + 1, 2 * i + 2] for i in range(12)],
    (6, 6): [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6]],
    # Rounding up overshoots: the last set is cut at the teacher's top block ...
    (5, 2): [[0, 1, 2, 3], [3, 4, 5]],
    (7, 3): [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]],
    # ... down to that block alone, or to nothing.
    (4, 3): [[0, 1, 2], [2, 3, 4], [4]],
    (6, 4): [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6]],
    (6, 5): [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6], []],
}
DEPTHS = st.integers(1, 26).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 26)))


def pairs_of(sets: list[list[int]]) -> list[tuple[int, int]]:
    return [(i, j) for i, teachers in enumerate(sets, 1) for j in teachers]


@pytest.mark.parametrize("depths", UNIFORM)
def test_uniform_takes_evenly_spaced_blocks(depths):
    teacher, student = depths
    assert layer_map("uniform", student, teacher) == list(enumerate(UNIFORM[depths], 1))


@pytest.mark.parametrize("depths", LAST_K)
def test_last_k_takes_the_top_blocks(depths):
    teacher, student = depths
    assert layer_map("last-k", student, teacher) == list(enumerate(LAST_K[depths], 1))


@pytest.mark.parametrize("depths", UNIFORM)
def test_last_is_one_pair(depths):
    teacher, student = depths
    assert layer_map("last", student, teacher) == [(student, teacher)]


@pytest.mark.parametrize("depths", CONSECUTIVE)
def test_uniform_consecutive_is_closed_and_cut_at_the_top(depths):
    teacher, student = depths
    assert layer_map("uniform-consecutive", student, teacher) == pairs_of(CONSECUTIVE[depths])


@pytest.mark.parametrize("depths", CONSECUTIVE)
def test_half_open_leaves_out_the_block_below(depths):
    teacher, student = depths
    expected = pairs_of([teachers[1:] for teachers in CONSECUTIVE[depths]])
    assert layer_map("uniform-consecutive", student, teacher, half_open=True) == expected


def test_uniform_and_last_names_both_and_a_common_block_once():
    assert layer_map("uniform+last", 3, 12) == [(1, 4), (1, 10), (2, 8), (2, 11), (3, 12)]
    assert layer_map("uniform+last", 2, 5) == [(1, 3), (1, 4), (2, 5)]
    assert layer_map("uniform+last", 3, 7) == [(1, 2), (1, 5), (2, 5), (2, 6), (3, 7)]


def test_the_uniform_map_with_the_embeddings_is_tinyberts():
    assert [t - 1 for _, t in layer_map("uniform", 4, 12)] == [2, 5, 8, 11]
    assert [0, *(t for _, t in layer_map("uniform", 4, 12))] == [0, 3, 6, 9, 12]


@settings(deadline=None)
@given(DEPTHS)
def test_one_to_one_maps_name_every_student_block_once_and_rise(depths):
    student, teacher = depths
    for name in ("uniform", "last-k", "random"):
        pairs = layer_map(name, student, teacher)
        assert [s for s, _ in pairs] == list(range(1, student + 1))
        blocks = [t for _, t in pairs]
        assert blocks == sorted(set(blocks)) and blocks[0] >= 1 and blocks[-1] <= teacher
        assert name == "random" or blocks[-1] == teacher


@settings(deadline=None)
@given(DEPTHS)
def test_uniform_consecutive_leaves_no_teacher_block_out(depths):
    student, teacher = depths
    assert {t for _, t in layer_map("uniform-consecutive", student, teacher)} == set(range(teacher + 1))
    half = [t for _, t in layer_map("uniform-consecutive", student, teacher, half_open=True)]
    assert half == list(range(1, teacher + 1))


@pytest.mark.parametrize("depth", [1, 2, 6, 12])
def test_equal_depths_make_the_one_to_one_maps_the_same(depth):
    same = [(i, i) for i in range(1, depth + 1)]
    for name in ("uniform", "last-k", "all", "uniform+last", "random"):
        assert layer_map(name, depth, depth) == same


@pytest.mark.parametrize(("student", "teacher"), [(5, 2), (12, 2), (7, 1), (12, 6)])
def test_a_student_deeper_than_the_teacher_follows_blocks_only(student, teacher):
    blocks = [t for _, t in layer_map("uniform", student, teacher)]
    assert blocks == sorted(blocks)
    assert set(blocks) == set(range(1, teacher + 1))


def test_random_is_seeded_and_drawn_anew_in_every_epoch():
    def draws(seed: int) -> list[list[tuple[int, int]]]:
        return [layer_map("random", 6, 24, seed=seed, epoch=epoch) for epoch in range(8)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert len({tuple(pairs) for pairs in draws(3)}) == 8


def test_random_reaches_every_teacher_block_equally_often():
    counts = [0] * 7
    for epoch in range(2000):
        for _, t in layer_map("random", 2, 6, epoch=epoch):
            counts[t] += 1
    assert counts[0] == 0
    # Expected 2000 / 3 each; 5 standard deviations are 105.
    assert all(abs(count - 2000 / 3) < 105 for count in counts[1:])


def test_an_explicit_list_is_taken_as_it_is():
    assert layer_map([[0, 0], [2, 7], [2, 9], [1, 12]], 2, 12) == [(0, 0), (2, 7), (2, 9), (1, 12)]


@pytest.mark.parametrize(
    "pairs",
    [[[3, 1]], [[1, 13]], [[-1, 1]], [[1, -1]], [[1, 1], [2, 13]]],
)
def test_a_pair_that_is_not_there_is_refused(pairs):
    with pytest.raises(InputError, match="not within the student's 2 and the teacher's 12 blocks") as caught:
        layer_map(pairs, 2, 12)
    assert str(pairs[-1]) in str(caught.value)
    assert caught.value.where == "method.layer_map"


@pytest.mark.parametrize("pair", [[], [1], [1, 2, 3]])
def test_a_pair_is_two_numbers(pair):
    with pytest.raises(InputError, match="is not a pair"):
        layer_map([[1, 1], pair], 2, 12)


def test_an_empty_list_is_refused():
    with pytest.raises(InputError, match="at least one pair"):
        layer_map([], 2, 12)


def test_skip_is_another_name_of_uniform():
    assert layer_map("skip", 4, 12) == layer_map("uniform", 4, 12) == [(1, 3), (2, 6), (3, 9), (4, 12)]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'skip-two'") as caught:
        layer_map("skip-two", 2, 12)
    assert all(name in str(caught.value) for name in MAPS)


def test_all_needs_equal_depths():
    with pytest.raises(InputError, match="equal depths, not 6 and 12"):
        layer_map("all", 6, 12)


@pytest.mark.parametrize("name", ["last-k", "uniform+last", "random"])
def test_maps_to_blocks_of_ones_own_need_a_teacher_as_deep(name):
    with pytest.raises(InputError, match="no deeper than the teacher"):
        layer_map(name, 7, 6)
