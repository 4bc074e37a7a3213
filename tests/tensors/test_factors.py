"""Factor lists: the published pairs, the counts that follow from them, and what is refused."""

import pytest

from kdcli.errors import InputError
from kdcli.models.factoring import has_factors, nearest_ranks, shape_for
from kdcli.recipe.schema import OverparamSection
from kdcli.tensors.factors import TABLE, MPOShape, auto_factors, length_for_scale

MPO = OverparamSection(length=3)


@pytest.mark.parametrize("dimension", sorted(TABLE))
def test_the_published_pairs_multiply_to_their_dimension(dimension: int):
    a, b = auto_factors(dimension)
    assert a * b == dimension and a >= b


@pytest.mark.parametrize(
    ("dimension", "pair"),
    [(768, (32, 24)), (3072, (64, 48)), (384, (24, 16)), (312, (24, 13)), (128, (16, 8)), (64, (8, 8)), (36, (6, 6))],
)
def test_factors_of_common_widths(dimension: int, pair: tuple[int, int]):
    assert auto_factors(dimension) == pair


VISION = (
    "16x8 16x10 20x16 32x16 32x20 40x32 16x16 32x32 32x14 56x32 24x8 32x24 24x16 48x32 32x18 64x36 "
    "24x20 32x30 48x28 36x32 54x32"
)
"""OPDF's pairs for TinyViT, those of queries, keys and values side by side in the second line."""


@pytest.mark.parametrize("pair", VISION.split())
def test_widths_of_vision_transformers_have_the_published_pairs(pair: str):
    a, b = map(int, pair.split("x"))
    assert auto_factors(a * b) == (a, b)
    square = shape_for(a * b, a * b, OverparamSection(length=1))
    assert (square.out_factors, square.in_factors) == ((a, 1, b), (a, 1, b))


@pytest.mark.parametrize("dimension", [7, 127, 769, 2 * 383, 5 * 61])
def test_a_prime_or_lopsided_dimension_is_refused(dimension: int):
    with pytest.raises(InputError, match=str(dimension)):
        auto_factors(dimension)


@pytest.mark.parametrize("section", [MPO, OverparamSection(factors={"13": [13, 1]}), OverparamSection(scale=2.0)])
def test_the_nearest_ranks_are_the_nearest_whose_chains_can_be_built(section: OverparamSection):
    def builds(rank: int) -> bool:
        try:
            return shape_for(384, rank, section).matrix == (384, rank)
        except InputError:
            return False

    fitting = [rank for rank in range(1, 420) if builds(rank)]
    for rank in range(1, 384):
        assert has_factors(rank, section) == (rank in fitting)
        below, above = [r for r in fitting if r < rank][-1:], [r for r in fitting if r > rank][:1]
        assert nearest_ranks(rank, section) == below + above


def test_any_rank_fits_where_nothing_is_rearranged():
    assert has_factors(113, OverparamSection(factorization="svd-plain"))


def test_bond_dimensions_of_the_worked_example():
    shape = MPOShape((2, 3, 2), (2, 2, 3))
    assert shape.bond_dims() == (1, 4, 6, 1)
    assert [a * b * c * d for a, b, c, d in shape.shapes()] == [16, 144, 36]
    assert shape.parameter_count() == 196
    assert shape.matrix == (12, 12)


PUBLISHED = {
    # L: 768x768, 3072x768, scale, added per BERT block
    0: (921_600, 3_686_400, 1.5625, 3_981_312),
    1: (1_253_376, 5_013_504, 2.125, 7_962_624),
    3: (1_916_928, 7_667_712, 3.25, 15_925_248),
    4: (2_248_704, 8_994_816, 3.8125, 19_906_560),
    5: (2_580_480, 10_321_920, 4.375, 23_887_872),
    6: (2_912_256, 11_649_024, 4.9375, 27_869_184),
    7: (3_244_032, 12_976_128, 5.5, 31_850_496),
    8: (3_575_808, 14_303_232, 6.0625, 35_831_808),
}


@pytest.mark.parametrize("length", PUBLISHED)
def test_parameter_counts_of_the_published_shapes(length: int):
    square, wide, scale, added = PUBLISHED[length]
    section = OverparamSection(length=length)
    one, up, down = shape_for(768, 768, section), shape_for(3072, 768, section), shape_for(768, 3072, section)
    assert len(one) == length + 2
    assert one.parameter_count() == square
    assert up.parameter_count() == down.parameter_count() == wide
    assert square / 768**2 == wide / (768 * 3072) == scale
    assert 4 * (square - 768**2) + 2 * (wide - 768 * 3072) == added
    assert length_for_scale((768, 768), scale) == length_for_scale((3072, 768), scale) == length


def test_svd_is_the_chain_without_middle_tensors():
    assert shape_for(768, 768, OverparamSection(factorization="svd")) == MPOShape((32, 24), (32, 24))


def test_svd_plain_does_not_rearrange():
    shape = shape_for(48, 36, OverparamSection(factorization="svd-plain"))
    assert shape.shapes() == [(1, 48, 1, 36), (36, 1, 36, 1)]


def test_scale_takes_the_place_of_length():
    assert len(shape_for(768, 768, OverparamSection(scale=3.25))) == 5


def test_a_scale_below_the_smallest_gives_the_smallest():
    assert len(shape_for(768, 768, OverparamSection(scale=1.1))) == 2


def test_own_lists_are_used_and_the_other_side_is_filled_with_ones():
    section = OverparamSection(factors={"768": [4, 4, 2, 1, 2, 3, 4]})
    assert shape_for(768, 3072, section) == MPOShape((4, 4, 2, 1, 2, 3, 4), (64, 1, 1, 1, 1, 1, 48))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factors": {"768": [32, 25]}}, "multiply to 800, not 768"),
        ({"factors": {"768": [768]}}, "at least 2"),
        ({"factors": {"ffn": [4, 4]}}, "a dimension"),
        ({"factorization": "svd", "scale": 3.0}, "middle tensors"),
        ({"factorization": "svd", "factors": {"768": [32, 24]}}, "factor lists"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, words: str):
    with pytest.raises(InputError, match=words) as caught:
        shape_for(768, 768, OverparamSection(**change))
    assert caught.value.where is not None and caught.value.where.startswith("overparam.")


def test_lists_of_different_lengths_are_no_shape():
    with pytest.raises(InputError):
        MPOShape((2, 2), (2, 2, 1))
