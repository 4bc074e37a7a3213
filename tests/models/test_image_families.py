"""The families that read images: where their matrices are, and that captured signals are the library's own."""

import pytest
from families import IMAGES, tiny
from transformers import PreTrainedModel

from kdcli.models.probe import probe_batch
from kdcli.models.shape import longest_input, shape_of


@pytest.fixture(scope="module", params=IMAGES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param, layers=3)


def test_sizes_have_one_name_in_every_family(model: PreTrainedModel):
    shape = shape_of(model.config)
    assert (shape.layers, shape.hidden, shape.heads, shape.head) == (3, 32, 4, 8)
    assert (shape.image, shape.patch, shape.channels) == (16, 4, 3)
    states = model(**probe_batch(model), output_hidden_states=True).hidden_states
    assert {state.shape for state in states} == {(4, shape.tokens, 32)}
    assert shape.vocab is None and longest_input(model.config) is None
